"""Results as the tables of README.md and as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLES = {
    "read": "read 98 KB + JSON",
    "prepare": "640x480: decode, pad, 448",
    "photographs": "2560x1920 (0.65 MB) to 448",
    "grainy": "2560x1920 (1.3 MB) to 448",
}


def table(task: str, found: Any) -> str:
    """Markdown of one task's result."""
    if task in TITLES:
        lines = [f"| {task} | CPU ms a sample | times ours (lowest-highest round) |", "|---|---|---|"]
        for name, line in found.items():
            lines.append(f"| {name} | {line['ms']:.4f} | {line['ratio']:.2f} ({line['low']:.2f}-{line['high']:.2f}) |")
    elif task == "start":
        lines = [f"| first batch of {found['samples']:,} samples | seconds | MB |", "|---|---|---|"]
        for name in ("ours", "json.load"):
            lines.append(f"| {name} | {found[name]['seconds']:.3f} | {found[name]['bytes'] / 1e6:.0f} |")
    elif task == "resume":
        lines = ["| samples before the resume | ms to the first rows of 64 lanes |", "|---|---|"]
        lines += [f"| {line['samples']:,.0f} | {line['ms']:.1f} |" for line in found]
    elif task == "bound":
        ahead = list(found[0]["fill"]) if found else []
        heads = " | ".join(f"look-ahead {number} | of that" for number in ahead)
        lines = [f"| mix | row | no packing passes | {heads} |", "|" + "---|" * (3 + 2 * len(ahead))]
        for line in found:
            fills = " | ".join(f"{line['fill'][number]:.4f} | {line['of bound'][number]:.3f}" for number in ahead)
            lines.append(f"| {line['mix']} | {line['budget']} | {line['bound']:.4f} | {fills} |")
    else:
        lines = ["| mix | row | fill | best fit decreasing | ratio | us a sample |", "|" + "---|" * 6]
        for line in found:
            fills = f"{line['fill']:.4f} | {line['offline']:.4f} | {line['ratio']:.3f}"
            lines.append(f"| {line['mix']} | {line['budget']} | {fills} | {line['us']:.1f} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], folder: Path) -> None:
    """Bars of CPU time a sample, one panel a task, into throughput.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in TITLES if task in found]
    if not tasks:
        return
    rows = -(-len(tasks) // 2)
    figure, panels = pyplot.subplots(rows, 2, figsize=(9.5, 2.9 * rows), squeeze=False)
    for axes in panels.flat[len(tasks) :]:
        axes.remove()
    for axes, task in zip(panels.flat, tasks, strict=False):
        lines = sorted(found[task].items(), key=lambda item: -item[1]["ms"])
        names = [name for name, _ in lines]
        colours = ["#2f6f4f" if n.startswith("ours") else "#bbbbbb" if n == "floor" else "#5b7db1" for n in names]
        bars = axes.barh(names, [line["ms"] for _, line in lines], color=colours)
        axes.bar_label(bars, [f"{line['ratio']:.2f}x" for _, line in lines], padding=3, fontsize=8)
        axes.set_title(TITLES[task])
        axes.set_xlabel("CPU ms a sample")
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(folder / "throughput.png", dpi=110)
    pyplot.close(figure)
