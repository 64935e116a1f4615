"""The study's results as a table of README.md and as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#2f6f4f", "#5b7db1")


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for the base and for every beta, three numbers a domain."""
    a, b = found["domains"]
    head = [f"{name}: {what}" for name in (a, b) for what in ("named", "of another picture", "nats a token")]
    lines = [f"| beta ({a}) | {' | '.join(head)} |", "|---" * 7 + "|"]
    rows = {"base": found["base"], **found["betas"]}
    for beta, scores in rows.items():
        cells = [f"{scores[n][k]:.3f}" for n in (a, b) for k in ("named", "named_other", "nll")]
        lines.append(f"| {beta} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Score over beta, a line a domain: what captions name, and nats a token of the true ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    betas = [float(beta) for beta in found["betas"]]
    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 3.6))
    for axes, key, label in zip(
        panels, ("named", "nll"), ("share of things named", "nats a token (lower is better)"), strict=True
    ):
        for name, colour in zip(found["domains"], COLOURS, strict=True):
            values = [scores[name][key] for scores in found["betas"].values()]
            axes.plot(betas, values, marker="o", color=colour, label=f"{name} pictures")
            axes.axhline(found["base"][name][key], color=colour, linestyle=":", linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_xticks(betas)
        a, b = found["domains"]
        axes.set_xlabel(f"beta: 0 = the {b} model, 1 = the {a} model")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    mean = [sum(s[n]["named"] for n in found["domains"]) / 2 for s in found["betas"].values()]
    panels[0].plot(betas, mean, marker=".", color="#777777", linestyle="--", label="mean of both")
    panels[0].plot([], [], color="#999999", linestyle=":", label="before (base)")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
