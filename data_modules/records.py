"""A Sample as the members of a shard, and back.

One sample is `<key>.json` (everything but the pictures) and its encoded pictures: `<key>.jpg` for one,
`<key>.0.jpg`, `<key>.1.png` ... for several. Plain WebDataset readers see the same fields. Only the extensions below
are ever read, and none of them can carry code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import msgspec

from bestiary.schema import Region, Sample, SampleError, Turn
from data_modules.ustar import KEY

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""An index names them by their place here: never reorder."""
KEY_LIMIT = 80
"""Characters of a key, so that `<key>.99.webp` fits a USTAR name."""

TEXT_LIMIT = 1 << 24
"""Bytes of a record: more is no text that anybody could train on."""

_JPEG = b"\xff\xd8\xff"
_NUMBERS = {"point": 2, "box": 4}
ROUNDING = 1e-6
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
    SKIPPED = 7
    """On the skip list: no damage, outside the budget of damage."""


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
        data = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        _decode(data)  # numbers and nesting that JSON can say but a reader refuses
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError(sample.key, f"record is not plain JSON: {error}") from error
    if len(data) > TEXT_LIMIT:
        raise SampleError(sample.key, f"its record has {len(data)} bytes, more than {TEXT_LIMIT}; shorten it")
    images = [image if isinstance(image, bytes) else bytes(image) for image in sample.images]
    return [("json", data), *zip(extensions, images, strict=True)]


def from_members(key: str, members: Mapping[str, bytes | memoryview]) -> Sample:
    """The Sample in a group of members (extension -> bytes), its images as they were given.

    DamagedSampleError on anything missing or wrong.
    """
    if "json" not in members:
        raise DamagedSampleError(key, "member .json is missing", Reason.STRUCTURE)
    for extension in members:
        if extension != "json" and extension.rpartition(".")[2] not in IMAGE_EXTENSIONS:
            raise DamagedSampleError(
                key, f"member .{extension} is not on the list of what a shard may hold", Reason.STRUCTURE
            )
    record = decode_record(key, members["json"])
    images = record.images
    if sorted([*images, "json"]) != sorted(members):
        raise _other_images(key, images, sorted(members))
    return make_sample(key, record, tuple(checked_image(key, name, members[name]) for name in images))


def from_parts(key: str, text: bytes | memoryview, extension: str, image: bytes | memoryview | None) -> Sample:
    """The Sample of one JSON text and at most one image (None, and "" for its extension); errors as `from_members`.

    The common sample: this is the innermost part of the reader, so it is written flat.
    """
    if len(text) > TEXT_LIMIT:
        raise _too_large(key, text)
    try:
        record = _decode(text)
    except (ValueError, RecursionError):
        record = decode_record(key, text)  # again, for its message
    if image is None:
        if record.images:
            raise _other_images(key, record.images, ["json"])
        return make_sample(key, record, ())
    if record.images != _ONLY[extension]:
        raise _other_images(key, record.images, ["json", extension])
    if image[:3] != _JPEG or extension not in _JPEG_NAMES:
        checked_image(key, extension, image)
    if record.regions or not (record.turns and record.source and record.domain):
        return make_sample(key, record, (image,))  # it looks closer
    sample = _new(Sample)
    _set_key(sample, key)
    _set_source(sample, record.source)
    _set_domain(sample, record.domain)
    _set_turns(sample, record.turns)
    _set_images(sample, (image,))
    _set_regions(sample, ())
    _set_meta(sample, record.meta)
    return sample


class Record(msgspec.Struct, gc=False):
    """The JSON of a sample. Fields it does not know are left alone: a later version may have more."""

    source: str
    domain: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    regions: tuple[Region, ...]
    meta: dict[str, Any]


