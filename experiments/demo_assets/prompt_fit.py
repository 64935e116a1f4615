"""Makes the weights from which stage 1 starts: an initialisation of the prompt path and of the decoder.

python -m experiments.demo_assets.prompt_fit          # about 8 minutes on two cores, after encoders.py

The original starts from Segment Anything's prompt encoder and a language model that can already copy; small random
weights trained on answers alone stay blind to prompts. This step gives the demo what those parts give the original, on
cached features of the frozen encoders and without any change of the architecture:

1. Slots. Ten marks on a picture; every slot is asked, after the decoder's first block, what lies under it and which
   number it has. The first block's attention is told where to look: one head at the mark's cell among the quarters, one
   at the four cells around its middle, one at its cell in the whole view.
2. Answers. Conversations with one to five marks; the second block starts as a copy (values and outputs the identity,
   the head's rows those of the slots' classifier) and its attention is told to look at the slot of the mark that the
   answer is about. Then the language loss does the rest.

The projection between the prompt encoder and the decoder is not kept: the original begins without one, too, and stage 1
learns it.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bestiary.mllm import MultimodalLM
from bestiary.text.tokenizer import load_tokenizer

from .encoders import NUM_PICTURES, SEED, WORK
from .fit_answers import Writer, fit_answers
from .fit_slots import fit_slots
from .model import demo_model, demo_run
from .pictures import Pictures, cached
from .prompt_path import Asked, Fitter, Marked, features_of

log = logging.getLogger("demo_assets")
ASSETS = Path("src/bestiary/variants/sphinx_v/assets")
TOWERS = tuple(f"vision.{name}." for name in ("clip", "convnext", "dinov2", "qformer"))
"""Parts that lie in the encoders' file."""
LEFT_TO_STAGE_1 = "regions.proj."
"""The part that no file gives: stage 1 begins with it as drawn."""


def main() -> None:
    """Fit and write the file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--encoders", type=Path, default=ASSETS / "encoders.safetensors")
    parser.add_argument("--out", type=Path, default=ASSETS / "base.safetensors")
    parser.add_argument("--slot-steps", type=int, default=1200)
    parser.add_argument("--answer-steps", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=16_000)
    parser.add_argument("--keep-slots", action="store_true", help="begin with part 2, from the last part 1")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    run, model = demo_run(), demo_model()
    missing = model.load_state_dict({k: v.float() for k, v in load_file(args.encoders).items()}, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"{args.encoders} does not fit the model: it has {missing.unexpected_keys[:3]}")
    data, heldout = (
        Marked(pictures, features_of(model, pictures), seed=SEED + number)
        for number, pictures in enumerate(load_pictures(args.pictures, model))
    )
    fitter, asked = Fitter(model), Asked(model.decoder.dim, len(data.pictures.vocabulary))
    writer = Writer(load_tokenizer(run.model.processor["tokenizer"]), data.pictures.vocabulary)
    kept = WORK / "slots.pt"
    if args.keep_slots:
        found = torch.load(kept, weights_only=True)
        model.load_state_dict(found["model"])
        asked.load_state_dict(found["asked"])
    else:
        fit_slots(fitter, asked, data, heldout, steps=args.slot_steps, lr=3e-3)
        torch.save({"model": model.state_dict(), "asked": asked.state_dict()}, kept)
    fit_answers(fitter, asked, writer, data, heldout, steps=args.answer_steps, lr=2e-3)
    left_out = (*TOWERS, LEFT_TO_STAGE_1)
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith(left_out)}
    save_file(state, args.out)
    log.info("%s: %d tensors, %.1f MB", args.out, len(state), args.out.stat().st_size / 1e6)


def load_pictures(number: int, model: MultimodalLM) -> tuple[Pictures, Pictures]:
    """Training pictures (the first `number` of the encoders') and held-out ones."""
    side: int = model.vision.canvas_px  # type: ignore[union-attr, assignment]
    made = cached(WORK, "pictures", NUM_PICTURES, seed=SEED, split="train", side=side)
    cut = Pictures(made.pixels[:number], made.boxes[:number], made.names[:number], made.letters[:number],
                   made.domains[:number], made.vocabulary)  # fmt: skip
    return cut, cached(WORK, "pictures", 800, seed=SEED, split="heldout", side=side)


if __name__ == "__main__":
    main()
