"""Sessions with a real, untrained SPHINX-V: what an answer depends on, and what is said of bad requests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from bestiary.inference.pictures import box, point
from bestiary.inference.session import PUBLISHED, Request, Session, Settings
from bestiary.schema import Region, Sample, Turn

from .tiny import tiny_session

RED, BLUE = Image.new("RGB", (30, 20), (200, 10, 10)), Image.new("RGB", (16, 40), (10, 10, 200))
RAGGED = [
    Request("Hi my darling"),
    Request("What is <Mark 1>?", RED, [point(3, 4)], "pixels"),
    Request("And?", RED, history=[("What is it?", "A red cat."), ("Sure?", "Yes, quite. " * 3)]),
    Request(
        "Where are <Region 1> and <Region 2>? " * 2, BLUE, [box(0.1, 0.1, 0.5, 0.5), point(0.5, 0.75)], "fractions"
    ),
    Request("?", RED),
    Request("Hi my darling"),
]
SAMPLED = Settings(max_new_tokens=10, temperature=0.9, top_p=0.95, seed=3)


@pytest.fixture
def session() -> Session:
    return tiny_session()


@pytest.mark.parametrize("settings", [Settings(max_new_tokens=10), SAMPLED, replace(PUBLISHED, max_new_tokens=10)])
@pytest.mark.parametrize("batch_size", [pytest.param(64, marks=pytest.mark.slow), 4])
def test_answers_of_a_ragged_batch_are_those_given_one_by_one(
    session: Session, settings: Settings, batch_size: int
) -> None:
    together = session.respond_all(RAGGED, settings=settings, batch_size=batch_size)
    alone = [session.respond_all([request], settings=settings)[0] for request in RAGGED]
    assert together == alone
    assert len(set(alone)) > 3 and all(alone)
    assert together[0] == together[5], "equal requests with equal seeds have equal answers"


def test_each_request_may_have_a_seed_of_its_own(session: Session) -> None:
    requests = [replace(RAGGED[1], seed=seed) for seed in (1, 2, 3, 1)]
    answers = session.respond_all(requests, settings=SAMPLED)
    assert answers[0] == answers[3] and len(set(answers)) == 3
    assert answers[2] == session.respond_all([RAGGED[1]], settings=SAMPLED)[0], "None takes the settings' seed"


@pytest.mark.parametrize("request_", RAGGED[:4])
@pytest.mark.parametrize("settings", [Settings(max_new_tokens=24), SAMPLED])
def test_streamed_pieces_are_the_whole_answer(session: Session, request_: Request, settings: Settings) -> None:
    asked = (request_.image, request_.question, request_.regions)
    more: dict[str, Any] = {"frame": request_.frame, "history": request_.history, "settings": settings}
    got = list(session.stream(*asked, **more))
    assert "".join(got) == session.respond(*asked, **more)
    assert len(got) > 1


def test_a_stop_text_ends_the_answer_and_the_work(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = session.respond(RED, "What?", max_new_tokens=24)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    settings = Settings(max_new_tokens=24, stop=(stop, "never said"))
    steps: list[int] = []
    run_step = session.model.decoder.run_step

    def counted(*given: Any) -> Any:
        steps.append(1)
        return run_step(*given)

    monkeypatch.setattr(session.model.decoder, "run_step", counted)
    assert session.respond(RED, "What?", max_new_tokens=24) == whole
    needed = len(steps)
    assert session.respond(RED, "What?", settings=settings) == whole[: whole.index(stop)].rstrip()
    assert 0 < len(steps) - needed < needed
    cut, other = session.respond_all([Request("What?", RED), Request("What?", BLUE)], settings=settings)
    assert cut == whole[: whole.index(stop)].rstrip() != other
    assert "".join(session.stream(RED, "What?", settings=settings)) == cut
    with pytest.raises(ValueError, match="tuple of texts"):
        Settings(stop=("\n",))


def test_nothing_the_caller_gives_is_changed(session: Session) -> None:
    regions, history = [point(3, 4), box(1, 2, 9, 9)], [("first?", "yes")]
    ready = [Region("point", (0.5, 0.5), 1)]
    image = RED.copy()
    requests = [Request("a", image, regions, "pixels", history), Request("b", image, ready)]
    kept = copy.deepcopy([regions, history, ready, image, requests])
    first = session.respond_all(requests, max_new_tokens=4)
    assert session.respond_all(requests, max_new_tokens=4) == first
    chat = session.start(image, regions, frame="pixels")
    list(chat.stream("a", max_new_tokens=4))
    assert kept == [regions, history, ready, image, requests]
    assert [r.image is image for r in requests] == [True, True]


def test_a_chat_is_a_history_that_grows_by_whole_exchanges(session: Session) -> None:
    chat = session.start(RED, [point(3, 4)], frame="pixels", settings=Settings(max_new_tokens=6))
    first = chat.ask("What is <Mark 1>?")
    begun = chat.stream("Sure?")
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert chat.history == (("What is <Mark 1>?", first),)
    second = chat.ask("Sure?")
    history = [("What is <Mark 1>?", first)]
    asked = session.respond(RED, "Sure?", [point(3, 4)], frame="pixels", history=history, max_new_tokens=6)
    assert second == asked
    chat.undo()
    assert chat.ask("Sure?") == second and len(chat.history) == 2
    with pytest.raises(ValueError, match="no exchange"):
        session.start().undo()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request("What is in the <image>?"), "the sample has none"),
        (Request("What is <Mark 1>?", RED, [point(31, 4)], "pixels"), "outside the image"),
        (Request("What is <Mark 1>?", RED, [box(0.5, 0.5, 0.4, 0.9)], "fractions"), "x0 < x1"),
        (Request("What is <Mark 2>?", RED, [point(3, 4)], "pixels"), "'<Mark 2>'"),
        (Request("What is <Mark 1>?", None, [point(0.5, 0.4)], "fractions"), "no image"),
        (Request(" \n"), "write what is to be answered"),
        (Request("What?", b"no picture"), "give a JPEG"),
        (Request("What?", "no/such.jpg"), "no such file"),
        (Request("What?", history=[("a", None)]), "exchange 1"),  # type: ignore[list-item]
    ],
)
@pytest.mark.parametrize("ask", ["alone", "stream", "batch"])
def test_a_bad_request_is_one_line(session: Session, request_: Request, said: str, ask: str) -> None:
    r = request_
    more: dict[str, Any] = {"frame": r.frame, "history": r.history}
    asking: dict[str, Callable[[], object]] = {
        "alone": lambda: session.respond(r.image, r.question, r.regions, **more),
        "stream": lambda: session.stream(r.image, r.question, r.regions, **more),
        "batch": lambda: session.respond_all([RAGGED[0], r]),
    }
    with pytest.raises(ValueError, match=said) as error:
        asking[ask]()
    assert "\n" not in str(error.value) and "sample session" not in str(error.value)
    assert str(error.value).startswith("request 2: ") == (ask == "batch")


def test_a_conversation_that_is_too_long_names_the_turn_it_ends_at(session: Session) -> None:
    history = [("a", "b"), ("c", "long " * 60), ("long " * 150, "e")]
    with pytest.raises(ValueError, match=r"^turn 3 of 4 does not fit: .* takes \d{3} positions .* in 400;") as error:
        session.respond(RED, "And?", history=history)
    with pytest.raises(ValueError) as alone:
        session.respond(RED, history[2][0], history=history[:2])
    assert str(alone.value) == str(error.value).replace("3 of 4", "3 of 3")
    with pytest.raises(ValueError, match=r"^turn 1 of 1 does not fit"):
        session.respond(RED, "long " * 400)
    with pytest.raises(ValueError, match=r"^request 1: turn 2 of 2"):
        session.respond_all([Request("long " * 300, history=history[:1]), Request("a")])


def test_a_prompt_that_fills_every_position_leaves_no_room_for_an_answer(session: Session) -> None:
    def length(words: int) -> int:
        return len(session.processor.prompt(Sample("k", "s", "", (Turn("human", "a " * words),))))

    words = next(n for n in range(200, 400) if length(n) == session.model.decoder.max_positions - 1)
    session.respond(None, "a " * words, max_new_tokens=5)
    with pytest.raises(ValueError, match="turn 1 of 1 does not fit: with it the prompt takes 400 positions"):
        session.respond(None, "a " * (words + 1), max_new_tokens=5)
