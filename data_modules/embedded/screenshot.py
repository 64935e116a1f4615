"""Screenshot pictures: interfaces with named icons in bars, lists, grids, cards and dialogs."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from .assets import Split, icon_font, icon_glyph, icon_names, ink_box, text_font
from .scene import Look, PxBox, Scene, Thing, draw_labels, draw_size

Color = tuple[int, int, int]

ACCENTS: tuple[Color, ...] = (
    (33, 102, 214),
    (15, 138, 126),
    (190, 50, 60),
    (120, 70, 190),
    (200, 105, 20),
    (45, 130, 60),
    (190, 45, 120),
)
TITLES = ("Home", "Menu", "Files", "Tools", "Inbox", "Share", "Today", "Setup")


def names(look: Look) -> tuple[str, ...]:
    """Icon names in use."""
    return icon_names()[: look.num_names or None]


def draw_icon(
    draw: ImageDraw.ImageDraw, name: str, center: tuple[float, float], ink_px: float, fill: Color | int
) -> PxBox:
    """Draw an icon so that the longer side of its ink is about `ink_px`; returns the box of the ink."""
    glyph = icon_glyph(name)
    left, top, right, bottom = ink_box(icon_font(64), glyph)
    font = icon_font(max(8, round(64 * ink_px / max(right - left, bottom - top))))
    left, top, right, bottom = ink_box(font, glyph)
    x, y = round(center[0] - (left + right) / 2), round(center[1] - (top + bottom) / 2)
    draw.text((x, y), glyph, font=font, fill=fill)
    return x + left, y + top, x + right, y + bottom


def mix(a: Color, b: Color, share: float) -> Color:
    """A colour between a (0) and b (1)."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


class Screen:
    """An interface under construction: theme, pixels, and the icons drawn so far."""

    def __init__(self, rng: Random, split: Split, look: Look, count: int) -> None:
        self.rng, self.look = rng, look
        self.width, self.height = draw_size(rng, look)
        self.u = max(self.width, self.height) / 128
        self.labels = draw_labels(rng, [names(look)] * count, split)
        self.dark = rng.random() < 0.4
        self.accent = rng.choice(ACCENTS)
        shade = rng.randint(18, 45) if self.dark else rng.randint(232, 255)
        self.back: Color = (shade, shade, min(255, shade + rng.randint(0, 10)))
        self.card = mix(self.back, (255, 255, 255), 0.1) if self.dark else mix(self.back, (120, 130, 150), 0.12)
        self.front: Color = (235, 238, 245) if self.dark else (35, 38, 48)
        self.faint = mix(self.back, self.front, 0.22)
        self.image = Image.new("RGB", (self.width, self.height), self.back)
        self.draw = ImageDraw.Draw(self.image)
        self.things: list[Thing] = []

    @property
    def num_left(self) -> int:
        """Icons still to be drawn."""
        return len(self.labels) - len(self.things)

    def icon(self, x: float, y: float, room_px: float) -> None:
        """Draw the next icon in the middle of a place (x, y) with `room_px` of room, plain or on a button."""
        name = self.labels[len(self.things)]
        low, high = self.look.icon_u
        ink = min(self.rng.uniform(low, high) * self.u, room_px - 4 * self.u)
        style = self.rng.random()
        fill = self.front
        if style < 0.3 and ink + 8 * self.u <= room_px:
            half = ink / 2 + 4 * self.u
            radius = self.rng.choice((0.25, 0.5, 1.0)) * half
            self.draw.rounded_rectangle((x - half, y - half, x + half, y + half), radius=radius, fill=self.accent)
            fill = (255, 255, 255)
        elif style < 0.6:
            fill = mix(self.accent, (255, 255, 255), 0.35) if self.dark else self.accent
        self.things.append(Thing(name, "icon", draw_icon(self.draw, name, (x, y), ink, fill)))

    def bar(self, x0: float, y: float, x1: float, half_u: float = 1.6) -> None:
        """A line of text too small to read."""
        half = half_u * self.u
        if x1 - x0 > 3 * half:
            self.draw.rounded_rectangle((x0, y - half, x1, y + half), radius=half, fill=self.faint)

    def title(self, height_px: float) -> None:
        """A bar with a title across the top."""
        fill = self.accent if self.rng.random() < 0.6 else self.card
        self.draw.rectangle((0, 0, self.width, height_px), fill=fill)
        ink: Color = (255, 255, 255) if fill == self.accent else self.front
        font = text_font("grotesk", max(6, round(height_px * 0.62)))
        self.draw.text((4 * self.u, height_px * 0.14), self.rng.choice(TITLES), font=font, fill=ink)
        for dot in range(3):
            x, r = self.width - (5 + 6 * dot) * self.u, 1.7 * self.u
            self.draw.ellipse((x - r, height_px / 2 - r, x + r, height_px / 2 + r), fill=mix(fill, ink, 0.6))

    def scene(self) -> Scene:
        """The finished interface."""
        return Scene(self.image, tuple(self.things))


