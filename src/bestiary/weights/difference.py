"""What a trained model adds to its base, tensor by tensor, and how exactly base + difference gives the model back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bestiary.variants.pickles import same_bits

Whole = Callable[[str], torch.Tensor]


class Difference:
    """Published tensors of `own` minus those of `base`, as `dtype`; tensors that are equal in both are left out.

    A reader adds in the wider of both dtypes and brings the sum to the base's, as `bestiary weights import` does and
    the published loader does. num_inexact, largest: values that this does not give back bit for bit, and by how much
    the worst is off. In float32 they are few (a value far smaller than what it is added to); float16, the
    reference's dtype, drops what lies below 2^-11 of a difference or below 6e-8.
    """

    def __init__(self, own: Whole, base: Whole, names: Sequence[str], dtype: torch.dtype) -> None:
        self._own, self._base, self._dtype = own, base, dtype
        self.num_values = self.num_inexact = 0
        self.largest = 0.0
        self.names = [name for name in names if not self._equal(name)]
        if not self.names:
            raise ValueError("no tensor differs from the base, so there is nothing to write; is it the trained run?")
        self._counted: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        own, base = self._own(name), self._base(name)
        if not own.is_floating_point():
            raise ValueError(f"{name} holds {own.dtype}, of which no difference can be added; export it whole")
        found = difference(own, base, self._dtype)
        if not bool(found.isfinite().all()):
            raise ValueError(f"{name}: a difference is beyond {self._dtype}; use --delta-dtype float32")
        if name not in self._counted:
            self._counted.add(name)
            self._count(own, _sum(base, found))
        return found

    def _equal(self, name: str) -> bool:
        return same_bits(self._own(name), self._base(name))

    def _count(self, own: torch.Tensor, back: torch.Tensor) -> None:
        self.num_values += own.numel()
        off = own != back
        self.num_inexact += int(off.sum())
        if bool(off.any()):
            self.largest = max(self.largest, float((own.double() - back.double()).abs().max()))


def difference(own: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """own - base rounded to `dtype`, and moved to a neighbour where only that gives `own` back."""
    found = (own.double() - base.double()).to(dtype)
    off = _sum(base, found) != own
    for side in (torch.inf, -torch.inf):
        neighbour = torch.nextafter(found, torch.full_like(found, side)) if bool(off.any()) else found
        better = off & (_sum(base, neighbour) == own)
        found = torch.where(better, neighbour, found)
        off &= ~better
    return found


def _sum(base: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return (base + added).to(base.dtype)
