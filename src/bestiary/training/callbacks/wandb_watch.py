"""wandb as an onlooker: offline unless logged in, one run id for the whole life of a run directory."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from bestiary.addresses import without_secrets
from bestiary.training.mix import Asked
from bestiary.training.report import StepReport
from bestiary.training.run_dir import RunDir

_HOST = "https://api.wandb.ai"
_SECTIONS = {
    "loss": "train/loss",
    "weighted_loss": "train/weighted_loss",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "tokens_per_s": "perf/tokens_per_s",
    "step_s": "perf/step_s",
    "wait_s": "perf/wait_s",
    "mfu": "perf/mfu",
    "fill": "data/fill",
    "samples_seen": "data/samples_seen",
    "tokens_seen": "data/tokens_seen",
}
_NESTED = {
    "loss_by_domain": "domain_loss",
    "loss_by_source": "source_loss",
    "mix_samples": "mix_samples",
    "mix_tokens": "mix_tokens",
    "mix_targets": "mix_targets",
}


class WandbWatch:
    """One wandb run beside the run directory. Steps are its x-axis, so a resumed run may log a step again.

    asked: the resolved shares at a step, shown as `mix_asked` beside what was achieved. notes: of the run, as text.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        project: str,
        group: str,
        job_type: str,
        config: Mapping[str, Any],
        log_every: int = 1,
        asked: Asked | None = None,
        notes: str = "",
    ) -> None:
        import wandb

        identity = run.status.wandb_id or secrets.token_hex(4)
        run.update(wandb_id=identity)
        self.log_every = log_every
        self.asked = asked
        self._run = wandb.init(
            project=project,
            group=group,
            job_type=job_type,
            id=identity,
            name=run.path.name,
            dir=run.path,
            config=without_secrets(config),  # it leaves this machine
            notes=notes or None,
            mode="online" if is_logged_in() else "offline",
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def __call__(self, report: StepReport, record: dict[str, Any]) -> None:
        """Log a step (every `log_every`)."""
        if report.step % self.log_every == 0:
            asked = self.asked(report.step - 1) if self.asked else {}
            wanted = {f"mix_asked/{name}": share for name, share in asked.items()}
            self._run.log({"step": report.step, **flat(record), **wanted})

    def log_evaluation(self, step: int, found: Mapping[str, Any]) -> None:
        """Log scores, panels and tables, as `callbacks.evaluating` describes them."""
        import wandb

        values: dict[str, Any] = {"step": step}
        values |= {f"eval/{name}": value for name, value in found["metrics"].items() if value is not None}
        for name, path in found.get("panels", {}).items():
            if path is not None:
                values[f"eval/{name}/panel"] = wandb.Image(str(path))
        for name, (columns, rows) in found.get("tables", {}).items():
            cells = [[_cell(value) for value in row] for row in rows]
            values[f"eval/{name}/answers"] = wandb.Table(columns=list(columns), data=cells)
        self._run.log(values)

    def finish(self, exit_code: int) -> None:
        """Close the run."""
        self._run.finish(exit_code=exit_code)


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """A metrics line under wandb's names: sections with a slash."""
    values = {name: record[key] for key, name in _SECTIONS.items() if key in record}
    for key, section in _NESTED.items():
        values |= {f"{section}/{part}": value for part, value in record.get(key, {}).items()}
    values |= record.get("measured", {})
    return values


def is_logged_in(environment: Mapping[str, str] = os.environ) -> bool:
    """True if wandb would find a key by itself; WANDB_MODE decides where it is set."""
    if mode := environment.get("WANDB_MODE"):
        return mode == "online"
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL", _HOST)).hostname or ""
    path = Path(environment.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _cell(value: Any) -> Any:
    """A table cell wandb can show: pictures wrapped, sequences as text."""
    import wandb
    from PIL import Image

    if isinstance(value, Image.Image):
        return wandb.Image(value)
    return str(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
