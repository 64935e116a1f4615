"""Pictures of results: marks drawn on the image, the question, the truth and the answer, right or wrong at a glance.

Points are discs, boxes rectangles, strokes polylines; every mark carries its number. Sizes are pixels of the panel,
which is made 1320 px wide so that text stays readable when a page shows it at two thirds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from bestiary.evaluation.report import MarkResult
from bestiary.schema import Region, Sample, SampleError
from bestiary.vision.geometry import Box
from bestiary.vision.image import decode_rgb

Colour = tuple[int, int, int]

MARK_COLOURS: tuple[Colour, ...] = (
    (214, 39, 40),
    (31, 97, 190),
    (24, 134, 62),
    (148, 62, 178),
    (214, 110, 0),
    (0, 128, 140),
    (190, 30, 120),
    (120, 80, 40),
)
INK: Colour = (32, 34, 38)
FAINT: Colour = (112, 116, 124)
RIGHT: Colour = (20, 118, 52)
WRONG: Colour = (190, 30, 34)
ANSWER: Colour = (31, 97, 190)
PAPER: Colour = (255, 255, 255)
GAP: Colour = (236, 238, 241)

CELL_PX = 424
MARGIN_PX = 12
TEXT_PX = 19
LINE_PX = 26
TABLE_COLUMNS = ("picture", "domain and task", "question", "reference", "prediction", "shuffled prompts", "correct")
MARKED_PX = 848
"""Marks are drawn on a picture enlarged to about this side, so that numbers stay sharp on tiny pictures."""
NO_PICTURE_PX = (848, 16)
"""What stands for the picture of a question without one; it takes no square of the panel."""


@dataclass(frozen=True, slots=True)
class PanelRow:
    """One question about one picture.

    picture: RGB with the marks drawn. marks: empty where the answer is not given by region.
    """

    picture: Image.Image
    title: str
    question: str
    reference: str
    prediction: str
    control: str | None
    is_correct: bool
    marks: tuple[MarkResult, ...] = ()


def open_picture(sample: Sample) -> Image.Image:
    """The sample's first image in RGB; a thin grey strip for a sample without one."""
    if not sample.images:
        return Image.new("RGB", NO_PICTURE_PX, GAP)
    try:
        return Image.fromarray(decode_rgb(sample.images[0]))
    except ValueError as error:
        raise SampleError(sample.key, f"cannot draw its picture: {error}") from error


def draw_marks(picture: Image.Image, regions: Sequence[Region]) -> Image.Image:
    """A copy with every region drawn in its own colour under its number; small pictures are enlarged first."""
    canvas = _enlarged(picture)
    unit = max(canvas.size) / 100
    draw = ImageDraw.Draw(canvas)
    for region in regions:
        _draw_shape(draw, region, canvas.size, unit)
    for region in regions:  # numbers last: no shape covers them
        _draw_number(draw, region, canvas.size, unit)
    return canvas


def draw_boxes(picture: Image.Image, *, truth: Box | None, answer: Box | None) -> Image.Image:
    """A copy with the true box and the answered one, each named; fractions of the picture, cut at its border."""
    canvas = _enlarged(picture)
    unit = max(canvas.size) / 100
    draw = ImageDraw.Draw(canvas)
    for name, box, colour in (("truth", truth, RIGHT), ("answer", answer, ANSWER)):
        if box is not None:
            _draw_named_box(draw, name, box, colour, canvas.size, unit)
    return canvas


def panel(rows: Sequence[PanelRow], *, columns: int = 3) -> Image.Image:
    """All rows as a grid of cells: picture above, question, truth and answer below."""
    if not rows:
        raise ValueError("no rows to draw; ask for at least one picture")
    columns = min(columns, len(rows))
    cells = [_cell(row) for row in rows]
    lines = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in line) for line in lines]
    width = columns * CELL_PX + (columns + 1) * MARGIN_PX
    sheet = Image.new("RGB", (width, sum(heights) + (len(lines) + 1) * MARGIN_PX), GAP)
    y = MARGIN_PX
    for line, height in zip(lines, heights, strict=True):
        for i, cell in enumerate(line):
            x = MARGIN_PX + i * (CELL_PX + MARGIN_PX)
            sheet.paste(PAPER, (x, y, x + CELL_PX, y + height))
            sheet.paste(cell, (x, y))
        y += height + MARGIN_PX
    return sheet


