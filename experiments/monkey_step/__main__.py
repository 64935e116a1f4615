"""Runs the benchmark: python -m experiments.monkey_step

Writes results.json and a picture and prints the table; with --out experiments/monkey_step it goes into README.md too.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from bestiary.compose import build, register_schema, typed
from bestiary.config import Run
from bestiary.mllm import MultimodalLM
from bestiary.saved_run import Pieces, with_processor
from bestiary.schema import Sample
from bestiary.training.stages import apply_stage, build_optimizer, set_lr
from bestiary.variants.monkey.processor import MonkeyProcessor
from data_modules.collate import collate_rows
from data_modules.embedded.plain import build_plain
from data_modules.heldout import Samples
from experiments.monkey_step.port import PaddedRow, summed_loss
from experiments.running import ROOT, add_folders, begin, write_results

log = logging.getLogger("experiments.monkey_step")
OURS, LAUNCHED, KEPT = "ours", "port as launched: a row at a time, recomputing", "port, a row at a time"
TOGETHER, TOGETHER_KEPT = "port, all rows at once, recomputing", "port, all rows at once"
SOURCE = "monkey_texts"
TOLERANCE = 1e-4
"""Of losses and of gradients' norms, relative: float32 sums in another order."""
Step = Callable[[Sequence[int]], Tensor]
"""Forward and backward of the samples at these places; the mean loss of their learned tokens."""


def main(arguments: list[str] | None = None) -> None:
    """Check that all ways learn the same, time them in turn, write down what was found."""
    parser = argparse.ArgumentParser(prog="python -m experiments.monkey_step", description=__doc__)
    add_folders(parser, "monkey_step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=16, help="samples of a step")
    args = parser.parse_args(arguments)
    begin(args)
    torch.set_num_threads(1)
    run = _run()
    build_plain(args.work, sources=[SOURCE], sizes={SOURCE: 4 * args.rows, f"{SOURCE}_heldout": 4}, processes=1)
    samples = list(Samples({SOURCE: {"path": str(args.work / SOURCE)}}))
    torch.manual_seed(0)
    pieces = with_processor(run, build(run.model.build))
    apply_stage(pieces.model, run.stage)
    ways = steps(pieces, samples, args.work / "pictures", max_tokens=run.data.max_tokens)
    found = measure(pieces.model, run, ways, len(samples), rounds=args.rounds, rows=args.rows)
    write_results(args.out, found, table=table(found), plot=plot, picture="monkey_step.png")


def _run() -> Run:
    """The demo recipe; adapters without dropout, so that all ways compute the same."""
    register_schema()
    overrides = ["experiment=monkey_finetune", "+model.build.vision.adapters.dropout=0.0",
                 "+model.processor.resize_passes=pillow"]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return cast(Run, typed(compose("config", overrides)))


def steps(pieces: Pieces, samples: Sequence[Sample], folder: Path, *, max_tokens: int) -> dict[str, Step]:
    """The ways to take a step; the port's pictures are written into the folder, its texts read beforehand."""
    model, processor = pieces.model, cast(MonkeyProcessor, pieces.processor)
    settings = {name: getattr(processor, name) for name in ("question", "resize_passes")}
    padding = MonkeyProcessor(
        tokenizer=str(processor.tokenizer.path), max_tokens=max_tokens, quirks=["padded"], **settings, **model.layout
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_padded(padding, sample, folder / str(number)) for number, sample in enumerate(samples)]

    def ours(places: Sequence[int]) -> Tensor:
        batch = collate_rows([[processor(samples[place])] for place in places])
        loss = model(batch).values.mean()
        loss.backward()
        return loss.detach()

    def port(places: Sequence[int], *, at_once: int, recomputes: bool = False) -> Tensor:
        model.decoder.set_activation_checkpointing(recomputes)
        try:
            return parts(places, at_once)
        finally:
            model.decoder.set_activation_checkpointing(False)

    def parts(places: Sequence[int], at_once: int) -> Tensor:
        chosen = [rows[place] for place in places]
        learned = sum(int((row.labels[1:] >= 0).sum()) for row in chosen)
        total = torch.zeros(())
        for start in range(0, len(chosen), at_once):
            loss = summed_loss(model, chosen[start : start + at_once]) / learned
            loss.backward()
            total += loss.detach()
        return total

    return {
        OURS: ours,
        LAUNCHED: lambda places: port(places, at_once=1, recomputes=True),
        KEPT: lambda places: port(places, at_once=1),
        TOGETHER: lambda places: port(places, at_once=len(places), recomputes=True),
        TOGETHER_KEPT: lambda places: port(places, at_once=len(places)),
    }


def _padded(processor: MonkeyProcessor, sample: Sample, stem: Path) -> PaddedRow:
    example = processor(sample)
    files = tuple(stem.with_suffix(f".{n}") for n in range(len(sample.images)))
    for file, data in zip(files, sample.images, strict=True):
        file.write_bytes(data)
    return PaddedRow(example.ids, example.labels, example.slots, files)


def measure(
    model: MultimodalLM, run: Run, ways: dict[str, Step], num_samples: int, *, rounds: int, rows: int
) -> dict[str, Any]:
    """CPU times of whole steps, each way once a round on the same samples, once all have given the same gradients."""
    check_equal(model, ways, range(rows))
    optimizer = build_optimizer(model, run.stage.optimizer)
    set_lr(optimizer, run.stage.optimizer.lr)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        places = [(number * rows + n) % num_samples for n in range(rows)]
        for name, step in ways.items():
            before = time.process_time()
            step(places)
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.stage.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if number:  # the first round warms up
                times[name].append(time.process_time() - before)
    ratios = {name: [one / ours for one, ours in zip(spent, times[OURS], strict=True)] for name, spent in times.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": rows,
        "rounds": rounds,
        "max_tokens": run.data.max_tokens,
        "ways": {
            name: {"ms": 1000 * median(times[name]), "ratio": median(found), "low": min(found), "high": max(found)}
            for name, found in ratios.items()
        },
    }


def check_equal(model: MultimodalLM, ways: dict[str, Step], places: Sequence[int]) -> None:
    """Raise unless every way gives the loss and the gradients of ours."""
    told: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for name, step in ways.items():
        model.zero_grad()
        loss = step(places).item()
        told[name] = loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, gradients = told[OURS]
    size = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, (other, theirs) in told.items():
        far = torch.stack([(theirs[n] - g).norm() for n, g in gradients.items()]).norm()
        if abs(other - loss) > TOLERANCE * abs(loss) or far > TOLERANCE * size or theirs.keys() != gradients.keys():
            raise ValueError(
                f"{name}: loss {other:.6f} and ours {loss:.6f}, gradients {far / size:.1e} apart: nothing to time"
            )


def table(found: dict[str, Any]) -> str:
    """Markdown of all results."""
    lines = ["| way | CPU ms of a step | times ours (lowest-highest round) |", "|---|---|---|"]
    for way, line in found["ways"].items():
        lines.append(f"| {way} | {line['ms']:.0f} | {line['ratio']:.2f} ({line['low']:.2f}-{line['high']:.2f}) |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """A bar a way, in CPU milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 2.5))
    ways = found["ways"]
    bars = axes.barh(list(ways), [line["ms"] for line in ways.values()], color=["#2f6f4f", *["#b1805b"] * 4])
    axes.bar_label(bars, [f" x{line['ratio']:.2f}" for line in ways.values()], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("CPU ms of a step")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
