"""Pictures through experts and summaries: every answer is asked for once, and nothing is lost or lost sight of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from bestiary.description.crops import box_crop, segment_crop
from bestiary.description.engine import FAILURES_IN_A_ROW
from bestiary.description.experts import Folders, chosen, load
from bestiary.description.filters import Overlap
from bestiary.description.levels import Experts
from bestiary.description.tally import BudgetError
from bestiary.description.words import Mask, share_box
from bestiary.variants.monkey.tags import check_places
from tests.description.making import CALLS, File, Letters, Stripes, Writer, all_experts, engine, png

TEXTS = Experts(texts=Letters())


def files(*reds: int) -> list[File]:
    return [File(f"{red}.png", png(red)) for red in reds]


def test_all_levels_reach_the_summary_and_a_second_run_asks_nobody(tmp_path: Path) -> None:
    first = engine(tmp_path, all_experts(), writer=Writer())
    first.run(files(100, 101))
    assert (first.tally.described, first.tally.cached) == (2, 0)
    [(picture, data, found), _] = first.results(files(100, 101))
    assert (picture.name, data) == ("100.png", png(100)) and (found.summary or "").startswith("About ")
    assert found.levels.caption == "red 100"
    assert [one.caption for one in found.levels.regions] == ["left", "right"]  # 0.5 is above 0.4
    widths = [one.box[2] * 24 for one in found.levels.segments]
    assert widths == pytest.approx([23, 13], abs=0.1)  # the largest of equal captions, and one that is elsewhere
    assert [one.caption for one in found.levels.texts] == ["R100"]
    assert CALLS["pieces"] == 2 * 20 and CALLS["widths"] == 2 * (20 + 2) and CALLS["writer"] == 2

    again = engine(tmp_path, all_experts(), writer=Writer())
    again.run(files(101, 100))
    assert (again.tally.described, again.tally.cached) == (0, 2) and not CALLS
    assert again.tally.identity == first.tally.identity


def test_the_published_overlap_is_that_of_the_prompt_and_of_what_is_written(tmp_path: Path) -> None:
    found = []
    for overlap in get_args(Overlap):
        run = engine(tmp_path, all_experts(), writer=Writer(), overlap=overlap)
        run.run(files(100))
        found += [len(one.levels.segments) for _, _, one in run.results(files(100))]
    assert found == [2, 1] and CALLS["writer"] == 1


def test_another_expert_asks_anew_and_keeps_what_the_others_said(tmp_path: Path) -> None:
    engine(tmp_path, all_experts(), writer=Writer()).run(files(100))
    changed = all_experts()
    changed.captions.fingerprint = "colours, other weights"
    second = engine(tmp_path, changed, writer=Writer())
    second.run(files(100))
    assert dict(CALLS) == {"colours": 1}, "equal words make an equal prompt, whose summary is there"
    changed.segment_captions.fingerprint = "pieces, other weights"
    engine(tmp_path, changed, writer=Writer()).run(files(100))
    assert CALLS.keys() == {"stripes", "pieces"}
    writer = Writer()
    writer.fingerprint = "writer, other weights"
    engine(tmp_path, changed, writer=writer).run(files(100))
    assert dict(CALLS) == {"writer": 1}


def test_a_picture_under_two_names_is_summarised_once_and_keeps_both(tmp_path: Path) -> None:
    twice = engine(tmp_path, TEXTS, writer=Writer(), workers=1)
    names = [File(name, png(120)) for name in ("a/1.png", "b/1.png", "c/1.png")]
    twice.run(names)
    assert CALLS["writer"] == 1 and len(list(twice.results(names))) == 3


def test_a_picture_about_which_nothing_is_said_is_no_sample_and_no_failure(tmp_path: Path) -> None:
    quiet = engine(tmp_path, TEXTS, writer=Writer())
    quiet.run(files(10, 100))
    assert (quiet.tally.silent, quiet.tally.described, CALLS["writer"]) == (1, 1, 1)
    assert [found.summary is None for _, _, found in quiet.results(files(10, 100))] == [True, False]


def test_bad_pictures_are_counted_by_reason_and_end_the_run_beyond_the_budget(tmp_path: Path) -> None:
    bad = [File("gone.png", None), File("cut.png", png(100)[:50]), *files(255)]
    run = engine(tmp_path, TEXTS, allowed=3)
    run.run([*bad, *files(100)])
    assert run.tally.reasons == {"unreadable": 2, "refused by an expert": 1} and run.tally.described == 1
    assert [picture.name for picture, _, _ in run.results([*bad, *files(100)])] == ["100.png"]
    with pytest.raises(BudgetError, match=r"2 are allowed \(--bad-budget\); the last: .*png: "):
        engine(tmp_path, TEXTS, allowed=2).run(bad)


def test_a_summary_that_failed_stays_pending_until_the_next_run(tmp_path: Path) -> None:
    first = engine(tmp_path, TEXTS, writer=Writer(down=1), workers=1)
    first.run(files(100, 101, 102))
    assert (first.tally.pending, first.tally.described) == (1, 2)
    again = engine(tmp_path, TEXTS, writer=Writer())
    again.run(files(100, 101, 102))
    assert (again.tally.described, again.tally.cached, dict(CALLS)) == (1, 2, {"writer": 1})


def test_a_summariser_that_is_down_is_let_alone_while_the_experts_go_on(tmp_path: Path) -> None:
    down = engine(tmp_path, TEXTS, writer=Writer(down=1000), workers=1)
    down.run(files(*range(100, 150)))
    assert down.tally.pending == 50 and CALLS["letters"] == 50
    assert FAILURES_IN_A_ROW <= CALLS["writer"] < FAILURES_IN_A_ROW + 10
    assert "too many failed" in down.tally.last_postponed


def test_a_summariser_that_answers_now_and_then_is_not_let_alone(tmp_path: Path) -> None:
    writer = Writer()
    run = engine(tmp_path, TEXTS, writer=writer)
    few = FAILURES_IN_A_ROW - 1
    for first, number, writer.down in ((100, few, 1000), (110, 1, 0), (120, few, 1000), (130, 1, 0)):
        run.run(files(*range(first, first + number)))
    assert (run.tally.described, run.tally.pending) == (2, 2 * few)


@pytest.mark.parametrize(
    ("says", "tag"),
    [
        ("A dog <image> here.", "<image>"),
        ("A dog <img> here.", "<img>"),
        ("A dog </img> here.", "</img>"),
        ("A sign. <imgpad> and <ref>x", "<imgpad>"),
        ("A <ref>dog.", "<ref>"),
        ("A dog</box>.", "</box>"),
        ("<ref>a <ref>dog</ref>", "<ref>"),
        ("<ref>a dog<box>(1,2),(3,4)</box></ref>", "<ref>"),
        ("A dog <box>left</box>", "<box>"),
        ("A dog <box>(1,2),(3,1001)</box>", "<box>"),
        ("A dog <quad>(1,2),(3,4)</quad>", "<quad>"),
    ],
)
def test_a_summary_with_a_tag_that_no_sample_may_hold_is_refused_and_not_kept(
    tmp_path: Path, says: str, tag: str
) -> None:
    run = engine(tmp_path, TEXTS, writer=Writer(says=says), allowed=1)
    run.run(files(100))
    assert run.tally.reasons == {"refused by the summariser": 1} and f"holds {tag}," in run.tally.problems[0][2]
    assert not (tmp_path / "summaries").exists()


def test_whole_names_and_places_stay_and_a_kept_summary_that_no_sample_may_hold_is_made_again(tmp_path: Path) -> None:
    whole = "<ref>a\ndog</ref><box>(0,2),(3,1000)</box> < 3 <b> <quad>(1,2),(3,4),(5,6),(7,8)</quad> <ref></ref> <REF>"
    run = engine(tmp_path, TEXTS, writer=Writer(says=whole))
    run.run(files(100))
    assert [found.summary for _, _, found in run.results(files(100))] == [whole]
    check_places(whole)
    [kept] = (tmp_path / "summaries").rglob("*.json")
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "answer": "<imgpad>"}))
    again = engine(tmp_path, TEXTS, writer=Writer())
    again.run(files(100))
    assert CALLS["writer"] == 1 and again.tally.described == 1


@pytest.mark.parametrize("content", [b'{"key": ', b'{"key": ["of another picture"], "answer": []}'])
def test_a_damaged_answer_in_the_cache_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    engine(tmp_path, TEXTS).run(files(100))
    [path] = (tmp_path / "texts").rglob("*.json")
    path.write_bytes(content)
    second = engine(tmp_path, TEXTS)
    second.run(files(100))
    assert CALLS["letters"] == 1 and path.name in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))


def test_segments_are_cut_out_over_white_and_boxes_hold_at_least_a_pixel() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    pixels = np.zeros((4, 4), bool)
    pixels[1, 1] = pixels[2, 2] = True
    crop = segment_crop(picture, Mask(pixels))
    assert crop.shape == (2, 2, 3) and (crop[0, 1] == 255).all() and (crop[1, 1] == picture[2, 2]).all()
    assert share_box(Mask(pixels).box, 4, 4) == (0.25, 0.25, 0.75, 0.75)
    assert box_crop(picture, (0.999, 1.0, 1.0, 1.0)).shape == (1, 1, 3)
    assert box_crop(picture, (-0.1, 0.0, 1.2, 1.0)).shape == (4, 4, 3)
    with pytest.raises(ValueError, match="holds no pixel"):
        _ = Mask(np.zeros((4, 4), bool)).box
    with pytest.raises(ValueError, match="cut it from this picture"):
        segment_crop(picture[:2], Mask(pixels))


def test_experts_that_lack_something_or_are_unknown_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'regions'"):
        chosen("ocr,region")
    with pytest.raises(ValueError, match="no expert"):
        chosen(" ,")
    with pytest.raises(ValueError, match="'regions' needs --regions FOLDER"):
        load(("regions",), Folders(matcher=tmp_path))
    with pytest.raises(ValueError, match="has no effect"):
        load(("captions",), Folders(captioner=tmp_path, masks=tmp_path))
    with pytest.raises(ValueError, match="matcher"):
        Experts(regions=all_experts().regions)
    with pytest.raises(ValueError, match="segments take both"):
        Experts(masks=Stripes())
