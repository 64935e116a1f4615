"""A Sample as the members of a shard, and back.

One sample is `<key>.json` (everything but the pictures) and its encoded pictures: `<key>.jpg` for one,
`<key>.0.jpg`, `<key>.1.png` ... for several. Plain WebDataset readers see the same fields. Only the extensions below
are ever read, and none of them can carry code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NoReturn

from bestiary.schema import Region, Sample, SampleError, Turn
from data_modules.ustar import KEY

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
KEY_LIMIT = 80
"""Characters of a key, so that `<key>.99.webp` fits a USTAR name."""

_NUMBERS = {"point": 2, "box": 4}
_ROUNDING = 1e-6
"""How far outside the picture a fraction may lie without being wrong."""


class Reason(IntEnum):
    """Why a sample was left out. The values are part of the lane state: never renumber."""

    CUT = 1
    """The shard ends before the sample does."""
    STRUCTURE = 2
    """Members missing, foreign or of an unwanted kind."""
    RECORD = 3
    """The JSON is broken or does not say what a Sample needs."""
    PROCESSOR = 4
    """The processor refused it before anything was decoded."""
    DECODE = 5
    """The processor refused it while making the example: a hole in the row."""
    TOO_LONG = 6
    """Over a row's budget, and the policy is to skip."""


class DamagedSampleError(SampleError):
    """A sample that cannot be read, with the reason it is counted under."""

    def __init__(self, key: str, problem: str, reason: Reason) -> None:
        super().__init__(key, problem)
        self.reason = reason

    def __reduce__(self) -> tuple[type[DamagedSampleError], tuple[str, str, Reason]]:
        return DamagedSampleError, (self.key, self.problem, self.reason)


def to_members(sample: Sample) -> list[tuple[str, bytes]]:
    """(extension, bytes) of each member, JSON first; SampleError on anything a reader would refuse."""
    if len(sample.key) > KEY_LIMIT or KEY.fullmatch(sample.key) is None:
        raise SampleError(sample.key, f"key must match {KEY.pattern}, at most {KEY_LIMIT} characters")
    _check(sample)
    extensions = [_image_extension(sample.key, data) for data in sample.images]
    if len(extensions) > 1:
        extensions = [f"{number}.{extension}" for number, extension in enumerate(extensions)]
    record: dict[str, Any] = {
        "source": sample.source,
        "domain": sample.domain,
        "images": extensions,
        "turns": [{"role": turn.role, "text": turn.text} for turn in sample.turns],
        "regions": [{"kind": r.kind, "coords": list(r.coords), "mark": r.mark} for r in sample.regions],
        "meta": sample.meta,
    }
    try:
        text = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SampleError(sample.key, f"meta is not plain JSON: {error}") from error
    return [("json", text.encode()), *zip(extensions, sample.images, strict=True)]


def from_members(key: str, members: Mapping[str, memoryview]) -> Sample:
    """The Sample in a group of members (extension -> bytes); DamagedSampleError on anything missing or wrong."""
    if "json" not in members:
        raise DamagedSampleError(key, "member .json is missing", Reason.STRUCTURE)
    for extension in members:
        if extension != "json" and extension.rpartition(".")[2] not in IMAGE_EXTENSIONS:
            raise DamagedSampleError(
                key, f"member .{extension} is not on the list of what a shard may hold", Reason.STRUCTURE
            )
    try:
        record = _DECODER.decode(bytes(members["json"]).decode())
        images = [str(extension) for extension in record["images"]]
        missing = [extension for extension in images if extension not in members]
        if missing or len(set(images)) != len(members) - 1:
            raise DamagedSampleError(
                key, f"record names images {images}, shard holds {sorted(members)}", Reason.STRUCTURE
            )
        sample = Sample(
            key=key,
            source=_text(record["source"]),
            domain=_text(record["domain"]),
            turns=tuple(Turn(turn["role"], _text(turn["text"])) for turn in record["turns"]),
            images=tuple(bytes(members[extension]) for extension in images),
            regions=tuple(Region(r["kind"], tuple(map(float, r["coords"])), r["mark"]) for r in record["regions"]),
            meta=dict(record["meta"]),
        )
        _check(sample)
    except SampleError as error:
        if isinstance(error, DamagedSampleError):
            raise
        raise DamagedSampleError(key, error.problem, Reason.RECORD) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedSampleError(
            key, f"record is not a sample: {type(error).__name__}: {error}", Reason.RECORD
        ) from error
    return sample


def _check(sample: Sample) -> None:
    """Raise SampleError where a sample breaks what schema.py says of it."""
    for name in ("source", "domain"):
        if not getattr(sample, name):
            raise SampleError(sample.key, f"{name} is empty; name one")
    if not sample.turns:
        raise SampleError(sample.key, "conversation is empty; a sample needs at least one turn")
    for turn in sample.turns:
        if turn.role not in ("human", "assistant"):
            raise SampleError(sample.key, f"role {turn.role!r} is neither human nor assistant")
    for region in sample.regions:
        _check_region(sample.key, region)
    if sample.regions and not sample.images:
        raise SampleError(sample.key, f"{len(sample.regions)} regions but no image")


def _check_region(key: str, region: Region) -> None:
    where = f"region of mark {region.mark!r} ({region.kind} {region.coords})"
    if isinstance(region.mark, bool) or not isinstance(region.mark, int) or region.mark < 1:
        raise SampleError(key, f"{where}: mark must be a whole number from 1")
    num = len(region.coords)
    if region.kind not in ("point", "box", "stroke"):
        raise SampleError(key, f"{where}: kind must be point, box or stroke")
    if num != _NUMBERS.get(region.kind, num) or num % 2 or num < 2:
        raise SampleError(key, f"{where}: {num} numbers do not make a {region.kind}")
    if not all(-_ROUNDING <= value <= 1.0 + _ROUNDING for value in region.coords):
        raise SampleError(key, f"{where}: coordinates must lie in [0, 1], as fractions of the original image")
    if region.kind == "box" and not (region.coords[0] < region.coords[2] and region.coords[1] < region.coords[3]):
        raise SampleError(key, f"{where}: a box needs x0 < x1 and y0 < y1")


def _image_extension(key: str, data: bytes) -> str:
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise SampleError(key, f"image starts with {data[:8]!r}; encode it as JPEG, PNG or WebP")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
