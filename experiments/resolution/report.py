"""The study's results as a table of README.md and as one picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

SIZES = {"small": "small words right", "large": "large words right"}
COLOURS = {"with": "#2f6f4f", "without": "#b1805b"}


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for every arm, means over the seeds with each seed's figure, and the same of another picture."""
    heads = [head for label in SIZES.values() for head in (label, "by seed", "of another picture")]
    lines = [f"| windows | adapters | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for arm, seeds in found["scores"].items():
        windows, has = _read(arm)
        cells = []
        for size in SIZES:
            values = [scores[size] for scores in seeds.values()]
            control = mean(scores[f"{size}_control"] for scores in seeds.values())
            cells += [f"{mean(values):.3f}", " ".join(f"{value:.3f}" for value in values), f"{control:.3f}"]
        lines.append(f"| {windows} | {'-' if windows == 1 else has} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Score over windows, a line with adapters and one without, a point a seed; dotted the same of another picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 3.6))
    for axes, (size, label) in zip(panels, SIZES.items(), strict=True):
        for has, colour in COLOURS.items():
            arms = {_read(arm)[0]: seeds for arm, seeds in found["scores"].items() if _read(arm) in ((1, "without"),)}
            arms |= {_read(arm)[0]: seeds for arm, seeds in found["scores"].items() if _read(arm)[1] == has}
            for windows, seeds in arms.items():
                axes.plot([windows] * len(seeds), [scores[size] for scores in seeds.values()], ".", color=colour)
            for of, style in (("", "-"), ("_control", ":")):
                means = [mean(scores[size + of] for scores in seeds.values()) for seeds in arms.values()]
                axes.plot(list(arms), means, style, color=colour, label=None if of else f"{has} adapters")
        axes.set_ylim(0, 1)
        axes.set_xticks(sorted({_read(arm)[0] for arm in found["scores"]}))
        axes.set_xlabel("windows")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].plot([], [], ":", color="#999999", label="of another picture")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _read(arm: str) -> tuple[int, str]:
    """Windows, and `with` or `without` adapters; one window has none of its own."""
    windows, _, bare = arm.partition("-")
    return int(windows), "without" if bare or windows == "1" else "with"