def decode_record(key: str, text: bytes | memoryview) -> Record:
    """The typed record in a JSON text; DamagedSampleError where it is broken or says something else."""
    if len(text) > TEXT_LIMIT:
        raise _too_large(key, text)
    try:
        return _decode(text)
    except (ValueError, RecursionError) as error:  # msgspec's and Unicode errors are ValueErrors
        problem = f"record is not a sample: {type(error).__name__}: {error}"
        raise DamagedSampleError(key, problem, Reason.RECORD) from error


def make_sample(key: str, record: Record, images: tuple[bytes | memoryview, ...]) -> Sample:
    """The checked Sample; types are checked already."""
    sample = _new(Sample)
    _set_key(sample, key)
    _set_source(sample, record.source)
    _set_domain(sample, record.domain)
    _set_turns(sample, record.turns)
    _set_images(sample, images)
    _set_regions(sample, record.regions)
    _set_meta(sample, record.meta)
    if record.regions or not (record.turns and record.source and record.domain):
        try:
            _check(sample)
        except SampleError as error:
            raise DamagedSampleError(key, error.problem, Reason.RECORD) from error
    return sample


def with_images(sample: Sample, images: tuple[bytes | memoryview, ...]) -> Sample:
    """The sample itself with other images: for whoever just made it and is the only one to know it."""
    _set_images(sample, images)
    return sample


def checked_image(key: str, extension: str, data: bytes | memoryview) -> bytes | memoryview:
    """The image itself, if its first bytes are those of its extension."""
    head = bytes(data[:12])
    if not _STARTS[extension.rpartition(".")[2]](head):
        raise DamagedSampleError(key, f"member .{extension} starts with {head!r}, no {extension}", Reason.STRUCTURE)
    return data


def image_kind(data: bytes | memoryview) -> str | None:
    """jpg, png or webp by the first bytes; None for anything else."""
    head = bytes(data[:12])
    return next((kind for kind in ("jpg", "png", "webp") if _STARTS[kind](head)), None)


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
    if not all(-ROUNDING <= value <= 1.0 + ROUNDING for value in region.coords):
        raise SampleError(key, f"{where}: coordinates must lie in [0, 1], as fractions of the original image")
    if region.kind == "box" and not (region.coords[0] < region.coords[2] and region.coords[1] < region.coords[3]):
        raise SampleError(key, f"{where}: a box needs x0 < x1 and y0 < y1")


def _image_extension(key: str, data: bytes | memoryview) -> str:
    kind = image_kind(data)
    if kind is None:
        raise SampleError(key, f"image starts with {bytes(data[:8])!r}; encode it as JPEG, PNG or WebP")
    return kind


def _too_large(key: str, text: bytes | memoryview) -> DamagedSampleError:
    return DamagedSampleError(key, f"its record has {len(text)} bytes, more than {TEXT_LIMIT}", Reason.RECORD)


def _other_images(key: str, images: Sequence[str], found: Sequence[str]) -> DamagedSampleError:
    problem = f"record names images {list(images)}, shard holds {list(found)}"
    return DamagedSampleError(key, problem, Reason.STRUCTURE)


def _is_jpeg(head: bytes) -> bool:
    return head[:3] == _JPEG


def _is_png(head: bytes) -> bool:
    return head[:8] == b"\x89PNG\r\n\x1a\n"


def _is_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:12] == b"WEBP"


# A frozen dataclass fills itself in twice the time of its slots' own descriptors, and reading is mostly this.
_new = object.__new__
_set_key, _set_source, _set_domain, _set_turns, _set_images, _set_regions, _set_meta = (
    getattr(Sample, name).__set__ for name in ("key", "source", "domain", "turns", "images", "regions", "meta")
)
_JPEG_NAMES = ("jpg", "jpeg")
_ONLY = {extension: (extension,) for extension in IMAGE_EXTENSIONS}
_STARTS = {"jpg": _is_jpeg, "jpeg": _is_jpeg, "png": _is_png, "webp": _is_webp}
_decode = msgspec.json.Decoder(Record).decode
