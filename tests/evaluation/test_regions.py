from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bestiary.evaluation import regions as regions_module
from bestiary.evaluation.regions import RegionsBenchmark
from bestiary.evaluation.report import Report
from bestiary.schema import SampleError, Turn

from .scenes import Scene, StandInModel, StandInProcessor, scene

SCENES = [scene(i, task=("label", "label", "ocr")[i % 3]) for i in range(30)]


def run(out: Path, scenes: list[Scene] = SCENES, model: StandInModel | None = None, **settings: object) -> Report:
    arguments: dict[str, object] = {"semantic_similarity": False, "panel_pictures": 0} | settings
    benchmark = RegionsBenchmark(**arguments)  # type: ignore[arg-type]
    return benchmark.run(model or StandInModel(scenes), StandInProcessor(), [s.sample for s in scenes], out)  # type: ignore[arg-type]


def test_a_model_that_reads_its_prompts_beats_the_control(tmp_path: Path) -> None:
    report = run(tmp_path)
    accuracy = report.metrics["accuracy"]
    assert accuracy.value == 1.0
    assert accuracy.control is not None and accuracy.control < 0.6
    assert accuracy.n == sum(len(s.sample.regions) for s in SCENES)
    assert accuracy.gain_interval is not None and accuracy.gain_interval.low > 0.3


def test_a_prompt_blind_model_scores_the_same_with_the_control(tmp_path: Path) -> None:
    accuracy = run(tmp_path, model=StandInModel(SCENES, is_blind=True)).metrics["accuracy"]
    assert 0 < accuracy.value < 1
    assert accuracy.control == accuracy.value


def test_report_json_has_the_promised_form(tmp_path: Path) -> None:
    run(tmp_path / "eval" / "regions")
    report = json.loads((tmp_path / "eval" / "regions" / "report.json").read_text())
    accuracy = report["metrics"]["accuracy"]
    assert {"value", "n", "control", "by_domain", "by_kind", "by_task", "by_marks"} <= accuracy.keys()
    assert set(accuracy["by_domain"]) == {"document", "natural"}
    assert set(accuracy["by_kind"]) == {"point", "box", "stroke"}
    assert {"value", "n", "control"} <= accuracy["by_domain"]["natural"].keys()
    for group in ("by_domain", "by_kind", "by_task", "by_marks"):
        parts = accuracy[group].values()
        assert sum(part["n"] for part in parts) == accuracy["n"]
        total = sum(part["n"] * part["control"] for part in parts)
        assert total == pytest.approx(accuracy["n"] * accuracy["control"], abs=1e-3)
    assert report["metrics"]["ocr_accuracy"]["n"] == accuracy["by_task"]["ocr"]["n"]


def test_predictions_hold_a_line_for_every_picture(tmp_path: Path) -> None:
    run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [s.sample.key for s in SCENES]
    first = lines[0]
    assert first["reference"] == SCENES[0].sample.turns[1].text == first["prediction"]
    assert first["marks"][0]["is_correct"] and first["regions"][0]["mark"] == 1
    changed = sum(line["control_regions"] != line["regions"] for line in lines)
    assert changed > len(lines) / 2  # the scenes share four places, so some donors agree by chance
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_regions_left_out_are_wrong_and_counted(tmp_path: Path) -> None:
    report = run(tmp_path, model=StandInModel(SCENES, forget_last=True))
    regions = sum(len(s.sample.regions) for s in SCENES)
    assert report.counts["missing_regions"] == len(SCENES)
    assert report.metrics["accuracy"].value == pytest.approx((regions - len(SCENES)) / regions)


def test_the_model_sees_the_question_and_nothing_else(tmp_path: Path) -> None:
    processor = StandInProcessor()
    benchmark = RegionsBenchmark(semantic_similarity=False, panel_pictures=0)
    benchmark.run(StandInModel(SCENES), processor, [s.sample for s in SCENES], tmp_path)  # type: ignore[arg-type]
    assert len(processor.seen) == 2 * len(SCENES)
    assert all(len(s.turns) == 1 and s.turns[0].role == "human" and not s.meta for s in processor.seen)


def test_training_mode_is_given_back_part_by_part(tmp_path: Path) -> None:
    model = StandInModel(SCENES).train()
    model.part.eval()
    run(tmp_path, model=model, batch_size=7)
    assert not model.was_training
    assert model.training and not model.part.training
    assert model.batch_sizes == [7, 7, 7, 7, 2] * 2


