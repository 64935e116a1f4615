"""Scores of answers of a few words: exact, relaxed, VQA accuracy, ANLS, and MME's yes and no.

Pure functions on strings, each the rule its benchmark publishes. Where SPHINX's evaluation (LLaMA2-Accessory @ 3777c43,
accessory/eval_mm) scores otherwise, `reference_quirks=True` scores as it does. `contains` and `gqa_words` are Monkey's
(reference/monkey.md, section 5).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from bestiary.evaluation.scorers import is_exact

RelativeTo = Literal["truth", "answer"]
RELATIVE_TO = get_args(RelativeTo)
Spacing = Literal["loose", "kept"]
SPACINGS = get_args(Spacing)

# Words that VQA's normalisation writes with their apostrophe, whatever single one was forgotten (visualqa.org).
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the published table has this one the wrong way round
_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_DIGITS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_QUIRK_MAX_PERIODS = 32
"""The published call hands `re.UNICODE`, 32, over as the number of replacements."""


def exact_match(answer: str, truth: str, *, reference_quirks: bool = False) -> bool:
    """Whether the answer is the truth, but for letter case, spacing and a final period.

    reference_quirks: all periods are dropped, so that `1.5` is `15`, and inner spacing counts.
    """
    if reference_quirks:
        ours, true = (text.replace(".", "").strip().lower() for text in (answer, truth))
        return ours == true
    return is_exact(answer.strip().removesuffix("."), truth.strip().removesuffix("."))


def contains(answer: str, truth: str) -> bool:
    """Whether the truth is part of the answer, which loses its periods first: what Monkey's evaluation calls accuracy.

    So `cat` is in `concatenate`, a truth with a period is in nothing, and an empty one in everything.
    """
    return truth.strip().lower() in answer.strip().lower().replace(".", "")


def gqa_words(answer: str) -> str:
    """What Monkey's evaluation leaves of an answer to a GQA question before `contains` looks at it.

    The answer up to its first full stop, comma and exclamation mark; then, one after the other, what stands between the
    first two of `is `, of `are `, of the articles, wherever these letters occur; and what stands before ` of`.
    """
    text = answer.strip().split(".")[0].split(",")[0].split("!")[0].lower()
    for letters in ("is ", "are ", "a ", "an ", "the "):
        if letters in text:
            text = text.split(letters)[1]
    return text.split(" of")[0].strip()


def relaxed_match(
    answer: str, truths: Sequence[str], *, tolerance: float = 0.05, relative_to: RelativeTo = "truth"
) -> bool:
    """ChartQA's rule: a number within 5 % of one of the truths, or the same text but for letter case.

    `45%` is the number 0.45; a truth of 0 and numbers with thousands separators are compared as text.
    relative_to: "answer" takes 5 % of the answer, and compares an answer of 0 as text, which is what Monkey's published
        evaluation scores: it hands the two over in the other order (so 12.61 is within 5 % of 12).
    """
    if relative_to not in RELATIVE_TO:
        raise ValueError(f"relative_to={relative_to!r} is unknown; choose one of {', '.join(RELATIVE_TO)}")
    said = answer.strip()
    pairs = [(said, truth) if relative_to == "truth" else (truth, said) for truth in truths]
    return any(_is_near(text, whole, tolerance) for text, whole in pairs)


def _is_near(text: str, whole: str, tolerance: float) -> bool:
    """Whether a number is within a share of the whole, or the texts are the same."""
    number, of = _number(text), _number(whole)
    if number is not None and of:
        return abs(number - of) / abs(of) <= tolerance
    return text.lower() == whole.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def vqa_score(
    answer: str,
    truths: Sequence[str],
    *,
    reference_quirks: bool = False,
    people: Sequence[object] | None = None,
) -> float:
    """VQA accuracy against the answers of several people, usually ten: each against the others, three agreeing are 1.

    reference_quirks: the people's answers only lose punctuation, and that only where they differ from one another.
    people: who said each of them, None for somebody else each time. The official script takes the same answer of the
        same person for one, which matters where a file does not say who said what.
    """
    if not truths:
        raise ValueError(f"no truth to compare {answer!r} with; a VQA question has the answers of several people")
    ours = vqa_text(answer)
    if not reference_quirks:
        said = [vqa_text(truth) for truth in truths]
    elif len(set(truths)) > 1:
        said = [_without_punctuation(truth) for truth in truths]
    else:
        said = list(truths)
    who = range(len(said)) if people is None else people
    given = list(zip(said, who, strict=True))
    agreeing = [one for one in given if one[0] == ours]
    return sum(min(1.0, sum(other != one for other in agreeing) / 3) for one in given) / len(given)


def vqa_text(text: str) -> str:
    """What VQA accuracy compares: lower case, no punctuation, articles or number words, apostrophes in their place."""
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Marks beside a space go, others become a space; with a thousands separator anywhere all of them go."""
    out = text
    has_separator = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        goes = has_separator or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", out, count=_QUIRK_MAX_PERIODS)


