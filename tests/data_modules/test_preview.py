"""The preview page: self-contained, harmless whatever the samples say, marks where they belong. In a real browser."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bestiary.schema import Region, Sample, Turn
from data_modules.inspection.preview import Shown, page
from data_modules.records import DamagedSampleError, Reason

HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '"><svg onload="document.title=\'owned\'">',
    "</p></div></article><style>body{display:none}</style>",
    "<a href=\"javascript:document.title='owned'\">x</a>",
    "<meta http-equiv=refresh content='0;url=https://example.org/'>",
    "&lt;b&gt; &amp; {{7*7}} ${7*7} \u202egnp.exe \u0000 \u200b",
)
MARKS = (
    Region("box", (0.25, 0.1, 0.75, 0.6), 1),
    Region("point", (0.5, 0.8), 2),
    Region("stroke", (0.1, 0.9, 0.5, 0.7, 0.9, 0.95), 3),
)


def picture(width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), 90 if mode in ("L", "I;16") else (200, 220, 240, 128)[: len(mode)]).save(
        file, kind
    )
    return file.getvalue()


def sample(key: str, text: str, *, domain: str = "natural", images: tuple[bytes, ...] = (), **more: Any) -> Sample:
    turns = (Turn("human", text), Turn("assistant", "It is <Mark 1> beside <Region 2>."))
    return Sample(key, more.get("source", "toys"), domain, turns, images, more.get("regions", ()), more.get("meta", {}))


def shown(*samples: Sample | DamagedSampleError) -> list[Shown]:
    return [Shown(found, "somewhere") for found in samples]


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_hostile_samples_add_no_tag_and_no_attribute() -> None:
    def tags(text: str) -> list[tuple[str, list[str]]]:
        made = sample(text, text, domain=text, source=text, meta={text: [text]})
        broken = DamagedSampleError(text, text, Reason.RECORD)
        html = page(shown(made, broken), title=text)
        return [(tag, sorted(attributes)) for tag, attributes in Tags(html).tags]

    for text in HOSTILE:
        assert tags(text) == tags("plain")


def test_the_page_asks_for_nothing_and_its_policy_forbids_it() -> None:
    html = page(shown(sample("k", HOSTILE[0], images=(picture(40, 30),), regions=MARKS)), title="toys")
    tags = Tags(html).tags
    assert {"script", "link", "iframe", "object", "embed", "form", "base", "a"}.isdisjoint({tag for tag, _ in tags})
    for _, attributes in tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "style", "xlink:href")]
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    [policy] = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "url(" not in html and "@import" not in html


def test_what_hides_or_turns_text_is_shown_by_its_number() -> None:
    html = page(shown(sample("k", HOSTILE[-1])), title="t")
    assert "⟦202E⟧" in html and "⟦0000⟧" in html and "\u202e" not in html and "\u200b" not in html


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "L"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("WEBP", "RGB")]
)
def test_every_kind_of_picture_becomes_a_small_rgb_jpeg(kind: str, mode: str) -> None:
    html = page(shown(sample("k", "x", images=(picture(900, 300, kind, mode),))), title="t")
    [thumbnail] = thumbnails(html)
    assert (thumbnail.mode, thumbnail.size) == ("RGB", (640, 213)) and "900 &times; 300" in html
    if mode == "RGBA":
        assert np.abs(np.asarray(thumbnail)[5, 5].astype(int) - (227, 237, 247)).max() < 6  # over white


def test_a_broken_picture_or_sample_is_said_in_place() -> None:
    broken = DamagedSampleError("k2", "shard-00001.tar: the file ends before", Reason.CUT)
    html = page(shown(sample("k", "x", images=(picture(9, 9)[:40],), regions=MARKS), broken), title="t")
    assert "cannot be decoded" in html and "the file ends before" in html and "1 damaged" in html


def thumbnails(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(__import__("base64").b64decode(text))) for text in found]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser; absent ones skip, unless BESTIARY_REQUIRE_BROWSER=1."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        reason = "no chromium, chromium-browser or google-chrome is installed"
        if os.environ.get("BESTIARY_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [
        sample("large", "Where is <Mark 1>?", images=(picture(1600, 800),), regions=MARKS),
        sample("small", "two", domain="ocr", images=(picture(60, 90), picture(80, 40)), regions=MARKS),
        sample("tall", "three", domain="ocr", images=(picture(300, 3000),), regions=MARKS),
        *(sample(f"hostile{n}", text, domain="web", meta={"x": text}) for n, text in enumerate(HOSTILE)),
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(shown(*samples), title=HOSTILE[0]), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Any]:
    """The page with every request and message recorded on it."""
    view = browser.new_page(viewport={"width": 1400, "height": 1000})
    view.seen = []
    view.on("request", lambda request: view.seen.append(request.url))
    view.on("console", lambda message: view.seen.append(message.text))
    view.on("pageerror", lambda error: view.seen.append(str(error)))
    view.on("dialog", lambda dialog: view.seen.append(dialog.message))
    view.goto(written.as_uri())
    view.wait_for_load_state("networkidle")
    yield view
    view.close()


@pytest.mark.slow
def test_pictures_load_and_nothing_hostile_happens(opened: Any, written: Path) -> None:
    assert opened.title() == HOSTILE[0]
    sizes = opened.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
    assert sizes == [[True, 640, 320], [True, 60, 90], [True, 80, 40], [True, 64, 640]]
    requests = [url for url in opened.seen if not url.startswith("data:")]
    assert requests == [written.as_uri()], "a request, a message or an error"
    assert opened.evaluate("document.scripts.length") == 0
    texts = opened.evaluate("[...document.querySelectorAll('.card')].map(c => c.querySelector('.human p').textContent)")
    assert texts[3] == HOSTILE[0] and texts[6] == HOSTILE[3]
    assert opened.locator(".card:visible").count() == 3 + len(HOSTILE)


@pytest.mark.slow
def test_marks_are_drawn_where_they_belong(opened: Any) -> None:
    for card in opened.locator(".card:has(svg)").all():
        image = card.locator("img").first.bounding_box()

        def at(x: float, y: float, frame: dict[str, float] = image) -> tuple[float, float]:
            return frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]

        box = card.locator("g.box rect.over").evaluate(RECTANGLE)
        assert np.allclose(box, [*at(0.25, 0.1), *at(0.75, 0.6)], atol=1.0)
        point = card.locator("g.point circle.over").evaluate(RECTANGLE)
        assert np.allclose([(point[0] + point[2]) / 2, (point[1] + point[3]) / 2], at(0.5, 0.8), atol=1.0)
        stroke = card.locator("g.stroke polyline.over").evaluate(RECTANGLE)
        assert np.allclose(stroke, [*at(0.1, 0.7), *at(0.9, 0.95)], atol=1.0)
        assert card.locator("g text").all_text_contents() == ["1", "2", "3"]
        for tag in card.locator("g circle.tag").all():
            inside = tag.bounding_box()
            assert inside["width"] > 5 and inside["x"] >= image["x"] - 3
    assert opened.locator(".chip").first.text_content() == "<Mark 1>"


RECTANGLE = """shape => {
    const frame = shape.ownerSVGElement, box = shape.getBBox(), matrix = shape.getScreenCTM();
    const corner = (x, y) => { const p = frame.createSVGPoint(); p.x = x; p.y = y; return p.matrixTransform(matrix); };
    const first = corner(box.x, box.y), last = corner(box.x + box.width, box.y + box.height);
    return [first.x, first.y, last.x, last.y];
}"""
"""The corners of a shape's geometry (without its outline) in pixels of the window."""


@pytest.mark.slow
def test_a_domain_is_chosen_by_its_button_and_by_the_keyboard(opened: Any) -> None:
    def keys() -> list[str]:
        return [card.get_attribute("data-key") for card in opened.locator(".card:visible").all()]

    opened.locator("nav label", has_text="ocr").click()
    assert keys() == ["small", "tall"]
    opened.locator("nav label", has_text="natural").click()
    assert keys() == ["large"]
    opened.locator("nav label", has_text="all").click()
    assert len(keys()) == 3 + len(HOSTILE)
    opened.keyboard.press("ArrowRight")
    assert len(keys()) == len(HOSTILE)
