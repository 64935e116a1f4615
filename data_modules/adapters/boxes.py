"""Published coordinates as fractions of the original picture: pixels (points, xywh, xyxy) and thousandths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bestiary.schema import Region
from data_modules.adapters.fields import shown
from data_modules.adapters.protocol import RejectedRecordError, Rejection
from data_modules.records import ROUNDING

THOUSANDTHS = 1000
_LARGEST = 1e9


@dataclass(frozen=True, slots=True)
class Frame:
    """The picture that coordinates in pixels speak of, and what to do with those that do not fit.

    width, height: pixels of the original. clip: boxes are cut and points moved to the border, instead of refused (a box
    that lies wholly outside stays refused).
    widen: a box without width or height becomes one pixel wide or high.
    """

    width: int
    height: int
    clip: bool = False
    widen: bool = False

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def numbers(found: object, count: int, what: str, where: str) -> tuple[float, ...]:
    """So many finite numbers in a list, as they are; RejectedRecordError otherwise."""
    if not isinstance(found, list) or len(found) != count or not all(map(_is_number, found)):
        raise _rejected(where, f"{what} is {shown(found)}; it must be {count} finite numbers")
    return tuple(found)


def point_regions(found: object, frame: Frame, where: str) -> tuple[Region, ...]:
    """`[[x, y], ...]` in pixels as points with the marks 1, 2, ..."""
    regions = []
    for mark, point in enumerate(_listed(found, "points", where), start=1):
        x, y = numbers(point, 2, f"point {mark}", where)
        told = f"point {mark} {point}"
        coords = (_place(x, frame.width, told, frame, where), _place(y, frame.height, told, frame, where))
        regions.append(Region("point", coords, mark))
    return tuple(regions)


def box_regions(found: object, frame: Frame, where: str) -> tuple[Region, ...]:
    """`[[x, y, width, height], ...]` in pixels as boxes with the marks 1, 2, ..."""
    return tuple(
        Region("box", box_fractions(numbers(box, 4, f"box {mark}", where), frame, f"box {mark} {box}", where), mark)
        for mark, box in enumerate(_listed(found, "bbox", where), start=1)
    )


def box_fractions(xywh: Sequence[float], frame: Frame, told: str, where: str) -> tuple[float, float, float, float]:
    """One box of x, y, width, height in pixels as x0, y0, x1, y1 in fractions; `told` names it in errors."""
    x, y, width, height = xywh
    x0, x1 = _span(x, x + width, frame.width, told, frame, where)
    y0, y1 = _span(y, y + height, frame.height, told, frame, where)
    return x0, y0, x1, y1


def corner_fractions(xyxy: Sequence[float], frame: Frame, told: str, where: str) -> tuple[float, float, float, float]:
    """One box of two corners in pixels as fractions; `told` names it in errors."""
    x0, x1 = _span(xyxy[0], xyxy[2], frame.width, told, frame, where)
    y0, y1 = _span(xyxy[1], xyxy[3], frame.height, told, frame, where)
    return x0, y0, x1, y1


def thousandths(values: Sequence[int], told: str, where: str, *, clip: bool) -> list[float]:
    """Whole numbers of 0 to 1000 as fractions. clip: larger ones count as 1000, instead of being refused."""
    if max(values) > THOUSANDTHS and not clip:
        raise _rejected(where, f"{told} goes beyond {THOUSANDTHS}; rescale it or give --option clip=true")
    return [min(value, THOUSANDTHS) / THOUSANDTHS for value in values]


def _listed(found: object, name: str, where: str) -> list[Any]:
    if not isinstance(found, list):
        raise _rejected(where, f"{name} is {shown(found)}; it must be a list of lists of numbers")
    return found


def _is_number(value: object) -> bool:
    # The bounds refuse NaN and infinities, and whole numbers too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _place(value: float, size: int, told: str, frame: Frame, where: str) -> float:
    """A coordinate along an axis of `size` pixels as a fraction; ROUNDING outside is on the border."""
    fraction = value / size
    if not frame.clip and not -ROUNDING <= fraction <= 1 + ROUNDING:
        raise _outside(told, frame, where)
    return min(max(fraction, 0.0), 1.0)


def _span(low: float, high: float, size: int, told: str, frame: Frame, where: str) -> tuple[float, float]:
    """Both ends of a box along an axis of `size` pixels as fractions, the lower one first."""
    if high < low:
        raise _rejected(where, f"{told} has a negative size; give x, y of its upper left corner")
    if low > size or high < 0:
        raise _rejected(where, f"{told} lies wholly outside its picture of {frame} pixels; correct it")
    start, stop = _place(low, size, told, frame, where), _place(high, size, told, frame, where)
    if start < stop:
        return start, stop
    if not frame.widen:
        raise _rejected(
            where, f"{told} has no area in its picture of {frame} pixels; correct it or give --option widen=true"
        )
    middle = min(max(start * size, 0.5), size - 0.5)
    return (middle - 0.5) / size, (middle + 0.5) / size


def _outside(told: str, frame: Frame, where: str) -> RejectedRecordError:
    return _rejected(
        where, f"{told} leaves its picture of {frame} pixels; correct it or give --option clip=true to cut it"
    )


def _rejected(where: str, problem: str) -> RejectedRecordError:
    return RejectedRecordError(where, problem, Rejection.REGION)
