"""What a variant tells `bestiary weights` about its published checkpoints: a layout, its models, an open source.

A variant's `layout.py` has one object that is a `Layout`; `bestiary.weights.layouts` lists them. Nothing else in
`bestiary.weights` knows a variant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from bestiary.config import Run
from bestiary.mllm import MultimodalLM
from bestiary.variants.conversion import Converter
from bestiary.variants.tensor_file import DTYPES

FORMAT = 1
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Published:
    """Where imported weights came from, enough to write them back.

    layout: the format of the files, one of its `Layout.formats`. llama_type: the model's key in its layout (what
    SPHINX's meta.json calls it). tensors: published name (with `llma.`) -> dtype, in the order of the files. extra:
    those of `tensors` that are in extra.tensors. side_files: names of the files kept byte for byte. head_dim: of the
    decoder. record: what else the layout needs to write its files (`hf_folder.HfRecord` as JSON).
    """

    layout: str
    num_shards: int
    llama_type: str
    head_dim: int
    tensors: dict[str, str]
    wrapped: bool = True
    extra: list[str] = field(default_factory=list)
    side_files: list[str] = field(default_factory=list)
    record: str = ""

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Published:
        """The inverse of `to_json`, of a file; what is not one is a line of error."""
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            known = {item.name for item in fields(cls)}
            if told.pop("format") != FORMAT or not told.keys() <= known:
                raise KeyError("format")
            published = cls(**told)
            if odd := [name for name in published.side_files if Path(name).name != name]:
                raise KeyError(odd[0])
            if odd := [dtype for dtype in published.tensors.values() if dtype not in DTYPES]:
                raise KeyError(odd[0])
            return published
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} was not written by this version ({error}); import the weights again") from error


@dataclass(frozen=True, slots=True)
class FirstExport:
    """How weights are published that were never imported: what the files beside them say.

    key: `Model.key`. layout: the format of the files. texts: contents of side files by name; files: such to be copied.
    """

    key: str
    layout: str
    head_dim: int
    texts: dict[str, str]
    files: dict[str, Path]


@dataclass(frozen=True, slots=True)
class Writing:
    """What `Layout.write` is asked for.

    whole: gives a published tensor. shapes: of those to write, in order. side_files: by name. layout: one of the
    layout's formats. num_shards: None keeps the recorded number.
    """

    published: Published
    whole: Callable[[str], torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    side_files: Mapping[str, Path]
    layout: str
    num_shards: int | None = None


class Source(Protocol):
    """One published path, opened: what there is, and each tensor whole on demand (let go of it before the next).

    layout: its format. is_delta: its tensors are to be added to a base. unequal: tensors whose shards disagreed
    although all should hold them, filled by `whole`. record: see `Published`.
    """

    path: Path
    layout: str
    wrapped: bool
    unequal: list[str]
    file_bytes: list[int]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    @property
    def is_delta(self) -> bool:
        """See the class."""

    @property
    def record(self) -> str:
        """See the class."""

    def whole(self, name: str) -> torch.Tensor:
        """One tensor, put together from all its files."""


class Model(Protocol):
    """One model of a layout. key: what the layout calls it; name: ours.

    key_word: what its files call the key. embedding: the tensor with as many rows as the tokenizer has pieces, or more
    where allows_spare_ids. derived: names of tables that files carry along and every model computes by itself.
    begins: of what else these weights are but the beginning, for people; "" where they are whole.
    """

    @property
    def begins(self) -> str:
        """See the class."""

    @property
    def key_word(self) -> str:
        """See the class."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What the weights depend on beside shapes and tokenizer, as our checkpoints record it."""

    @property
    def allows_spare_ids(self) -> bool:
        """See the class."""

    @property
    def key(self) -> str:
        """See the class."""

    @property
    def name(self) -> str:
        """See the class."""

    @property
    def converter(self) -> Converter:
        """Published names and ours."""

    @property
    def embedding(self) -> str:
        """See the class."""

    @property
    def derived(self) -> re.Pattern[str]:
        """See the class."""

    def expected(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Published names and shapes of a whole checkpoint at the sizes that these tensors and the config tell."""

    def tied(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, str]:
        """Published names that the files leave out because they are another tensor, and which one."""

    def head_dim(self, shapes: Shapes, config: Mapping[str, Any]) -> int:
        """Width of the decoder's attention heads, which the order of rotary rows needs; raises when nobody says it."""

    def describe(self, shapes: Shapes, config: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Lines (label, text) about its size for people."""


class Layout(Protocol):
    """The published folders of a family of models."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats of files, the words of `--layout` and of published.json."""

    def recognises(self, path: Path) -> bool:
        """Whether a path looks like one of this family; cheap, and never raises."""

    def knows(self, names: Mapping[str, object]) -> bool:
        """Whether tensors are named as this family's are."""

    def config_of_list(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What a list of names and shapes (a JSON object) says of the model's sizes, in the words of its config."""

    def open(self, path: Path) -> Source:
        """The published path; one line of error when it is not one whole set."""

    def cut_dim(self, name: str) -> int | None:
        """The dimension along which files cut a tensor; None where each is whole in one of them."""

    def side_files(self, path: Path) -> dict[str, Path]:
        """What lies beside the weights and is kept byte for byte, by name."""

    def tokenizer(self, path: Path, side_files: Mapping[str, Path]) -> Path | None:
        """The tokenizer beside the weights in `path`, a file or a folder; None without."""

    def config(self, side_files: Mapping[str, Path]) -> dict[str, Any]:
        """The sizes that lie beside the weights, {} without."""

    def config_name(self, layout: str) -> str:
        """Under which name a config from elsewhere is kept."""

    def model_of(
        self, names: Mapping[str, object], side_files: Mapping[str, Path], may_lack: Sequence[str] = ()
    ) -> Model:
        """The model that the side files name, or else the names of tensors; one of which these globs may lack."""

    def model_called(self, key: str) -> Model:
        """The model with this key; ValueError when there is none."""

    def node(self, shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The model as conf/model would say it, where the config beside the weights tells everything; None else."""

    def first_export(self, run: Run, model: MultimodalLM, *, step: int) -> FirstExport | None:
        """How a run's model is published that began as no import; None where that cannot be told or is not of here.

        step: how far the run was trained, for what changes on the way.
        """

    def write(self, folder: Path, asked: Writing) -> tuple[list[str], int]:
        """Write weights and side files; the weight files' names and the bytes of their tensors.

        What cannot be written so is one line of error.
        """


def tokenizer_of(path: Path, side_files: Mapping[str, Path]) -> Path | None:
    """The tokenizer beside weights: a sentencepiece model, or the folder of a Hugging Face one; None without."""
    if "tokenizer.model" in side_files:
        return side_files["tokenizer.model"]
    return path if "tokenizer.json" in side_files else None
