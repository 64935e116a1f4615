"""The study's results as a table of README.md and as one picture."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

COLOURS = {"table": "#2f6f4f", "mlp": "#5b7db1", "linear": "#b1805b"}
MEASURES = {"accuracy": "short answers right", "nll": "captions, nats a token"}


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for every connector and stage, means over the seeds with the same of another picture."""
    lines = [
        "| connector | stage | short answers right | of another picture | captions, nats a token | of another picture |"
    ]
    lines.append("|---" * 6 + "|")
    for connector, seeds in found["scores"].items():
        for stage in next(iter(seeds.values())):
            cells = [
                f"{mean(scores[stage][name + of] for scores in seeds.values()):.3f}"
                for name in MEASURES
                for of in ("", "_control")
            ]
            lines.append(f"| {connector} | {stage.removeprefix('ovis_').upper()} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Scores over the stages, a line for every connector; dotted the same of another picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 3.6))
    for axes, (name, label) in zip(panels, MEASURES.items(), strict=True):
        for connector, seeds in found["scores"].items():
            stages = list(next(iter(seeds.values())))
            ticks = [stage.removeprefix("ovis_").upper() for stage in stages]
            for scores in seeds.values():
                axes.plot(ticks, [scores[s][name] for s in stages], ".", color=COLOURS[connector])
            for of, style in (("", "-"), ("_control", ":")):
                means = [mean(scores[s][name + of] for scores in seeds.values()) for s in stages]
                axes.plot(ticks, means, style, color=COLOURS[connector], label=None if of else connector)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].plot([], [], ":", color="#999999", label="of another picture")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