def grid(screen: Screen, box: PxBox, columns: int, rows: int) -> None:
    """Icons in cells of a grid, on tiles or on the plain background; cells left over stay empty."""
    rng, u = screen.rng, screen.u
    cell_w, cell_h = (box[2] - box[0]) / columns, (box[3] - box[1]) / rows
    tiles = rng.random() < 0.5
    for cell in sorted(rng.sample(range(columns * rows), min(screen.num_left, columns * rows))):
        x, y = box[0] + (cell % columns + 0.5) * cell_w, box[1] + (cell // columns + 0.5) * cell_h
        if tiles:
            frame = (
                x - cell_w / 2 + 1.5 * u,
                y - cell_h / 2 + 1.5 * u,
                x + cell_w / 2 - 1.5 * u,
                y + cell_h / 2 - 1.5 * u,
            )
            screen.draw.rounded_rectangle(frame, radius=4 * u, fill=screen.card)
        screen.icon(x, y, min(cell_w, cell_h))


def fit_grid(screen: Screen, box: PxBox) -> None:
    """A grid with room for all icons left, cells as square as they come."""
    width, height = box[2] - box[0], box[3] - box[1]
    best = max(
        ((c, r) for c in range(1, 5) for r in range(1, 5) if c * r >= screen.num_left),
        key=lambda cr: min(width / cr[0], height / cr[1]) - 0.01 * cr[0] * cr[1],
    )
    grid(screen, box, *best)


def app_grid(screen: Screen) -> None:
    """A launcher: a grid of icons, with or without a title."""
    top = screen.rng.choice((0, 14)) * screen.u
    if top:
        screen.title(top)
    fit_grid(screen, (screen.u, top + screen.u, screen.width - screen.u, screen.height - screen.u))


def rows(screen: Screen) -> None:
    """List rows: an icon at the left, text bars, sometimes a second icon at the right."""
    rng, u = screen.rng, screen.u
    row_h = 32 * u
    num_rows = max(2, int(screen.height // row_h))
    row_h = screen.height / num_rows
    pairs = set(rng.sample(range(num_rows), min(num_rows, max(0, screen.num_left - num_rows))))
    for row in range(num_rows):
        if not screen.num_left:
            break
        y = (row + 0.5) * row_h
        if rng.random() < 0.5:
            screen.draw.rectangle((0, row * row_h, screen.width, (row + 1) * row_h - u), fill=screen.card)
        screen.icon(20 * u, y, row_h)
        text_end = screen.width - (44 if row in pairs else 6) * u
        screen.bar(42 * u, y - 4 * u, rng.uniform(0.6, 1.0) * (text_end - 42 * u) + 42 * u, 2.2)
        screen.bar(42 * u, y + 5 * u, rng.uniform(0.3, 0.9) * (text_end - 42 * u) + 42 * u)
        if row in pairs:
            screen.icon(screen.width - 21 * u, y, row_h)


def toolbar(screen: Screen) -> None:
    """A bar of icons along the bottom, the rest on a card above it."""
    rng, u = screen.rng, screen.u
    bar_h = 36 * u
    in_bar = min(max(2, screen.num_left - 2), 3, screen.num_left)
    card = (3 * u, 3 * u, screen.width - 3 * u, screen.height - bar_h - 3 * u)
    screen.draw.rounded_rectangle(card, radius=5 * u, fill=screen.card)
    rest = screen.num_left - in_bar
    screen.draw.rectangle(
        (0, screen.height - bar_h, screen.width, screen.height), fill=mix(screen.back, screen.accent, 0.15)
    )
    for place in range(in_bar):
        screen.icon((place + 0.5) * screen.width / in_bar, screen.height - bar_h / 2, min(bar_h, screen.width / in_bar))
    if rest:
        fit_grid(screen, card)
    else:
        for line in range(4):
            screen.bar(8 * u, (14 + 12 * line) * u, rng.uniform(0.4, 0.9) * screen.width)


def dialog(screen: Screen) -> None:
    """A window over a dimmed screen: title, icons, text."""
    rng, u = screen.rng, screen.u
    screen.draw.rectangle((0, 0, screen.width, screen.height), fill=mix(screen.back, (0, 0, 0), 0.35))
    box = (3 * u, 3 * u, screen.width - 3 * u, screen.height - 3 * u)
    screen.draw.rounded_rectangle(box, radius=6 * u, fill=screen.back, outline=screen.faint, width=max(1, round(u)))
    screen.bar(9 * u, 10 * u, rng.uniform(0.4, 0.8) * screen.width, 2.4)
    fit_grid(screen, (box[0] + u, box[1] + 13 * u, box[2] - u, box[3] - u))


def scene(rng: Random, split: Split, look: Look) -> Scene:
    """An interface with named icons."""
    screen = Screen(rng, split, look, rng.randint(*look.num_objects))
    rng.choice((app_grid, app_grid, rows, toolbar, dialog))(screen)
    return screen.scene()
