"""Sessions with a real, untrained Monkey: several pictures, turns, batches, streams, boxes in answers, ChatML."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bestiary.cli import main
from bestiary.inference import Request, Session, Settings
from bestiary.schema import Sample, Slot, Turn
from bestiary.variants.monkey.processor import MonkeyProcessor
from bestiary.variants.monkey.tags import NamedBox, boxes_of, numbered_pictures
from tests.parity.ovis_cases import png
from tests.weights import monkey_making as making

PICTURE = png(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
OTHER = png(np.random.default_rng(1).integers(0, 256, (31, 12, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    model = making.model_of(making.build_node(seq_length=64), spread=0.5)
    path = making.vocabulary(tmp_path_factory.mktemp("words"))
    made_by = MonkeyProcessor(tokenizer=str(path), max_tokens=512, **model.layout)
    return Session(model, made_by, settings=Settings(max_new_tokens=8))


def monkey(session: Session, **changes: object) -> MonkeyProcessor:
    """The session's processor, or one that differs in something."""
    own = session.processor
    assert isinstance(own, MonkeyProcessor)
    made = {"tokenizer": str(own.tokenizer.path), "max_tokens": 512, **session.model.layout, **changes}
    return MonkeyProcessor(**made)  # type: ignore[arg-type]


def requests() -> list[Request]:
    return [
        Request("what?", PICTURE),
        Request("<image> or <image>?", [PICTURE, OTHER]),
        Request(numbered_pictures(3) + "which?", (OTHER, PICTURE, OTHER)),
        Request("how many?"),
        Request("and?", OTHER, history=[("what is it?", "a boat"), ("<image> there?", "a car")]),
    ]


def test_answers_of_a_batch_with_any_number_of_pictures_are_those_given_one_by_one(session: Session) -> None:
    together = session.respond_all(requests(), batch_size=8)
    assert together == [session.respond_all([one])[0] for one in requests()]
    assert len(set(together)) > 2


def test_streams_and_chats_of_several_turns_give_the_same_answers(session: Session) -> None:
    pictures = [PICTURE, OTHER]
    whole = session.respond(pictures, "what?")
    assert "".join(session.stream(pictures, "what?")) == whole
    chat = session.start(pictures)
    assert chat.ask("what?") == whole and chat.history == (("what?", whole),)
    assert chat.ask("and?") == session.respond(pictures, "and?", history=[("what?", whole)])


def test_turns_are_asked_as_they_are_trained(session: Session) -> None:
    made_by = monkey(session)
    turns = (Turn("human", "what?"), Turn("assistant", "a boat"), Turn("human", "and?"), Turn("assistant", "a car"))
    trained = made_by(Sample("k", "", "", turns, (PICTURE,)))
    asked = made_by.prompt(Sample("k", "", "", turns[:3], (PICTURE,)))
    assert (asked.ids == trained.ids[: len(asked)]).all() and (asked.slots == trained.slots[: len(asked)]).all()
    learned = trained.ids[len(asked) :].tolist()
    assert learned == made_by.tokenizer.encode("a car", eos=True)


def test_answers_keep_their_places_only_where_asked(session: Session) -> None:
    made_by = monkey(session)
    text = "<ref>what</ref><box>(10,20),(300,1000)</box> é!"
    ids = [*made_by.tokenizer.encode(text, eos=True), session.model.decoder.vocab_size - 1]
    assert made_by.decode(ids) == "what(10,20),(300,1000) é!"
    assert made_by.decode_places(ids) == text
    assert boxes_of(made_by.decode_places(ids)) == [NamedBox((10, 20, 300, 1000), "what")]
    settings = Settings(max_new_tokens=12, places=True)
    [prompt] = [made_by.prompt(Sample("session", "", "", (Turn("human", "what?"),), (PICTURE,)))]
    [own] = session.model.generate([prompt], max_new_tokens=12, stop=made_by.stop_sequences())
    assert session.respond(PICTURE, "what?", settings=settings) == made_by.decode_places(own)
    assert "".join(session.stream(PICTURE, "what?", settings=settings)) == made_by.decode_places(own)


