"""One self-contained HTML page of samples: pictures with their marks drawn, conversations, a filter by domain.

Nothing of a sample reaches the browser as it is. Pictures are decoded and encoded again; text is escaped; marks are
numbers. The page has no script at all (the filter is CSS), and its policy allows none, nor any request.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from PIL import Image, ImageOps

from bestiary.schema import Region, Sample
from data_modules.adapters.images import PILLOW_FORMATS
from data_modules.inspection.check import DECODE_LIMIT, image_problem
from data_modules.inspection.style import NUM_COLOURS, PAGE_STYLE
from data_modules.records import DamagedSampleError

SIDE = 640
"""The longer side of a thumbnail, in pixels."""
DISPLAYED_WIDTH, DISPLAYED_HEIGHT = 360, 420
"""About how large the page shows it; numbers are drawn to be read at this size."""
TEXT_LIMIT = 20_000
"""Characters of a turn that are shown."""
META_LIMIT = 5_000

_SPOKEN = re.compile(r"&lt;(?:Mark|Region)\s*(\d{1,4})&gt;")
_HIDDEN = re.compile("[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
"""Characters that would vanish or turn the text around them; shown as a box with their number."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample of the page. sample: or what is wrong in its place. where: the source it came from."""

    sample: Sample | DamagedSampleError
    where: str


def page(shown: Sequence[Shown], *, title: str) -> str:
    """The whole document, UTF-8."""
    domains = Counter(item.sample.domain for item in shown if isinstance(item.sample, Sample))
    numbers = {domain: number for number, (domain, _) in enumerate(domains.most_common())}
    style = PAGE_STYLE + "".join(_filter_rule(number) for number in numbers.values())
    digest = base64.b64encode(sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    cards = "\n".join(_card(item, numbers) for item in shown)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_text(title)}</title>
