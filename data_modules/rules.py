"""The numbers that shape rows, and which of them belong together."""

from __future__ import annotations

from dataclasses import dataclass

from data_modules.grouped_order import ORDERS
from data_modules.packing import Budget
from data_modules.shares import UNITS
from data_modules.sources import StreamError


@dataclass(frozen=True, slots=True)
class Rules:
    """The numbers that shape rows; the names are those of the configuration's `data`."""

    seed: int
    num_lanes: int
    max_tokens: int
    max_views: int = 0
    packing: bool = True
    look_ahead: int = 16
    chunk: int = 1
    too_long: str = "error"
    bad_budget: float = 0.01
    augment: bool = True
    unit: str = "samples"
    temperature: float = 1.0
    order: str = "stratified"
    row_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("num_lanes", "max_tokens", "look_ahead", "chunk"):
            if getattr(self, name) < 1:
                raise StreamError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.row_tokens and (not self.packing or self.row_tokens < self.max_tokens):
            problem = f"is less than data.max_tokens={self.max_tokens}" if self.packing else "has no effect unpacked"
            raise StreamError(f"data.row_tokens={self.row_tokens} {problem}; leave it out, or change one of the two")
        if self.seed < 0 or self.max_views < 0:
            raise StreamError(f"seed={self.seed} and max_views={self.max_views} must not be negative")
        if self.too_long not in ("error", "skip", "truncate_text"):
            raise StreamError(f"too_long={self.too_long!r}; choose error, skip or truncate_text")
        if self.order not in ORDERS:
            raise StreamError(f"data.order={self.order!r}; choose {', '.join(ORDERS)}")
        if self.unit not in UNITS:
            raise StreamError(f"unit={self.unit!r}; choose {', '.join(UNITS)}")
        if not 0 < self.temperature < float("inf"):
            raise StreamError(f"data.temperature={self.temperature}; it must be a positive number, 1 changes nothing")
        if not 0 <= self.bad_budget <= 1:
            raise StreamError(f"bad_budget={self.bad_budget}; it is a share, from 0 to 1")

    @property
    def budget(self) -> Budget:
        """What a row may hold."""
        return Budget(self.row_tokens or self.max_tokens, self.max_views)