def table_row(row: PanelRow) -> tuple[Any, ...]:
    """The row under TABLE_COLUMNS; the picture is PIL, for the logger to wrap."""
    control = "" if row.control is None else row.control
    return row.picture, row.title, row.question, row.reference, row.prediction, control, row.is_correct


def to_png(picture: Image.Image) -> bytes:
    """PNG bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def colour_of(mark: int) -> Colour:
    """The colour a mark has in the picture and in the text below it."""
    return MARK_COLOURS[(mark - 1) % len(MARK_COLOURS)]


def _enlarged(picture: Image.Image) -> Image.Image:
    """A copy in RGB, small pictures enlarged so that what is drawn on them stays sharp."""
    factor = max(1.0, MARKED_PX / max(picture.size))
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    canvas = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC) if factor > 1 else picture.convert("RGB")
    return canvas.copy()


def _draw_named_box(
    draw: ImageDraw.ImageDraw, name: str, box: Box, colour: Colour, size: tuple[int, int], unit: float
) -> None:
    """The box, and its name: the truth's above its first corner, the answer's below its last one."""
    places = [min(max(c, 0.0), 1.0) * (size[i % 2] - 1) for i, c in enumerate(box)]
    x0, x1 = sorted(places[0::2])
    y0, y1 = sorted(places[1::2])
    thick = max(2, round(0.6 * unit))
    draw.rectangle((x0, y0, x1, y1), outline=PAPER, width=thick + 2)
    draw.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 1), max(y0 + 1, y1 - 1)), outline=colour, width=thick)
    font = _font(3.4 * unit)
    width, height = font.getlength(name) + unit, 4 * unit
    is_truth = name == "truth"
    left = min(x0, size[0] - width) if is_truth else max(0.0, x1 - width)
    top = max(0.0, y0 - height) if is_truth else min(y1, size[1] - height)
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    draw.text((left + unit / 2, top + height / 2), name, fill=PAPER, font=font, anchor="lm")


def _draw_shape(draw: ImageDraw.ImageDraw, region: Region, size: tuple[int, int], unit: float) -> None:
    points = _pixels(region, size)
    colour, thick = colour_of(region.mark), max(2, round(0.7 * unit))
    if region.kind == "box":
        (x0, y0), (x1, y1) = points
        draw.rectangle((x0, y0, x1, y1), outline=PAPER, width=thick + 2)
        draw.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 1), max(y0 + 1, y1 - 1)), outline=colour, width=thick)
    elif region.kind == "stroke":
        draw.line(points, fill=PAPER, width=thick + 4, joint="curve")
        draw.line(points, fill=colour, width=thick, joint="curve")


def _draw_number(draw: ImageDraw.ImageDraw, region: Region, size: tuple[int, int], unit: float) -> None:
    """A disc with the mark's number: on a point itself, at the first corner of anything else, inside the picture."""
    radius = 2.9 * unit
    x, y = _pixels(region, size)[0]
    x, y = _inside(x, radius, size[0]), _inside(y, radius, size[1])
    draw.ellipse(
        (x - radius, y - radius, x + radius, y + radius),
        fill=colour_of(region.mark),
        outline=PAPER,
        width=max(2, round(0.35 * unit)),
    )
    draw.text((x, y), str(region.mark), fill=PAPER, font=_font(4.0 * unit), anchor="mm")


def _inside(place: float, radius: float, side: int) -> float:
    """The nearest place where a disc fits between 0 and `side`, the middle where none does."""
    last = side - 1 - radius
    return min(max(place, radius), last) if last >= radius else (side - 1) / 2


