"""Controls: what a model scores without what it is scored for; the truth stays.

Shuffled prompts: every picture is asked about another picture's regions. A model that ignores its prompts and names
some object of the picture scores the same with both; only what the control does not reach was read off the prompts.
Other pictures: every question is asked about another picture. What is guessed from the question alone stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from bestiary.schema import Region, Sample


def shuffled(samples: Sequence[Sample], *, seed: int) -> list[Sample]:
    """The same samples in the same order, each with the regions of another one; marks and kinds stay.

    Donors have the same domain and the same kinds in the same order as far as there are two such samples, then the
    same kinds, then any; a donor's missing or differing region is adapted. Pure in (samples, seed).
    Raises ValueError below two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} sample(s) with regions: a shuffled-prompt control needs at least two")
    order = [int(i) for i in np.random.default_rng(seed).permutation(len(samples))]
    donors: dict[int, int] = {}
    for level in range(4):
        waiting = [i for i in order if i not in donors]
        for group in _groups(samples, waiting, level):
            if len(group) > 1:
                donors.update(zip(group, group[1:] + group[:1], strict=True))
    if left := [i for i in order if i not in donors]:  # one odd sample out: it borrows, nobody borrows from it
        donors[left[0]] = next(i for i in order if i != left[0])
    return [replace(sample, regions=_adapt(sample, samples[donors[i]])) for i, sample in enumerate(samples)]


def other_pictures(pictures: Sequence[int | None], domains: Sequence[str], *, seed: int) -> list[int | None]:
    """For every question the place of one about another picture, of the same domain where there are two such.

    pictures: the number of each question's picture, None without one; such a question has no control, nor has any
    where there is but one picture. Questions about one picture get one other picture. Pure in its arguments.
    """
    first: dict[int, int] = {}  # picture -> its first question
    for place, picture in enumerate(pictures):
        if picture is not None:
            first.setdefault(picture, place)
    order = np.random.default_rng(seed).permutation(list(first)).tolist() if first else []
    donors: dict[int, int] = {}
    for domain in dict.fromkeys(domains):
        group = [picture for picture in order if domains[first[picture]] == domain]
        if len(group) > 1:
            donors.update(zip(group, group[1:] + group[:1], strict=True))
    for alone in (picture for picture in order if picture not in donors and len(order) > 1):
        donors[alone] = next(picture for picture in order if picture != alone)
    return [None if picture not in donors else first[donors[picture]] for picture in pictures]


def _groups(samples: Sequence[Sample], waiting: Sequence[int], level: int) -> list[list[int]]:
    """Samples that may lend to one another: the looser, the higher the level."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i in waiting:
        kinds = tuple(region.kind for region in samples[i].regions)
        keys: tuple[Hashable, ...] = ((samples[i].domain, kinds), kinds, len(kinds), None)
        groups[keys[level]].append(i)
    return list(groups.values())


def _adapt(sample: Sample, donor: Sample) -> tuple[Region, ...]:
    """The donor's regions under the sample's marks; with too few of them they repeat."""
    return tuple(
        _like(region, donor.regions[i % len(donor.regions)] if donor.regions else region)
        for i, region in enumerate(sample.regions)
    )


def _like(region: Region, donor: Region) -> Region:
    """The donor's place in the region's kind: its coordinates, its centre, or the region's shape moved there."""
    if region.kind == donor.kind:
        return replace(region, coords=donor.coords)
    x0, y0, x1, y1 = donor.box
    centre = ((x0 + x1) / 2, (y0 + y1) / 2)
    if region.kind == "point":
        return replace(region, coords=centre)
    x0, y0, x1, y1 = region.box
    # Moved as far as the picture allows, so that the shape keeps its size and stays inside.
    dx = min(max(centre[0] - (x0 + x1) / 2, -x0), 1 - x1)
    dy = min(max(centre[1] - (y0 + y1) / 2, -y0), 1 - y1)
    coords = tuple(min(max(c + (dy if i % 2 else dx), 0.0), 1.0) for i, c in enumerate(region.coords))
    return replace(region, coords=coords)
