from __future__ import annotations

from pathlib import Path

import pytest

from bestiary.evaluation.judge import FAILED, gpt_format, parse_score, review_name, summarise


@pytest.mark.parametrize(
    ("review", "ours", "published"),
    [
        ("8 7\nBecause", (8.0, 7.0), (8.0, 7.0)),
        ("7, 6", (7.0, 6.0), FAILED),
        ("6\t7 ", (6.0, 7.0), FAILED),
        ("Assistant 1: 8", None, FAILED),
        ("8 good", None, FAILED),
        ("", None, FAILED),
    ],
)
def test_scores_are_read_in_any_spacing(review: str, ours: object, published: object) -> None:
    assert parse_score(review) == ours
    assert parse_score(review, reference_quirks=True) == published


def test_failed_reviews_are_left_out_of_the_mean() -> None:
    reviews = [
        {"category": "b", "tuple": [10, 5]},
        {"category": "a", "tuple": [8, 8]},
        {"category": "b", "tuple": None},
        {"category": "b", "tuple": [-1, -1]},
    ]
    assert summarise(reviews) == {"all": 72.22, "a": 100.0, "b": 50.0}
    assert list(summarise(reviews)) == ["all", "a", "b"]
    with pytest.raises(ValueError, match="no judge review"):
        summarise([{"category": "a", "tuple": None}])


def test_results_find_their_question_by_image_and_id() -> None:
    def item(i: int) -> dict[str, object]:
        return {"image_name": f"{i}.jpg", "question_id": i, "question": "?", "dataset_name": "web_QA_point"} | {
            "points": [[i, i]]
        }

    results = [{"image_name": f"{i}.jpg", "question_id": i, "prediction": f"p{i}", "answer": f"a{i}"} for i in (2, 1)]
    lists = gpt_format([item(1), item(2)], results)
    assert [row["text"] for row in lists["prediction"]] == ["p1", "p2"]
    assert lists["question"][0]["annotation"] == {"points": [[1, 1]], "segmentation": []}
    with pytest.raises(ValueError, match=r"question 1 on 1\.jpg \(1 of 2 missing\)"):
        gpt_format([item(1), item(2)], results[:1])


def test_a_review_file_lends_its_name() -> None:
    assert review_name(Path("x/gpt4_text_natural.jsonl")) == "natural"