def _pixels(region: Region, size: tuple[int, int]) -> list[tuple[float, float]]:
    width, height = size[0] - 1, size[1] - 1
    return [(x * width, y * height) for x, y in zip(region.coords[0::2], region.coords[1::2], strict=True)]


def _cell(row: PanelRow) -> Image.Image:
    """One picture with its text, as high as the text needs."""
    cell = Image.new("RGB", (CELL_PX, CELL_PX + 40 * LINE_PX), PAPER)
    fitted = ImageOps.contain(row.picture, (CELL_PX, CELL_PX), Image.Resampling.LANCZOS)
    height = fitted.height if row.picture.size == NO_PICTURE_PX else CELL_PX
    cell.paste(GAP, (0, 0, CELL_PX, height))
    cell.paste(fitted, ((CELL_PX - fitted.width) // 2, (height - fitted.height) // 2))
    text = _Text(cell, y=height + 8)
    text.write(row.title, colour=FAINT, indent=0, most_lines=1)
    text.write(row.question, colour=INK, indent=0, most_lines=2)
    text.y += 4
    for mark in row.marks:
        text.mark(mark)
    if not row.marks:
        text.answer(row.prediction or "(empty)", row.reference, row.is_correct, indent=0)
    return cell.crop((0, 0, CELL_PX, min(text.y + 8, cell.height)))


class _Text:
    """Lines of text flowing down a cell."""

    def __init__(self, cell: Image.Image, *, y: int) -> None:
        self._draw = ImageDraw.Draw(cell)
        self.y = y

    def write(self, text: str, *, colour: Colour, indent: int, most_lines: int) -> None:
        """Wrapped text; what does not fit ends in an ellipsis."""
        for line in _wrap(text, CELL_PX - 2 * MARGIN_PX - indent, most_lines):
            self._draw.text((MARGIN_PX + indent, self.y), line, fill=colour, font=_font(TEXT_PX))
            self.y += LINE_PX

    def mark(self, result: MarkResult) -> None:
        """The mark's number in its colour, then what was said of it."""
        y = self.y + LINE_PX // 2 - 2
        self._draw.ellipse((MARGIN_PX, y - 11, MARGIN_PX + 22, y + 11), fill=colour_of(result.mark))
        self._draw.text((MARGIN_PX + 11, y), str(result.mark), fill=PAPER, font=_font(16), anchor="mm")
        said = "(left out)" if result.predicted is None else result.predicted or "(empty)"
        self.answer(said, result.truth, result.is_correct, indent=30)

    def answer(self, said: str, truth: str, is_correct: bool, *, indent: int) -> None:
        """A tick and the answer, or a cross, the answer and the truth: colour alone does not reach every reader."""
        x, y = MARGIN_PX + indent, self.y + LINE_PX // 2 - 2
        if is_correct:
            self._draw.line([(x + 2, y), (x + 8, y + 7), (x + 20, y - 8)], fill=RIGHT, width=4, joint="curve")
        else:
            self._draw.line([(x + 4, y - 7), (x + 18, y + 7)], fill=WRONG, width=4)
            self._draw.line([(x + 4, y + 7), (x + 18, y - 7)], fill=WRONG, width=4)
        self.write(said, colour=RIGHT if is_correct else WRONG, indent=indent + 30, most_lines=4)
        if not is_correct:
            self.write(f"truth: {truth}", colour=FAINT, indent=indent + 30, most_lines=4)


def _wrap(text: str, width_px: int, most_lines: int) -> list[str]:
    """Lines at most `width_px` wide, broken between words, inside a word only where it is wider than a line."""
    font = _font(TEXT_PX)
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width_px:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width_px:
                lines.append("")
            lines[-1] += letter
        if len(lines) > most_lines:
            break
    if len(lines) <= most_lines:
        return lines
    last = lines[most_lines - 1]
    while last and font.getlength(f"{last} ...") > width_px:
        last = last[:-1]
    return [*lines[: most_lines - 1], f"{last} ..."]


def _font(size_px: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)
