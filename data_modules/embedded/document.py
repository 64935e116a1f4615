"""Document pictures: pages with printed strings in paragraphs, tables and forms."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from .assets import TEXT_FONTS, Split, ink_box, text_font
from .scene import Look, Scene, Thing, draw_size, draw_string

Color = tuple[int, int, int]

PAPERS: tuple[Color, ...] = ((255, 255, 255), (252, 250, 242), (246, 248, 252), (255, 248, 232), (240, 240, 238))
INKS: tuple[Color, ...] = ((15, 15, 20), (30, 30, 60), (60, 20, 20), (20, 50, 35), (50, 50, 50))


class Page:
    """A page under construction: paper, ink, font, and the strings printed so far."""

    def __init__(self, rng: Random, split: Split, look: Look, count: int) -> None:
        self.rng, self.split, self.look = rng, split, look
        self.width, self.height = draw_size(rng, look)
        self.u = max(self.width, self.height) / 128
        self.paper, self.ink = rng.choice(PAPERS), rng.choice(INKS)
        self.rule: Color = (rng.randint(150, 205),) * 3
        self.image = Image.new("RGB", (self.width, self.height), self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.texts: list[str] = []
        while len(self.texts) < count:
            text = draw_string(rng, look, split)
            if text not in self.texts:
                self.texts.append(text)
        self.choose_font()
        self.things: list[Thing] = []

    def choose_font(self) -> None:
        """A font and a size at which two of the strings fit side by side; `text_w`, `text_h` bound every string."""
        name = self.rng.choice(TEXT_FONTS[: self.look.num_fonts])
        size_px = round(self.rng.uniform(*self.look.letters_u) * self.u)
        while True:
            self.font = text_font(name, size_px)
            boxes = [ink_box(self.font, text) for text in self.texts]
            self.text_w = max(box[2] - box[0] for box in boxes)
            self.text_h = max(box[3] - box[1] for box in boxes)
            if self.text_w <= (self.width - 26 * self.u) / 2 or size_px <= 8:
                return
            size_px -= 1

    def string(self, x: float, y: float) -> None:
        """Print the next string with its ink's left upper corner near (x, y), pixels."""
        text = self.texts[len(self.things)]
        left, top, right, bottom = ink_box(self.font, text)
        x0, y0 = round(x - left), round(y - top)
        self.draw.text((x0, y0), text, font=self.font, fill=self.ink)
        self.things.append(Thing(text, "text", (x0 + left, y0 + top, x0 + right, y0 + bottom)))

    def bar(self, x0: float, y: float, x1: float) -> None:
        """A grey bar that stands for a line of small print."""
        if x1 - x0 > 4 * self.u:
            half = 1.1 * self.u
            self.draw.rounded_rectangle((x0, y - half, x1, y + half), radius=half, fill=self.rule)

    def scene(self) -> Scene:
        """The finished page."""
        return Scene(self.image, tuple(self.things))


def paragraph(page: Page, count: int) -> None:
    """Strings in the lines of a paragraph of small print, one or two a line."""
    rng, u = page.rng, page.u
    margin, pitch = 6 * u, page.text_h + rng.uniform(8, 11) * u
    num_lines = int((page.height - 2 * margin + pitch - page.text_h) // pitch)
    per_line = [1] * num_lines
    for line in rng.sample(range(num_lines), num_lines):
        if sum(per_line) < count:
            per_line[line] = 2
    skip = set(rng.sample(range(num_lines), max(0, num_lines - count)))
    for line in range(num_lines):
        y = margin + line * pitch
        number = 0 if line in skip else per_line[line]
        slack = page.width - 2 * margin - number * page.text_w
        x, middle = margin, y + page.text_h / 2
        for _ in range(number):
            step = rng.uniform(0, max(0.0, slack - (number - 1) * 12 * u)) / number
            page.bar(x, middle, x + step - 4 * u)
            page.string(x + step, y)
            x += step + page.text_w + 10 * u
        page.bar(x, middle, page.width - margin - rng.uniform(0, 25) * u)


def table(page: Page, count: int) -> None:
    """Strings in the cells of a ruled table; the other cells are empty or hold a bar."""
    rng, u = page.rng, page.u
    columns = 3 if (page.width - 6 * u) / 3 >= page.text_w + 10 * u and rng.random() < 0.7 else 2
    rows = max(-(-count // columns), rng.randint(3, 5))
    rows = min(rows, int((page.height - 6 * u) // (page.text_h + 8 * u)))
    top = rng.uniform(2, max(2.0, (page.height - rows * (page.text_h + 8 * u)) / u - 4)) * u
    cell_w, cell_h = (page.width - 6 * u) / columns, page.text_h + 8 * u
    line = max(1, round(0.8 * u))
    filled = set(rng.sample(range(rows * columns), min(count, rows * columns)))
    for cell in range(rows * columns):
        x, y = 3 * u + cell % columns * cell_w, top + cell // columns * cell_h
        fill = (225, 230, 240) if cell < columns else None
        page.draw.rectangle((x, y, x + cell_w, y + cell_h), outline=page.rule, width=line, fill=fill)
        if cell in filled:
            page.string(x + rng.uniform(0.35, 0.65) * max(0.0, cell_w - page.text_w), y + (cell_h - page.text_h) / 2)
        elif rng.random() < 0.6:
            page.bar(x + 6 * u, y + cell_h / 2, x + cell_w * rng.uniform(0.4, 0.8))


def form(page: Page, count: int) -> None:
    """Fields of a form: a bar for the caption, a frame or a line with the string; two columns when many."""
    rng, u = page.rng, page.u
    columns = 2 if count > 4 or rng.random() < 0.3 else 1
    field_h = page.text_h + 7 * u
    rows = -(-count // columns)
    pitch = min((page.height - 4 * u) / rows, field_h + 12 * u)
    framed = rng.random() < 0.6
    line = max(1, round(0.8 * u))
    for field in range(count):
        left = 3 * u + field % columns * (page.width - 4 * u) / columns
        right = left + (page.width - 4 * u) / columns - 4 * u
        y = 2 * u + field // columns * pitch + max(0.0, pitch - field_h) / 2
        if columns == 1:
            page.bar(left + 2 * u, y + field_h / 2, left + rng.uniform(18, 34) * u)
            left += 38 * u
        if framed:
            page.draw.rounded_rectangle((left, y, right, y + field_h), radius=3 * u, outline=page.rule, width=line)
        else:
            page.draw.line((left, y + field_h - u, right, y + field_h - u), fill=page.rule, width=line)
        slack = max(0.0, right - left - page.text_w - 8 * u)
        page.string(left + 4 * u + rng.uniform(0, slack), y + 3 * u)


def scene(rng: Random, split: Split, look: Look) -> Scene:
    """A page with printed strings."""
    count = rng.randint(*look.num_objects)
    page = Page(rng, split, look, count)
    rng.choice((paragraph, table, form))(page, count)
    return page.scene()