def test_places_and_verbatim_are_refused_where_a_model_knows_neither(session: Session) -> None:
    class Plain:
        """A processor of another model."""

        decode = session.processor.decode
        stop_sequences = session.processor.stop_sequences

    with pytest.raises(ValueError, match="puts no words around"):
        Session(session.model, Plain()).respond(None, "what?", settings=Settings(verbatim=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="marks no places"):
        Session(session.model, Plain()).respond(None, "what?", settings=Settings(places=True))  # type: ignore[arg-type]


def test_a_question_is_asked_verbatim_where_wished(session: Session) -> None:
    caption = " Generate the detailed caption in English: "  # the published demo's, reference/monkey.md 5
    bare = monkey(session, question="{}")
    [prompt] = [bare.prompt(Sample("session", "", "", (Turn("human", caption),), (PICTURE,)))]
    assert bare.tokenizer.decode(prompt.ids[prompt.slots == Slot.TEXT].tolist()) == caption
    [own] = session.model.generate([prompt], max_new_tokens=8, stop=bare.stop_sequences())
    settings = Settings(max_new_tokens=8, verbatim=True)
    answer = session.respond(PICTURE, caption, settings=settings)
    assert answer == bare.decode(own) == "".join(session.stream(PICTURE, caption, settings=settings))
    assert answer != session.respond(PICTURE, caption)
    with pytest.raises(ValueError, match="verbatim has no effect with chat"):
        monkey(session, chat=True).verbatim()


def test_a_broken_picture_is_named(session: Session, tmp_path: Path) -> None:
    whole, broken = tmp_path / "a.png", tmp_path / "b.png"
    whole.write_bytes(PICTURE)
    broken.write_bytes(PICTURE[:60])
    with pytest.raises(ValueError, match=r"^picture .*b\.png: the image is damaged"):
        session.respond([whole, broken], "what?")
    with pytest.raises(ValueError, match=r"^request 2: picture .*b\.png: the image is damaged"):
        session.respond_all([Request("what?", whole), Request("what?", str(broken))])


def test_chatml_is_a_form_of_asking_with_pictures_where_they_stand(session: Session) -> None:
    made_by = monkey(session, chat=True)
    turns = (Turn("human", "what?"), Turn("assistant", "a boat"), Turn("human", "<image>and?"))
    prompt = made_by.prompt(Sample("k", "", "", (turns[0], turns[1], Turn("human", "and?")), (PICTURE,)))
    encoding = made_by.tokenizer._encoding  # type: ignore[attr-defined]
    text = encoding.decode(prompt.ids[prompt.slots == Slot.TEXT].tolist())
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<img></img>what?<|im_end|>\n"
        "<|im_start|>assistant\na boat<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert made_by.stop_sequences() == [
        made_by.tokenizer.encode(t) for t in ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    ]
    with pytest.raises(ValueError, match="asks in ChatML and teaches nothing"):
        made_by(Sample("k", "", "", turns[:2], (PICTURE,)))
    with pytest.raises(ValueError, match="must alternate"):
        made_by.prompt(Sample("k", "", "", (turns[2], turns[2]), (PICTURE,) * 2))
    with pytest.raises(ValueError, match="has no effect with chat"):
        monkey(session, chat=True, question="{}?")


def test_bad_requests_are_one_line(session: Session) -> None:
    for wrong, said in (
        (Request("<image> <image>", PICTURE), "the text has 2 pictures, the sample 1"),
        (Request("<img>a", PICTURE), "<img> has no partner"),
        (Request("what?", [PICTURE] * 30), "turn 1 of 1 does not fit"),
        (Request("<box>(1,2),(3,1001)</box>?", PICTURE), "outside 0..1000"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            session.respond_all([wrong])
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_is_asked_and_talked_to_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = making.build_node()
    run = making.run_of(tmp_path / "run", node, making.model_of(node, spread=0.5), [], making.vocabulary(tmp_path))
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "b.png").write_bytes(OTHER)
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    settings = Settings(max_new_tokens=6, places=True)
    expected = Session.from_run(run, settings=settings).respond([a, b], "<image> or <image>?")
    words = [str(run), "--max-new-tokens", "6", "--places"]
    assert main(["ask", words[0], a, "<image> or <image>?", "--image", b, *words[1:]]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    monkeypatch.setattr("sys.stdin", iter(["what?\n", "/undo\n", "what?\n"]))
    assert main(["chat", *words, "--image", a]) == 0
    told = capsys.readouterr()
    assert told.out.rstrip("\n").count(told.out.split("\n")[0]) >= 2 and not told.err


@pytest.mark.slow
@torch.no_grad()
def test_half_precision_answers_with_pictures(session: Session) -> None:
    model = making.model_of(making.build_node(), spread=0.5).to(torch.bfloat16)
    model.decoder.choose_precision()
    assert Session(model, session.processor, settings=Settings(max_new_tokens=4)).respond(PICTURE, "what?") is not None
