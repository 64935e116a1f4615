"""The plots of `bestiary shards stats`: one picture of six panels, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_modules.inspection.stats import Tally

COLOURS = ("#2a6f97", "#e07a5f", "#81b29a", "#b56576", "#f2cc8f", "#6d597a", "#3d405b", "#8ab17d", "#a8a29e")
MOST_SOURCES = 8
"""Beyond so many, the smaller ones are drawn as one."""


def draw(tallies: Mapping[str, Tally], path: Path) -> None:
    """Write the picture of some sources as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _grouped(tallies)
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    total = sum(tally.samples for tally in shown.values())
    figure.suptitle(f"{total:,} samples of {len(tallies)} source{'s' if len(tallies) > 1 else ''}", fontsize=14)
    _domains(axes[0, 0], shown)
    _lengths(axes[0, 1], shown)
    _tokens(axes[0, 2], shown)
    _sizes(axes[1, 0], shown)
    _counts(axes[1, 1], shown, "turns", "turns of a conversation")
    _marks(axes[1, 2], shown)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _grouped(tallies: Mapping[str, Tally]) -> dict[str, Tally]:
    ordered = sorted(tallies.items(), key=lambda item: -item[1].samples)
    shown = dict(ordered[: MOST_SOURCES if len(ordered) > MOST_SOURCES + 1 else len(ordered)])
    rest = [tally for name, tally in ordered if name not in shown]
    if rest:
        shown[f"{len(rest)} others"] = other = Tally()
        for tally in rest:
            other.include(tally)
    return shown


def _domains(axis: Any, shown: Mapping[str, Tally]) -> None:
    """Samples of every source, its bar cut by domain."""
    total: Tally = Tally()
    for tally in shown.values():
        total.include(tally)
    names = [name for name, _ in total.domains.most_common()]
    places = np.arange(len(shown))[::-1]
    left = np.zeros(len(shown))
    for number, domain in enumerate(names):
        counts = np.array([tally.domains[domain] for tally in shown.values()], float)
        label = domain if number < len(COLOURS) else None
        axis.barh(places, counts, left=left, height=0.65, color=COLOURS[number % len(COLOURS)], label=label)
        left += counts
    axis.set_yticks(places, [name[:24] for name in shown])
    axis.set_title("samples by source and domain", fontsize=11)
    axis.set_ylim(len(shown) - 0.5 - max(4, len(shown)), len(shown) - 0.5)
    if names:
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4)


def _lengths(axis: Any, shown: Mapping[str, Tally]) -> None:
    _histograms(axis, shown, "characters", "characters of a conversation")


def _tokens(axis: Any, shown: Mapping[str, Tally]) -> None:
    if any("tokens" in tally.columns for tally in shown.values()):
        _histograms(axis, shown, "tokens", "tokens of a sample")
    else:
        _histograms(axis, shown, "answer_characters", "characters of the answers")


def _histograms(axis: Any, shown: Mapping[str, Tally], column: str, title: str) -> None:
    """One outline a source on a logarithmic axis; 0 counts as 1."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    columns = {name: np.maximum(1, np.asarray(tally.columns[column])) for name, tally in _having(shown, column)}
    axis.set_title(title, fontsize=11)
    if not columns:
        _nothing(axis)
        return
    top = max(int(values.max()) for values in columns.values())
    low = min(int(values.min()) for values in columns.values())
    edges = np.geomspace(low, max(top, low + 1) * 1.01, 40)
    for number, (name, values) in enumerate(columns.items()):
        colour = COLOURS[number % len(COLOURS)]
        shares = np.full(len(values), 1.0 / len(values))  # counts would hide small sources beside large ones
        axis.hist(values, bins=edges, weights=shares, histtype="stepfilled", alpha=0.25, color=colour)
        axis.hist(values, bins=edges, weights=shares, histtype="step", linewidth=1.4, color=colour, label=name[:24])
    axis.set_xscale("log")
    if top < 100 * low:  # a narrow range has few powers of ten, or none, to stand at: plain numbers
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True) if top < 10 * low else LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter("")
    axis.set_ylabel("share of the source", fontsize=9)
    if len(columns) > 1:
        axis.legend(fontsize=8, frameon=False)


def _sizes(axis: Any, shown: Mapping[str, Tally]) -> None:
    axis.set_title("pictures: width and height in pixels", fontsize=11)
    generator = np.random.default_rng(0)
    for number, (name, tally) in enumerate(_having(shown, "width")):
        sizes = np.stack([np.asarray(tally.columns["width"]), np.asarray(tally.columns["height"])])
        if sizes.shape[1] > 2000:
            sizes = sizes[:, generator.choice(sizes.shape[1], 2000, replace=False)]
        colour = COLOURS[number % len(COLOURS)]
        axis.scatter(*sizes, s=14, alpha=0.35, linewidths=0, color=colour, label=name[:24])
    if not any(True for _ in _having(shown, "width")):
        _nothing(axis)
        return
    top = 1.06 * max(axis.get_xlim()[1], axis.get_ylim()[1]) / 1.05
    axis.set(xlim=(0, top), ylim=(0, top), aspect="equal")
    axis.set_xlabel("width", fontsize=9)
    axis.set_ylabel("height", fontsize=9)
    axis.plot([0, top], [0, top], color="#cccccc", linewidth=0.8, zorder=0)


def _counts(axis: Any, shown: Mapping[str, Tally], column: str, title: str) -> None:
    """Bars for small whole numbers, the sources on top of one another."""
    columns = [(name, np.minimum(np.asarray(tally.columns[column]), 20)) for name, tally in _having(shown, column)]
    axis.set_title(title, fontsize=11)
    if not columns:
        _nothing(axis)
        return
    top = max(int(values.max()) for _, values in columns)
    bottom = np.zeros(top + 1)
    for number, (name, values) in enumerate(columns):
        counts = np.bincount(values, minlength=top + 1)
        axis.bar(range(top + 1), counts, bottom=bottom, color=COLOURS[number % len(COLOURS)], label=name[:24])
        bottom += counts
    axis.set_xticks(range(0, top + 1, max(1, top // 10)))
    axis.set_xlim(-0.6 if bottom[0] else 0.4, top + 0.6)
    axis.set_ylabel("samples", fontsize=9)
    if top == 20:
        axis.set_xlabel("20 stands for 20 and more", fontsize=9)


def _marks(axis: Any, shown: Mapping[str, Tally]) -> None:
    """Marks of every kind, the sources beside one another."""
    axis.set_title("marks by kind", fontsize=11)
    having = [(name, tally) for name, tally in shown.items() if tally.regions]
    if not having:
        _nothing(axis)
        return
    kinds = ("point", "box", "stroke")
    width = 0.8 / len(having)
    for number, (name, tally) in enumerate(having):
        at = np.arange(len(kinds)) + (number - (len(having) - 1) / 2) * width
        counts = [tally.regions[kind] for kind in kinds]
        axis.bar(at, counts, width=width * 0.95, color=COLOURS[number % len(COLOURS)], label=name[:24])
    axis.set_xticks(range(len(kinds)), kinds)
    if len(having) > 1:
        axis.legend(fontsize=8, frameon=False)


def _having(shown: Mapping[str, Tally], column: str) -> list[tuple[str, Tally]]:
    return [(name, tally) for name, tally in shown.items() if tally.columns.get(column)]


def _nothing(axis: Any) -> None:
    axis.text(0.5, 0.5, "none", ha="center", va="center", transform=axis.transAxes, color="#888888")
    axis.set_xticks([])
    axis.set_yticks([])
