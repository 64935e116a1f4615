from __future__ import annotations

import pytest

from bestiary.evaluation.short_answers import (
    anls,
    exact_match,
    levenshtein,
    mme_label,
    mme_scores,
    relaxed_match,
    vqa_score,
    vqa_text,
)


def test_exact_match_keeps_decimal_points_where_the_published_rule_drops_them() -> None:
    assert exact_match("Yes.", " yes") and exact_match("A.", "a")
    assert not exact_match("1.5", "15")
    assert exact_match("1.5", "15", reference_quirks=True)


def test_a_number_within_five_percent_of_any_truth_is_right() -> None:
    assert relaxed_match(" 10.5 ", ["7", "10"]) and not relaxed_match("10.6", ["10"])
    assert relaxed_match("-9.5", ["-10"]) and relaxed_match("5%", ["0.05"])
    assert not relaxed_match("nan", ["3"]) and not relaxed_match("%", ["3"])
    assert relaxed_match("Red", ["red"]) and not relaxed_match("0.0", ["0"])


def test_the_tolerance_is_a_share_of_the_truth_or_as_monkey_published_of_the_answer() -> None:
    assert not relaxed_match("12.61", ["12"]) and relaxed_match("12.61", ["12"], relative_to="answer")
    assert relaxed_match("11.4", ["12"]) and not relaxed_match("11.4", ["12"], relative_to="answer")
    assert relaxed_match("0", ["0.0", "0"], relative_to="answer") and not relaxed_match("0.0", ["0"])
    with pytest.raises(ValueError, match="relative_to='truths' is unknown; choose one of truth, answer"):
        relaxed_match("1", ["1"], relative_to="truths")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two dogs!", "2 dogs"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("red/blue", "red blue"),
        ("1,000 miles", "1000 miles"),
        ("U.S.A. at 3.5", "usa at 3.5"),
        ("a\nb\tc", "b c"),
        ("", ""),
    ],
)
def test_vqa_text_is_normal(text: str, normal: str) -> None:
    assert vqa_text(text) == normal


def test_three_agreeing_people_make_a_vqa_answer_right() -> None:
    people = ["Blue"] * 4 + ["red"] * 6
    assert vqa_score("blue", people) == pytest.approx(1.0)
    assert vqa_score("blue", ["blue"] * 3 + ["red"] * 7) == pytest.approx(0.9)
    assert vqa_score("green", people) == 0.0
    # The published rule leaves the people's letter case: nobody said "blue".
    assert vqa_score("blue", people, reference_quirks=True) == 0.0


def test_questions_without_truths_are_errors() -> None:
    with pytest.raises(ValueError, match="no truth to compare 'x' with"):
        vqa_score("x", [])
    with pytest.raises(ValueError, match="no truth to compare 'x' with"):
        anls("x", [])


def test_anls_forgives_few_letters_and_cuts_at_the_threshold() -> None:
    assert anls("hello wrld", ["Hello  World"]) == pytest.approx(1 - 1 / 12)
    assert anls("abcd", ["abxy"]) == 0.5 and anls("abcd", ["axyz"]) == 0.0
    kept = {
        ("New\nYork", "New York"): 1 - 1 / 8,
        ("ab  cd", "abcd"): 1 - 2 / 6,
        (" A b ", "a B"): 1.0,
        ("\u00df", "a"): 0.0,
    }
    assert all(anls(a, [t], spacing="kept") == pytest.approx(value) for (a, t), value in kept.items())
    assert anls("b", ["ab  "], spacing="kept") == 1 - 1 / 4
    with pytest.raises(ValueError, match="spacing='odd'; choose loose, kept"):
        anls("a", ["a"], spacing="odd")  # type: ignore[arg-type]
    assert anls("a", ["a  "], spacing="kept") == 1.0 and anls("", [""], spacing="kept") == 1.0
    assert anls("", [""]) == 1.0 and anls("b", ["aaaa", "b"]) == 1.0


def test_levenshtein_counts_edits_both_ways() -> None:
    for a, b, distance in (("kitten", "sitting", 3), ("", "abc", 3), ("same", "same", 0), ("ab", "ba", 2)):
        assert levenshtein(a, b) == levenshtein(b, a) == distance


def test_mme_reads_the_first_four_letters() -> None:
    answers = ["Yes", "no.", "nope", "the answer is no", ""]
    assert [mme_label(answer) for answer in answers] == ["yes", "no", "no", "other", "other"]


def test_mme_plus_wants_both_questions_of_a_picture() -> None:
    scores = mme_scores(["yes", "no", "yes", "no"], ["yes", "no", "yes", "other"])
    assert (scores.accuracy, scores.accuracy_plus, scores.score) == (0.75, 0.5, 125.0)
    assert scores.num_other == 1 and scores.precision == scores.recall == 1.0
    none = mme_scores(["no"], ["no"])
    assert none.precision == none.recall == 0.0


def test_mme_refuses_what_is_no_task() -> None:
    with pytest.raises(ValueError, match="1 truths and 2 answers"):
        mme_scores(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="'maybe' is neither"):
        mme_scores(["maybe"], ["yes"])