def anls(answer: str, truths: Sequence[str], *, threshold: float = 0.5, spacing: Spacing = "loose") -> float:
    """Average normalised Levenshtein similarity (DocVQA) to the nearest truth; 0 below the threshold.

    Letter case does not count. spacing: "loose" as in DocVQA's own script, where it does not count either and lengths
    are those of the texts as given; "kept" as Monkey's evaluation has it, where only the ends of both texts are
    stripped and the length of a truth is that before (reference/monkey.md 5).
    """
    if not truths:
        raise ValueError(f"no truth to compare {answer!r} with; a DocVQA question has at least one answer")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing={spacing!r}; choose {', '.join(SPACINGS)}")
    distances = []
    for truth in truths:
        if spacing == "kept":
            length = max(len(truth), len(answer.strip()))
            apart = levenshtein(truth.lower().strip(), answer.lower().strip())
        else:
            length = max(len(truth.upper()), len(answer.upper()))
            apart = levenshtein(" ".join(truth.lower().split()), " ".join(answer.lower().split()))
        distances.append(apart / length if length else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace that makes `a` of `b`."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (letter != other))
    return row[-1]


# MME


@dataclass(frozen=True, slots=True)
class MmeScores:
    """One task of MME. Counts and rates of `yes` leave out answers that are neither; `accuracy` counts them wrong."""

    true_positives: int
    false_negatives: int
    true_negatives: int
    false_positives: int
    num_other: int
    accuracy: float
    accuracy_plus: float

    @property
    def precision(self) -> float:
        """Share of right ones among answers `yes`; 0 without any."""
        return self.true_positives / max(1, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Share of questions with the truth `yes` so answered; 0 without any."""
        return self.true_positives / max(1, self.true_positives + self.false_negatives)

    @property
    def score(self) -> float:
        """Of 200: what papers print."""
        return 100 * (self.accuracy + self.accuracy_plus)


def mme_label(answer: str) -> str:
    """`yes`, `no` or `other`: which word begins within the answer's first four letters (`nope` is `no`)."""
    start = answer.lower()[:4]
    return next((label for label in ("yes", "no") if label in start), "other")


def mme_scores(truths: Sequence[str], labels: Sequence[str]) -> MmeScores:
    """Scores a task. Two consecutive questions belong to one picture; `accuracy_plus` wants both right."""
    if not truths or len(truths) != len(labels):
        raise ValueError(
            f"{len(truths)} truths and {len(labels)} answers; MME wants one answer to each of its questions"
        )
    if odd := set(truths) - {"yes", "no"}:
        raise ValueError(f"the truth {min(odd)!r} is neither 'yes' nor 'no'; is this an MME task?")
    pairs = list(zip(truths, labels, strict=True))
    is_right = [truth == label for truth, label in pairs]
    both = sum(first and second for first, second in zip(is_right[::2], is_right[1::2], strict=False))
    return MmeScores(
        true_positives=pairs.count(("yes", "yes")),
        false_negatives=pairs.count(("yes", "no")),
        true_negatives=pairs.count(("no", "no")),
        false_positives=pairs.count(("no", "yes")),
        num_other=list(labels).count("other"),
        accuracy=sum(is_right) / len(pairs),
        accuracy_plus=both / len(pairs) * 2,
    )
