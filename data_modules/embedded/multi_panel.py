"""Multi-panel pictures: panels with objects on photos, icons on tiles, handwritten digits and small charts."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw, ImageOps

from . import natural, screenshot
from .assets import CHART_COLORS, CHART_NAMES, DIGIT_NAMES, Split, digit_ink, digit_places
from .scene import Look, PxBox, Scene, Thing, draw_labels, place, whole

GRIDS = ((2, 2), (2, 2), (2, 2), (2, 2), (2, 1), (1, 2), (3, 1), (1, 3))
"""Columns and rows of panels; repeated ones come more often."""
_PEN = [max(0, min(255, (value - 60) * 11 // 5)) for value in range(256)]
_SOLID = [0] * 100 + [255] * 156
KINDS = ("object", "icon", "digit", "chart")
PENS = ((20, 30, 110), (25, 25, 25), (110, 25, 35), (20, 80, 50))


def pool(kind: str, look: Look) -> tuple[str, ...]:
    """Labels that things of a kind may have."""
    if kind == "object":
        return natural.names(look)
    if kind == "icon":
        return screenshot.names(look)
    return DIGIT_NAMES if kind == "digit" else CHART_NAMES


def panel_boxes(rng: Random, look: Look, num_min: int) -> tuple[tuple[int, int], list[PxBox], float]:
    """Size of the picture, the boxes of its panels in reading order, pixels of one u."""
    columns, rows = rng.choice([grid for grid in GRIDS if grid[0] * grid[1] * 2 >= num_min])
    long = rng.choice(look.long_px)
    u = long / 128
    width, height = long, long
    if columns != rows:
        short = round(long * rng.uniform(0.62, 1.0))
        width, height = (long, short) if columns > rows else (short, long)
    elif rng.random() < look.odd_share:
        short = round(long * rng.uniform(0.85, 1.0))
        width, height = (long, short) if rng.random() < 0.5 else (short, long)
    gap = rng.uniform(1.5, 4) * u
    panel_w, panel_h = (width - gap * (columns + 1)) / columns, (height - gap * (rows + 1)) / rows
    boxes = []
    for row in range(rows):
        for column in range(columns):
            x, y = gap + column * (panel_w + gap), gap + row * (panel_h + gap)
            boxes.append((float(round(x)), float(round(y)), float(round(x + panel_w)), float(round(y + panel_h))))
    return (width, height), boxes, u


def has_room(box: PxBox, u: float) -> bool:
    """Whether two things of the smallest size fit into a panel."""
    sides = box[2] - box[0], box[3] - box[1]
    return max(sides) >= 66 * u and min(sides) >= 34 * u


def deal(rng: Random, boxes: list[PxBox], count: int, u: float) -> list[tuple[str, int]]:
    """What each panel holds: the kind and how many; a second thing only where there is room for it."""
    roomy = [index for index, b in enumerate(boxes) if has_room(b, u)]
    doubles = set(rng.sample(roomy, min(len(roomy), max(0, count - len(boxes)))))
    start = rng.sample(KINDS, len(KINDS))
    kinds = [start[index % len(KINDS)] if index < 2 else rng.choice(KINDS) for index in range(len(boxes))]
    for index in doubles:
        if kinds[index] == "chart":
            kinds[index] = rng.choice(KINDS[:3])
    return [(kind, 2 if index in doubles else 1) for index, kind in enumerate(kinds)]


def light_color(rng: Random) -> tuple[int, int, int]:
    """A pale colour for paper and tiles."""
    return rng.randint(222, 255), rng.randint(222, 255), rng.randint(222, 255)


def handwriting(rng: Random, name: str, split: Split) -> Image.Image:
    """A digit in pen ink, tightly cut; grey, 255 is ink, about 64 px high."""
    ink = digit_ink(rng.choice(digit_places(split)[name]))
    big = ImageOps.expand(ink, 1).resize((80, 80), Image.Resampling.BICUBIC)
    big = big.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC).point(_PEN)
    return big.crop(big.point(_SOLID).getbbox())


def draw_chart(rng: Random, draw: ImageDraw.ImageDraw, name: str, box: PxBox, u: float) -> None:
    """A small chart in one colour that fills `box`."""
    color, shape = name.split()
    fill = CHART_COLORS[color]
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    axis, line = (70, 70, 70), max(1, round(0.9 * u))
    if shape == "pie":
        radius = min(width, height) / 2
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
        circle = (cx - radius, cy - radius, cx + radius, cy + radius)
        start, extent = rng.uniform(0, 360), rng.uniform(50, 120)
        draw.ellipse(circle, fill=fill)
        draw.pieslice(circle, start, start + extent, fill=tuple((value + 3 * 255) // 4 for value in fill), outline=fill)
        return
    count = rng.randint(3, 5) if shape == "bars" else rng.randint(4, 6)
    heights = [rng.uniform(0.3, 1.0) for _ in range(count)]
    heights[rng.randrange(count)] = 1.0
    if shape == "bars":
        step = width / count
        for index, share in enumerate(heights):
            left = x0 + (index + 0.15) * step
            draw.rectangle((left, y1 - share * height, left + 0.7 * step, y1), fill=fill)
    else:
        points = [(x0 + (i + 0.3) * width / count, y1 - 0.9 * s * height) for i, s in enumerate(heights)]
        draw.line(points, fill=fill, width=max(2, round(2.6 * u)), joint="curve")
    draw.line([(x0, y0), (x0, y1), (x1, y1)], fill=axis, width=line)


def inset(box: PxBox, px: float) -> PxBox:
    """The box without a margin."""
    return box[0] + px, box[1] + px, box[2] - px, box[3] - px


class Panels:
    """A multi-panel picture under construction."""

    def __init__(self, rng: Random, split: Split, look: Look, size: tuple[int, int], u: float) -> None:
        self.rng, self.split, self.look, self.u = rng, split, look, u
        gray = rng.choice((255, 255, 245, 30, 0, 128))
        self.image = Image.new("RGB", size, (gray, gray, gray))
        self.draw = ImageDraw.Draw(self.image)
        self.things: list[Thing] = []

    def corners(self, sizes: list[tuple[int, int]], box: PxBox) -> list[tuple[float, float]] | None:
        """Places in a panel, or None if there are too few."""
        area = inset(box, 1.5 * self.u)
        if any(w > area[2] - area[0] or h > area[3] - area[1] for w, h in sizes):
            return None
        return place(self.rng, area, sizes, self.look.gap_u * self.u)

    def panel(self, kind: str, labels: list[str], box: PxBox) -> None:
        """Fill one panel."""
        x0, y0, x1, y1 = (round(value) for value in box)
        pen = self.rng.choice(PENS)
        if kind == "object":
            self.image.paste(natural.background(self.rng, (x1 - x0, y1 - y0), self.split), (x0, y0))
        elif kind == "icon" and self.rng.random() < 0.4:
            self.draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=self.rng.choice(screenshot.ACCENTS))
            pen = (255, 255, 255)
        else:
            self.draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=light_color(self.rng))
        if kind == "chart":
            self.chart(labels[0], box)
            return
        self.cut_outs(kind, labels, box, pen)

    def cut_outs(self, kind: str, labels: list[str], box: PxBox, pen: tuple[int, int, int]) -> None:
        """Objects, icons or digits at random sizes and places in a panel."""
        pictures = [self.cut(kind, label, pen) for label in labels]
        for attempt in range(80):
            most = 44 - min(16.0, attempt * 0.4)
            sizes = [natural.scaled(picture, self.rng.uniform(28.0, most) * self.u) for picture in pictures]
            corners = self.corners(sizes, box)
            if corners is not None:
                break
        else:
            raise ValueError(f"{labels} do not fit into a panel of {box[2] - box[0]} x {box[3] - box[1]} px")
        for label, picture, size, (x, y) in zip(labels, pictures, sizes, corners, strict=True):
            shadow = round(self.u) if kind == "object" else 0
            picture = picture.resize(size, Image.Resampling.BICUBIC)
            place_box, ink = natural.paste(self.image, picture, round(x), round(y), shadow)
            self.things.append(Thing(label, kind, place_box, ink if kind == "object" else None))

    def cut(self, kind: str, label: str, pen: tuple[int, int, int]) -> Image.Image:
        """An object, icon or digit, RGBA, tightly cut; `pen` colours the latter two."""
        if kind == "object":
            return natural.turned(self.rng, label)
        if kind == "digit":
            ink = handwriting(self.rng, label, self.split)
        else:
            canvas = Image.new("L", (128, 128))
            ink = canvas.crop(whole(screenshot.draw_icon(ImageDraw.Draw(canvas), label, (64, 64), 64, 255)))
        picture = Image.new("RGBA", ink.size, pen)
        picture.putalpha(ink)
        return picture

    def chart(self, label: str, box: PxBox) -> None:
        """A chart at a random size and place in its panel."""
        width, height = box[2] - box[0] - 6 * self.u, box[3] - box[1] - 6 * self.u
        chart_w, chart_h = (min(self.rng.uniform(36, 52) * self.u, side) for side in (width, height))
        if label.endswith("pie"):
            chart_w = chart_h = min(chart_w, chart_h)
        x = box[0] + 3 * self.u + self.rng.uniform(0, width - chart_w)
        y = box[1] + 3 * self.u + self.rng.uniform(0, height - chart_h)
        place_box = (x, y, x + chart_w, y + chart_h)
        draw_chart(self.rng, self.draw, label, place_box, self.u)
        self.things.append(Thing(label, "chart", place_box))


def scene(rng: Random, split: Split, look: Look) -> Scene:
    """Panels with one or two things each."""
    count = rng.randint(*look.num_objects)
    size, boxes, u = panel_boxes(rng, look, count)
    dealt = deal(rng, boxes, count, u)
    pools = [pool(kind, look) for kind, number in dealt for _ in range(number)]
    labels = draw_labels(rng, pools, split)
    panels = Panels(rng, split, look, size, u)
    for (kind, number), box in zip(dealt, boxes, strict=True):
        panels.panel(kind, [labels.pop(0) for _ in range(number)], box)
    return Scene(panels.image, tuple(panels.things))