<style>{style}</style>
</head>
<body>
{_filter_inputs(domains, len(shown))}
<header>
<h1>{_text(title)}</h1>
<p>{_summary(shown)}</p>
{_filter_labels(domains, len(shown))}
</header>
<main>
{cards}
</main>
</body>
</html>
"""


def _summary(shown: Sequence[Shown]) -> str:
    samples = [item.sample for item in shown if isinstance(item.sample, Sample)]
    marks = sum(len(sample.regions) for sample in samples)
    pictures = sum(len(sample.images) for sample in samples)
    damaged = len(shown) - len(samples)
    parts = [f"{len(samples)} samples", f"{pictures} pictures", f"{marks} marks"]
    return _text(" · ".join([*parts, f"{damaged} damaged"] if damaged else parts))


def _filter_inputs(domains: Counter[str], num_shown: int) -> str:
    inputs = ['<input type="radio" name="domain" id="all" checked>']
    inputs += [f'<input type="radio" name="domain" id="domain-{number}">' for number in range(len(domains))]
    return "".join(inputs) if num_shown else ""


def _filter_labels(domains: Counter[str], num_shown: int) -> str:
    labels = [f'<label for="all">all <b>{num_shown}</b></label>']
    for number, (domain, count) in enumerate(domains.most_common()):
        labels.append(f'<label for="domain-{number}">{_text(domain)} <b>{count}</b></label>')
    return f'<nav aria-label="domains">{"".join(labels)}</nav>'


def _filter_rule(number: int) -> str:
    return (
        f"#domain-{number}:checked~main .card:not(.domain-{number}){{display:none}}"
        f'#domain-{number}:checked~header label[for="domain-{number}"]{{background:var(--ink);color:var(--paper)}}'
        f'#domain-{number}:focus-visible~header label[for="domain-{number}"]{{outline:2px solid var(--accent)}}'
    )


def _card(item: Shown, numbers: dict[str, int]) -> str:
    sample = item.sample
    if isinstance(sample, DamagedSampleError):
        head = f"<h2>{_text(sample.key)}</h2><p class=facts>{_text(item.where)}</p>"
        return f'<article class="card damaged">{head}<p class="problem">{_text(sample.problem)}</p></article>'
    pictures = "".join(
        _picture(data, sample.regions if number == 0 else ()) for number, data in enumerate(sample.images)
    )
    turns = "".join(_turn(turn.role, turn.text) for turn in sample.turns)
    meta = json.dumps(sample.meta, ensure_ascii=False, indent=1, sort_keys=True, default=str)
    if len(meta) > META_LIMIT:
        meta = meta[:META_LIMIT] + " …"
    details = f"<details><summary>meta</summary><pre>{_text(meta)}</pre></details>" if sample.meta else ""
    facts = f"<b>{_text(sample.domain)}</b> · {_text(sample.source)}"
    return (
        f'<article class="card domain-{numbers[sample.domain]}" data-key="{_text(sample.key)}">'
        f'<div class="pictures">{pictures}</div>'
        f"<h2>{_text(sample.key)}</h2><p class=facts>{facts}</p>"
        f'<div class="turns">{turns}</div>{details}</article>'
    )


def _turn(role: str, text: str) -> str:
    cut = f'<i class="cut"> … {len(text) - TEXT_LIMIT} more characters</i>' if len(text) > TEXT_LIMIT else ""
    safe = _SPOKEN.sub(_chip, _text(text[:TEXT_LIMIT]))
    return f'<div class="turn {"human" if role == "human" else "assistant"}"><p dir="auto">{safe}{cut}</p></div>'


def _chip(found: re.Match[str]) -> str:
    return f'<span class="chip m{int(found[1]) % NUM_COLOURS}">{found[0]}</span>'


def _picture(data: bytes | memoryview, regions: Iterable[Region]) -> str:
    made = _thumbnail(data)
    if isinstance(made, str):
        return f'<p class="problem">picture {_text(made)}</p>'
    encoded, (width, height), (full_width, full_height) = made
    marks = "".join(_mark(region, width, height) for region in regions)
    source = f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"
    overlay = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{marks}</svg>'
    caption = f"<figcaption>{full_width} &times; {full_height}</figcaption>"
    return (
        f'<figure><div class="frame"><img src="{source}" width="{width}" height="{height}" alt="picture">'
        f"{overlay if marks else ''}</div>{caption}</figure>"
    )


def _thumbnail(data: bytes | memoryview) -> tuple[bytes, tuple[int, int], tuple[int, int]] | str:
    """JPEG bytes, their size and the size of the original; or why there is none."""
    problem = image_problem(data)
    if problem is not None:
        return problem
    with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
        size = image.size
        assert size[0] * size[1] <= DECODE_LIMIT, "image_problem refused larger ones"
        image.draft("RGB", (SIDE, SIDE))
        small = _flat(image)
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return file.getvalue(), small.size, size


def _flat(image: Image.Image) -> Image.Image:
    """RGB over white, as people see it."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode.startswith("I;16"):
        return ImageOps.autocontrast(image.point(lambda value: value / 256).convert("L")).convert("RGB")
    return image.convert("RGB")


def _mark(region: Region, width: int, height: int) -> str:
    """One region in the thumbnail's pixels, with its number; drawn twice, so that it shows on any ground."""
    scale = max(1.0, width / DISPLAYED_WIDTH, height / DISPLAYED_HEIGHT)
    points = [(x * width, y * height) for x, y in zip(region.coords[0::2], region.coords[1::2], strict=True)]
    if region.kind == "box":
        (x0, y0), (x1, y1) = points
        shape = f'rect x="{x0:.2f}" y="{y0:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}"'
    elif region.kind == "point":
        shape = f'circle cx="{points[0][0]:.2f}" cy="{points[0][1]:.2f}" r="{5 * scale:.2f}"'
    else:
        shape = f'polyline points="{" ".join(f"{x:.2f},{y:.2f}" for x, y in points)}"'
    radius = 10 * scale
    away = 1.3 * radius if region.kind == "point" else 0.0
    left = min(max(radius, points[0][0] + away), width - radius)
    top = min(max(radius, points[0][1] - away), height - radius)
    return (
        f'<g class="mark {region.kind} m{region.mark % NUM_COLOURS}" data-mark="{region.mark}">'
        f'<{shape} class="under"/><{shape} class="over"/>'
        f'<circle class="tag" cx="{left:.2f}" cy="{top:.2f}" r="{radius:.2f}"/>'
        f'<text x="{left:.2f}" y="{top:.2f}" font-size="{1.2 * radius:.1f}">{region.mark}</text></g>'
    )


def _text(text: str) -> str:
    """Escaped for text and quoted attributes, characters that hide or reorder made visible."""
    return _HIDDEN.sub(lambda found: f"⟦{ord(found[0]):04X}⟧", html.escape(text, quote=True))