def test_a_limited_run_draws_evenly_over_the_domains(tmp_path: Path) -> None:
    lopsided = [s for i, s in enumerate(SCENES) if i % 2 or i < 8]
    reports = [run(tmp_path / name, lopsided, max_samples=8) for name in "ab"]
    domains = [p.domain for p in reports[0].predictions]
    assert domains.count("natural") == domains.count("document") == 4
    assert reports[0].predictions == reports[1].predictions


def test_pictures_without_regions_are_left_out_and_counted(tmp_path: Path) -> None:
    plain = Scene(replace(SCENES[0].sample, key="plain", regions=()), SCENES[0].names)
    assert run(tmp_path, [*SCENES, plain]).counts["left_out_without_regions"] == 1
    with pytest.raises(ValueError, match="none of 1 samples has a region"):
        run(tmp_path, [plain])


def test_a_lone_picture_is_scored_and_the_missing_control_stated(tmp_path: Path) -> None:
    report = run(tmp_path, SCENES[:1])
    assert report.metrics["accuracy"].control is None
    assert "control" in report.notes[0]
    assert json.loads((tmp_path / "report.json").read_text())["metrics"]["accuracy"]["control"] is None


def test_a_plain_answer_about_the_only_region_is_read_whole(tmp_path: Path) -> None:
    turns = (Turn("human", "What is <Mark 1>?"), Turn("assistant", "Mark 1 shows a cup"))
    samples = [replace(scene(i, num_marks=1).sample, turns=turns, meta={"task": "label"}) for i in (0, 3)]
    report = run(tmp_path, [Scene(s, ("cup",) * 4) for s in samples])
    assert report.metrics["accuracy"].n == 2
    assert report.metrics["accuracy"].value == 0.0


def test_an_answer_about_an_unknown_mark_names_the_sample(tmp_path: Path) -> None:
    bad = replace(SCENES[0].sample, turns=(SCENES[0].sample.turns[0], Turn("assistant", "Mark 7: cup")))
    with pytest.raises(SampleError, match=r"scene-000.*mark 7.*\[1\]"):
        run(tmp_path, [Scene(bad, SCENES[0].names), SCENES[1]])


def test_a_conversation_without_an_answer_names_the_sample(tmp_path: Path) -> None:
    bad = Scene(replace(SCENES[0].sample, turns=SCENES[0].sample.turns[:1]), SCENES[0].names)
    with pytest.raises(SampleError, match="scene-000: has human"):
        run(tmp_path, [bad, SCENES[1]])


def test_the_panel_and_the_table_show_the_same_pictures(tmp_path: Path) -> None:
    report = run(tmp_path, panel_pictures=4)
    assert report.panel == tmp_path / "panel.png"
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.width == 3 * 424 + 4 * 12
    assert len(report.table_rows) == 4
    assert all(len(row) == len(report.table_columns) for row in report.table_rows)
    assert {row[1].split(" ")[0] for row in report.table_rows} == {"natural", "document"}


def test_without_the_extra_similarity_is_left_out_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions_module, "packaged_model", lambda: None)
    report = run(tmp_path, semantic_similarity="auto")
    assert "semantic_similarity" not in report.metrics
    assert any("extra `eval`" in note for note in report.notes)
    monkeypatch.setattr("bestiary.evaluation.semantic.packaged_model", lambda: None)
    with pytest.raises(ValueError, match="extra `eval`"):
        run(tmp_path, semantic_similarity=True)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"max_samples": -1}, {"semantic_similarity": "yes"}])
def test_wrong_arguments_are_refused(settings: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        run(tmp_path, **settings)


def test_the_table_shows_score_and_control_side_by_side(tmp_path: Path) -> None:
    report = run(tmp_path)
    lines = report.table().splitlines()
    assert lines[0].split() == ["score", "95", "%", "control", "n"]
    assert lines[1].startswith("accuracy") and "1.000" in lines[1]
    scalars = report.scalars()
    assert scalars["accuracy/domain/natural"] == 1.0
    assert scalars["accuracy/control"] == report.metrics["accuracy"].control


@pytest.mark.slow
def test_similarity_of_right_answers_is_one(tmp_path: Path) -> None:
    similarity = run(tmp_path, semantic_similarity=True).metrics["semantic_similarity"]
    assert similarity.value == pytest.approx(1.0, abs=1e-5)
    assert similarity.control is not None and similarity.control < 0.9
