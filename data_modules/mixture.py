"""Which source a lane draws from next.

    mixture = Mixture(shares, num_lanes)           # shared by all lanes, read-only
    cursor = mixture.lane(lane, state.mix)         # state.mix == [] at the start, and after a change of the mix
    source = cursor.choose(step)                   # step: the lane's own row number; the same until count() is called
    cursor.count(source, tokens, targets)          # once the sample is found; a damaged one is replaced, not counted
    state.mix = cursor.state()                     # small signed integers for LaneState.mix; [] with one source

All lanes of a stream start at `[]` together. Integers only, so the order is the same on every machine. Two modes:

Fixed shares of samples (`dealing.py`). Draws are organised in rounds: a lane's k-th draw belongs to round k. The counts
of all lanes together after any round are within ONE sample of their shares, for any number of lanes and any shares;
this is proved there. A single lane stays within a few samples of its own shares, however long it runs: below 3 in all
mixes tried (2 to 47 sources, 1 to 256 lanes, 20,000 rounds). Without packing step k is round k, so the promise holds at
every step. With packing lanes are in different rounds at a step: what all lanes drew is then within the sum of what
single lanes are off, at most 3 * N and typically sqrt(N) samples, and does not grow with the number of steps.

Shares that change with the step, or that are shares of tokens or target tokens (`credits.py`). Every lane draws the
source that is owed most. A lane stays within H(S) = 1 + 1/2 + ... + 1/S times its largest sample of what each of its S
sources is owed above, and once its largest sample below, plus one sample of its warm start; about two samples in
practice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from data_modules.credits import CreditCursor, Credits
from data_modules.dealing import Dealing, DealtCursor
from data_modules.shares import ONE, Shares

__all__ = ["ONE", "Cursor", "Mixture"]


class Cursor(Protocol):
    """The mixture as one lane sees it."""

    def choose(self, step: int) -> int:
        """Number of the source to draw from in row `step`."""

    def count(self, source: int, tokens: int, targets: int) -> None:
        """One sample of the chosen source was drawn."""

    def state(self) -> list[int]:
        """What `Mixture.lane` needs to go on from here."""


class Mixture:
    """The shares of a mix as lanes follow them; `lane` gives one of them its cursor."""

    def __init__(self, shares: Shares, num_lanes: int) -> None:
        self.resolved = shares
        self.num_lanes = num_lanes
        self._rule: Credits | Dealing | None = None
        if shares.is_fixed and shares.unit == "samples":
            self._rule = Dealing(shares.at(0), num_lanes) if len(shares.names) > 1 else None
        elif len(shares.names) > 1:
            self._rule = Credits(shares, num_lanes)

    @property
    def shares(self) -> tuple[int, ...]:
        """Shares at step 0, in the unit of the mix; they sum to ONE."""
        return self.resolved.at(0)

    def lane(self, lane: int, mix: Sequence[int] = ()) -> Cursor:
        """A lane's cursor after `mix`, which its state() gave; ValueError where `mix` cannot be of this mixture."""
        if self._rule is None:
            if mix:
                raise _foreign(lane, mix)
            return _OnlyOne()
        try:
            cursor: CreditCursor | DealtCursor = self._rule.lane(lane, mix)
        except (IndexError, ValueError) as error:
            raise _foreign(lane, mix) from error
        return cursor

    def told(self) -> list[Any]:
        """What decides the order, for the fingerprint: an integer share for each source, or its schedule of weights."""
        return self.resolved.told()


class _OnlyOne:
    """The cursor of a mix of one source."""

    def choose(self, step: int) -> int:
        return 0

    def count(self, source: int, tokens: int, targets: int) -> None:
        return

    def state(self) -> list[int]:
        return []


def _foreign(lane: int, mix: Sequence[int]) -> ValueError:
    return ValueError(f"lane {lane}: mixture state {list(mix)[:4]}... belongs to another mix; start again with []")
