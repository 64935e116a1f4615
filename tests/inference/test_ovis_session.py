"""Sessions with a real, untrained Ovis: several pictures, batches, streams, beams, and greedy by default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bestiary.cli import main
from bestiary.inference import Request, Session, Settings, point
from bestiary.schema import Sample, Slot, Turn
from bestiary.weights.importing import Asked, import_weights
from tests.variants.test_ovis import MARKS, picture, processor, tiny
from tests.weights import ovis_making as making

WIDE, TALL = picture(55, 18), picture(15, 60, seed=1)
BEAMS = Settings(max_new_tokens=8, num_beams=3)


@pytest.fixture(scope="module", params=["1.0", pytest.param("1.6", marks=pytest.mark.slow)])
def session(request: pytest.FixtureRequest) -> Session:
    model = tiny(request.param)
    with torch.no_grad():  # far from even odds, so that rounding decides nothing and pictures matter
        for parameter in model.parameters():
            parameter.normal_(std=0.5) if parameter.dim() > 1 else None
    return Session(model.eval(), processor(model, request.param), settings=Settings(max_new_tokens=8))


def requests() -> list[Request]:
    return [
        Request("What?", WIDE),
        Request("<image> or <image>?", [WIDE, TALL]),
        Request("Which?", (TALL, WIDE, TALL)),
        Request("How many?"),
        Request("And?", TALL, history=[("What is it?", "A boat.")]),
    ]


@pytest.mark.parametrize("settings", [Settings(max_new_tokens=8), BEAMS])
def test_answers_of_a_batch_with_any_number_of_pictures_are_those_given_one_by_one(
    session: Session, settings: Settings
) -> None:
    together = session.respond_all(requests(), settings=settings, batch_size=8)
    assert together == [session.respond_all([one], settings=settings)[0] for one in requests()]
    assert len(set(together)) > 2


def test_streams_and_chats_give_the_same_answers(session: Session) -> None:
    pictures = [WIDE, TALL]
    whole = session.respond(pictures, "What?")
    assert "".join(session.stream(pictures, "What?")) == whole
    chat = session.start(pictures)
    assert chat.ask("What?") == whole and chat.history == (("What?", whole),)


def test_a_beam_search_of_one_is_the_greedy_answer_and_more_may_differ(session: Session) -> None:
    greedy = session.respond_all(requests())
    assert session.respond_all(requests(), settings=Settings(max_new_tokens=8, num_beams=1)) == greedy
    assert session.respond_all(requests(), settings=Settings(max_new_tokens=8, num_beams=6)) != greedy


def test_beams_answer_whole_and_never_as_a_stream(session: Session) -> None:
    with pytest.raises(ValueError, match="num_beams=3 cannot stream") as error:
        session.stream(WIDE, "What?", settings=BEAMS)
    assert "\n" not in str(error.value)
    chat = session.start(WIDE, settings=BEAMS)
    assert chat.ask("What?") == session.respond(WIDE, "What?", settings=BEAMS)
    assert len(chat.history) == 1
    for wrong in ({"num_beams": 0}, {"num_beams": 2, "temperature": 0.5}):
        with pytest.raises(ValueError, match="num_beams"):
            Settings(**wrong)  # type: ignore[arg-type]


def test_each_picture_is_looked_at_once_however_many_beams_there_are(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, seen = session.model.vision, []
    assert vision is not None
    handle = vision.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    session.respond_all([Request("What?", WIDE), Request("Which?", WIDE)], settings=BEAMS)
    handle.remove()
    assert len(seen) == 1, "one call for the batch"
    prompt = session.processor.prompt(Sample("k", "", "", (Turn("human", "Which?"),), (WIDE,)))
    assert seen == [len(prompt.pixels)], "equal pictures once"


@pytest.mark.parametrize("version", MARKS)
def test_a_question_without_a_tag_stands_behind_its_pictures_as_the_runner_writes_it(version: str) -> None:
    model = tiny(version)
    made_by = processor(model, version)
    query = "<image> " if version == "1.0" else "<image>\n"
    plain, written = (Sample("k", "", "", (Turn("human", text),), (WIDE,)) for text in ("What?", f"{query}What?"))
    one, other = made_by.prompt(plain), made_by.prompt(written)
    assert (one.ids == other.ids).all() and (one.slots == Slot.IMAGE).any()


def test_bad_requests_are_one_line(session: Session) -> None:
    for wrong, said in (
        (Request("<image> <image>", WIDE), "2 <image> for 1 pictures"),
        (Request("What?", [WIDE, "no/such.png"]), "no such file"),
        (Request("What?", [WIDE, TALL], [point(1, 2)], "pixels"), "marks on 2 pictures"),
        (Request("What?", 3), "not int"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=said) as error:
            session.respond_all([wrong])
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_published_folder_that_samples_is_asked_greedily_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = making.publish(tmp_path / "in", making.CASES[0].values[0])
    assert json.loads((published / "generation_config.json").read_text())["do_sample"]
    import_weights([published], tmp_path / "ours", Asked())
    (tmp_path / "a.png").write_bytes(WIDE)
    (tmp_path / "b.png").write_bytes(TALL)
    settings = Session.from_weights(tmp_path / "ours").settings
    assert (settings.temperature, settings.max_new_tokens, settings.num_beams) == (0.0, 512, 1)
    words = ["ask", str(tmp_path / "ours"), str(tmp_path / "a.png"), "<image> or <image>?"]
    words += ["--image", str(tmp_path / "b.png"), "--max-new-tokens", "6"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert main([*words, "--seed", "5"]) == 0 and capsys.readouterr().out == first
    assert main([*words, "--beams", "3"]) == 0
