"""The data every contender reads: photographs of 640x480 at about 98 KB with a conversation of about 1 KB each.

One folder holds the same samples in every contender's own format, so that what is timed is the reading alone. The
pictures are photographs' statistics (noise over many octaves), because the time of a JPEG decoder depends on its bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SENTENCE = "the sheep stands near a wooden gate while two birds watch from the old stone wall beside the river"


@cache
def picture(number: int, *, width: int = 640, height: int = 480, detail: float = 7.6, quality: int = 90) -> bytes:
    """A JPEG with structure at every scale; `detail` is the strength of the finest one (98 KB at 640x480)."""
    rng = np.random.default_rng(number)
    total = np.zeros((height, width, 3), np.float32)
    side, strength = 4, 60.0
    while side < width:
        coarse = rng.normal(0, strength, (side * height // width + 2, side, 3)).astype(np.float32)
        planes = [Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        total += np.stack([np.asarray(plane) for plane in planes], axis=-1)
        side, strength = side * 2, strength * 0.62
    total += rng.normal(0, detail, total.shape).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality, subsampling=2)
    return file.getvalue()


def conversation(number: int, *, num_words: int = 150) -> list[tuple[str, str]]:
    """(role, text) of four turns, about 1 KB together."""
    rng = np.random.default_rng(number)
    vocabulary = SENTENCE.split()
    words = [vocabulary[int(i)] for i in rng.integers(0, len(vocabulary), num_words)]
    cut = len(words) // 4
    texts = [" ".join(words[i * cut : (i + 1) * cut]) for i in range(4)]
    return [("human" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


def record(number: int) -> dict[str, object]:
    """What a shard's JSON member says of a sample; the peers store the same object."""
    turns = [{"role": role, "text": text} for role, text in conversation(number)]
    return {
        "domain": "natural",
        "images": ["jpg"],
        "meta": {"number": number},
        "regions": [],
        "source": "photos",
        "turns": turns,
    }


def key(number: int) -> str:
    """The name of a sample in every format."""
    return f"photo-{number:07d}"


def samples(num: int, *, distinct: int = 160, **size: object) -> Iterator[tuple[str, dict[str, object], bytes]]:
    """(key, record, JPEG) of `num` samples; pictures repeat after `distinct` ones, with their own trailing bytes.

    The bytes after a JPEG's end marker are ignored by decoders and make every member different.
    """
    pictures = [picture(number, **size) for number in range(min(num, distinct))]  # type: ignore[arg-type]
    for number in range(num):
        yield key(number), record(number), pictures[number % len(pictures)] + number.to_bytes(4, "little")


def write_files(folder: Path, num: int, **size: object) -> None:
    """Loose pictures and one JSON list: the references' own layout."""
    (folder / "images").mkdir(parents=True)
    table = []
    for name, facts, jpeg in samples(num, **size):  # type: ignore[arg-type]
        (folder / "images" / f"{name}.jpg").write_bytes(jpeg)
        table.append({"key": name, "image": f"images/{name}.jpg", "record": facts})
    (folder / "annotations.json").write_text(json.dumps(table), encoding="utf-8")


def write_shards(folder: Path, num: int, **size: object) -> None:
    """The project's own shards, a thousand samples each."""
    from bestiary.schema import Sample, Turn
    from data_modules.shards import write_samples

    write_samples(
        folder,
        (
            Sample(
                name,
                "photos",
                "natural",
                tuple(Turn(t["role"], t["text"]) for t in facts["turns"]),
                (jpeg,),
                (),
                facts["meta"],
            )  # type: ignore[arg-type,attr-defined,index]
            for name, facts, jpeg in samples(num, **size)  # type: ignore[arg-type]
        ),
        source="photos",
    )
