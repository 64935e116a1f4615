"""The benchmark annotations of SPHINX's evaluation: one question a record, with `gt_answers` and the picture's path.

Rows of Qwen-VL's and Monkey's evaluation, which say `answer` and `image`, are read the same way.

The question stays as it is; how to ask and score it (`prompt`, `metric`, `max_new_tokens` of annotation_config.json)
goes into `meta` with all true answers and every other field. The sample's answer is the only, or most frequent (then
first), true one. Where the truth is a box (RefCOCO, corners in pixels), `meta["gt_box"]` and the answer's text, to
three decimals, are fractions of the original picture: a model that speaks of another frame converts them. The box is
never a region, which would show the model the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from bestiary.schema import Sample, Turn
from data_modules.adapters.boxes import Frame, corner_fractions, numbers
from data_modules.adapters.conversations import check_filled
from data_modules.adapters.fields import Fields, shown, text_of
from data_modules.adapters.files import AnnotationFile, all_records, fields_of, identity_of, place_in
from data_modules.adapters.images import read_image
from data_modules.adapters.protocol import Record, sample_key
from data_modules.adapters.reading import whole_json

CONFIG_FILE = "annotation_config.json"
INSTRUCTIONS = ("prompt", "metric", "max_new_tokens")
DOMAINS: Mapping[str, str] = {
    "ai2diagram": "diagram",
    "chartqa": "chart",
    "docvqa": "document",
    "ocrvqa": "ocr",
    "textvqa": "ocr",
    "test_DeepForm": "document",
    "test_InfographicsVQA": "document",
    "test_KleisterCharity": "document",
    "test_TabFact": "document",
    "test_VisualMRC": "document",
    "test_WikiTableQuestions": "document",
    "infovqa": "document",
    "deepform": "document",
    "KLC": "document",
    "WTQ": "document",
    "estvqa": "ocr",
    "stvqa": "ocr",
}
"""Beginning of an annotation file's name -> domain; all others are natural."""
_QWEN_VL = {"image_path": "image", "gt_answers": "answer"}
"""The same fields in the files of Qwen-VL's evaluation, which is Monkey's."""
_SIZE = re.compile(r"height(\d{1,6})_width(\d{1,6})")


@dataclass
class BenchmarkAdapter:
    """One annotation file, or a folder of them (all its *.json but the configuration).

    images: the folder that `image_path` is relative to. without_images: write samples without pictures, their paths in
    `meta["image_path"]`. config: the configuration (default: annotation_config.json beside the file); a file that it
    does not list, as MMMU's, has no prompt, metric and max_new_tokens in meta. domain: instead of DOMAINS. clip, widen:
    for true boxes, as in `mdvp`. keep_empty: accept empty questions and answers.
    """

    annotations: Path
    images: Path | None
    _: KW_ONLY
    source: str
    domain: str | None = None
    without_images: bool = False
    config: str = ""
    clip: bool = False
    widen: bool = False
    keep_empty: bool = False
    name: str = field(default="benchmark", init=False)

    def __post_init__(self) -> None:
        if self.without_images == (self.images is not None):
            raise ValueError(
                f"images={self.images} and without_images={self.without_images}: the files hold no pictures, so give "
                "either their folder with --images, or --option without_images=true to write the questions alone"
            )

    def records(self) -> Iterator[Record]:
        """The records of all files, by their names."""
        return all_records(self._files())

    def to_sample(self, record: Record) -> Sample:
        """The question of a record and its true answer."""
        fields, file = fields_of(record)
        renamed = {ours: theirs for ours, theirs in _QWEN_VL.items() if ours not in fields and theirs in fields}
        path, truth = (renamed.get(ours, ours) for ours in ("image_path", "gt_answers"))
        name = text_of(fields.look(path), f"field {path!r}", record.where)
        answer, box = self._answer(fields, truth)
        turns = (Turn("human", fields.text("question")), Turn("assistant", answer))
        if not self.keep_empty:
            check_filled(turns, record.where)
        images = () if self.without_images else (read_image(self.images, name, record.where),)
        facts = {option: value for option, value in file.facts.items() if option != "domain"}
        return Sample(
            key=sample_key(self.source, record.number),
            source=self.source,
            domain=self.domain or file.facts["domain"],
            turns=turns,
            images=images,
            meta=fields.meta(
                gt_box=box,
                **{ours: fields.take(theirs) for ours, theirs in renamed.items()},
                **facts,
                **place_in(record),
            ),
        )

    def identity(self) -> dict[str, Any]:
        """The files with what the configuration says of them, the folder of pictures and every option."""
        return identity_of(self, self._files())

    def _answer(self, fields: Fields, name: str) -> tuple[str, list[float] | None]:
        """The sample's answer, and the true box in fractions where the truth, the field `name`, is one."""
        truth = fields.look(name)
        if not isinstance(truth, list):
            return text_of(truth, f"field {name!r}", fields.where), None
        if truth and not any(isinstance(answer, str) for answer in truth):
            return self._box_answer(fields, truth)
        answers = Counter(text_of(answer, f"an answer of {name!r}", fields.where) for answer in truth)
        return answers.most_common(1)[0][0] if answers else "", None

    def _box_answer(self, fields: Fields, truth: list[Any]) -> tuple[str, list[float]]:
        size = _SIZE.fullmatch(str(fields.look("question_id")))
        if size is None:
            raise fields.rejected(
                f"has a box but question_id {shown(fields.look('question_id'))}; it must be height<H>_width<W>"
            )
        frame = Frame(max(1, int(size[2])), max(1, int(size[1])), clip=self.clip, widen=self.widen)
        corners = numbers(truth, 4, "gt_answers", fields.where)
        box = corner_fractions(corners, frame, f"gt_answers {truth}", fields.where)
        return f"[{','.join(f'{value:.3f}' for value in box)}]", list(box)

    def _files(self) -> list[AnnotationFile]:
        is_folder = self.annotations.is_dir()
        folder = self.annotations if is_folder else self.annotations.parent
        config = Path(self.config) if self.config else folder / CONFIG_FILE
        listed = _load(config) if self.config or config.exists() else {}
        paths = sorted(self.annotations.glob("*.json")) if is_folder else [self.annotations]
        paths = [path for path in paths if path.name != config.name]
        if not paths:
            raise ValueError(f"{self.annotations} has no annotation file; give a *.json or a folder of them")
        return [
            AnnotationFile(path, self.images, path.name if is_folder else None, facts=_facts(path, listed))
            for path in paths
        ]


def _load(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Annotation file's name -> benchmark's name and how to ask and score it."""
    found = whole_json(path)
    try:
        return {Path(entry["test"]).name: _instructions(name, entry) for name, entry in found.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of benchmarks ({type(error).__name__}: {error})") from error


def _instructions(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The benchmark's name, its instructions, and under `config` what else the configuration says (files of truths)."""
    facts = {"benchmark": name} | {option: entry[option] for option in INSTRUCTIONS if option in entry}
    rest = {option: value for option, value in entry.items() if option not in (*INSTRUCTIONS, "test")}
    return facts | ({"config": rest} if rest else {})


def _facts(path: Path, listed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    domain = next((domain for prefix, domain in DOMAINS.items() if path.name.startswith(prefix)), "natural")
    return {"benchmark": path.stem, "domain": domain, **listed.get(path.name, {})}
