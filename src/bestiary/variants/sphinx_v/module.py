"""SPHINX-V's training module: the shared step, and the check that no visual prompt is lost on the way."""

from __future__ import annotations

from bestiary.schema import Batch, Slot
from bestiary.training.module import MLLMModule

TAG_ROWS = 2
"""`start_vp` and `end_vp` around the prompt slots of one sample (reference `llama_ens5_vp.py`)."""


class SphinxVModule(MLLMModule):
    """MLLMModule that refuses a batch whose REGION positions and prompts disagree."""

    def check(self, batch: Batch) -> None:
        """Positions that wait for prompt rows must find as many: a lost prompt would train on the wrong question."""
        waiting = int((batch.slots == Slot.REGION).sum())
        regions = batch.regions
        given = 0 if regions is None else int(regions.counts.sum()) + TAG_ROWS * len(regions.counts)
        if waiting != given:
            keys = ", ".join(s.key for s in batch.segments[:8])
            raise ValueError(
                f"{waiting} REGION positions but {given} prompt rows at step {batch.step} (samples {keys}); "
                "is num_slots of the processor that of the model?"
            )
