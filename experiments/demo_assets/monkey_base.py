"""Makes the base of Monkey's demo, a small "Qwen-VL" of one window's resolution, about 8 minutes of one core.

python -m experiments.demo_assets.monkey_base

Its parts first learn alone, as the published ones did: the decoder from texts, where words stand in place of a
picture's rows; the ViT from windows full of words (`monkey_eye`). Then all together: which word is written in which
quarter of a window, rows drawn towards the decoder's own embeddings. There are no adapters, as Qwen-VL has none.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from bestiary.compose import build
from bestiary.language.attention import PackedLayout
from bestiary.mllm import MultimodalLM
from bestiary.schema import IGNORE
from bestiary.text.qwen_tokenizer import QwenTokenizer
from bestiary.variants.monkey.model import MonkeyVision
from bestiary.variants.monkey.processor import QUESTION as FORM
from bestiary.vision.encoders import normalise
from data_modules.embedded.assets import WORDS
from data_modules.embedded.small_text import QUARTERS, QUESTION

from .export import write_sums
from .model import demo_run
from .monkey_eye import fit_eye
from .monkey_pages import NOTHING, SIDE_PX
from .monkey_pictures import WindowPictures, make
from .monkey_vocabulary import ASSETS

log = logging.getLogger("demo_assets")
ASKED = 2
"""Questions about one picture."""
EMPTY = "-"
"""The token whose embedding stands for a quarter without a word."""


class Fit:
    """The base in training: one view of every picture, which stands twice in a row, as window and as whole."""

    def __init__(self, model: MultimodalLM, tokenizer: QwenTokenizer, *, seed: int) -> None:
        assert isinstance(model.vision, MonkeyVision)
        self.model, self.vision, self.decoder = model, model.vision, model.decoder
        self.generator = torch.Generator().manual_seed(seed)
        self.opening = [tokenizer.control_id("<img>"), *[0] * model.vision.image_rows, tokenizer.control_id("</img>")]
        self.questions = [tokenizer.encode(FORM.format(QUESTION.format(quarter))) for quarter in QUARTERS]
        self.answers = [[*tokenizer.encode(word), tokenizer.eos_id] for word in WORDS]
        self.names = torch.tensor([*(answer[0] for answer in self.answers), *tokenizer.encode(EMPTY)])
        """Token of every class."""

    def rows(self, pixels: Tensor) -> Tensor:
        """What the decoder sees of windows, [N, 4, D]."""
        tokens = self.vision.vit(normalise(pixels)[None])[0]
        return self.vision.ln_post(self.vision.resampler(tokens)) @ self.vision.proj

    def named(self, quarters: Tensor) -> Tensor:
        """The embeddings of the words in quarters, [N, 4, D]."""
        return self.decoder.embed(self.names[quarters])

    def language(self, rows: Tensor, quarters: Tensor) -> tuple[Tensor, float]:
        """Loss of the answers to some questions a picture, and the share of words right."""
        ids, labels = self._texts(quarters)
        embeds = self.decoder.embed(ids)
        embeds = torch.cat([embeds[:, :1], rows, rows, embeds[:, 1 + 2 * rows.shape[1] :]], dim=1)
        count, width = ids.shape
        layout = PackedLayout.from_spans([(row, 0, width) for row in range(count)], (count, width))
        hidden = self.decoder(embeds, torch.arange(width).expand(count, -1), layout=layout)[:, :-1]
        is_learned = labels[:, 1:] >= 0
        wanted, logits = labels[:, 1:][is_learned], self.decoder.head(hidden[is_learned])
        is_word = wanted != self.answers[0][-1]
        right = (logits.argmax(-1) == wanted)[is_word].float().mean().item()
        return F.cross_entropy(logits, wanted), right

    def _texts(self, quarters: Tensor) -> tuple[Tensor, Tensor]:
        """ids and labels, int64[N, T], padded with unlearned ids on the right."""
        written = []
        for words in quarters.tolist():
            shown = [place for place, word in enumerate(words) if word != NOTHING]
            order = torch.randperm(len(shown), generator=self.generator).tolist()[:ASKED]
            ids, labels = list(self.opening), [IGNORE] * len(self.opening)
            for place in (shown[n] for n in order):
                question, answer = self.questions[place], self.answers[words[place]]
                ids, labels = ids + question + answer, labels + [IGNORE] * len(question) + answer
            written.append((ids, labels))
        longest = max(len(ids) for ids, _ in written)
        return (
            torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in written]),
            torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in written]),
        )


def schedule(
    learned: Iterable[nn.Parameter], step: Callable[[int], tuple[Tensor, dict[str, float]]], *, steps: int, lr: float
) -> None:
    """AdamW with a short warm-up and a cosine; step(number) gives the loss and what to tell."""
    parameters = [parameter for parameter in learned if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    mean: dict[str, float] = {}
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((number + 1) / 50, 0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * number / steps)))
        loss, told = step(number)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = {name: 0.95 * mean.get(name, value) + 0.05 * value for name, value in told.items()}
        if (number + 1) % 50 == 0:
            log.info("step %d: %s", number + 1, ", ".join(f"{name} {value:.3f}" for name, value in mean.items()))


def fit_speech(fit: Fit, *, steps: int, batch: int, lr: float) -> None:
    """The decoder alone, from texts: words stand where a picture's rows will stand."""

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        quarters = torch.randint(NOTHING + 1, (batch, len(QUARTERS)), generator=fit.generator)
        quarters[:, 0].clamp_(max=NOTHING - 1)  # at least one word to ask about
        quarters = quarters.gather(1, torch.rand(quarters.shape, generator=fit.generator).argsort(1))
        loss, right = fit.language(fit.named(quarters), quarters)
        return loss, {"loss": loss.item(), "right": right}

    schedule(fit.decoder.parameters(), step, steps=steps, lr=lr)


def fit_whole(fit: Fit, data: WindowPictures, *, steps: int, batch: int, lr: float) -> None:
    """All together: rows drawn towards the embeddings of what they show, and the answers."""

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.randint(len(data.pixels), (batch,), generator=fit.generator)
        quarters = data.quarters[chosen]
        rows = fit.rows(data.pixels[chosen])
        names = fit.decoder.embed(fit.names).detach()
        near = F.normalize(rows, dim=-1) @ F.normalize(names, dim=-1).T
        named = F.cross_entropy(10 * near.flatten(0, 1), quarters.flatten())
        close = F.mse_loss(rows, names[quarters]) / names.var()
        loss, right = fit.language(rows, quarters)
        shown = quarters != NOTHING
        seen = (near.argmax(-1) == quarters)[shown].float().mean().item()
        told = {"loss": loss.item(), "right": right, "rows right": seen, "close": close.item()}
        return loss + named + 0.3 * close, told

    schedule(fit.model.parameters(), step, steps=steps, lr=lr)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ASSETS, help="holds the vocabulary, gets the weights")
    parser.add_argument("--pictures", type=int, default=6000, help="of the last part")
    parser.add_argument("--speech-steps", type=int, default=1400)
    parser.add_argument("--eye-steps", type=int, default=2600)
    parser.add_argument("--steps", type=int, default=800, help="of all together")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """The base's weights into the folder of assets."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = arguments()
    torch.manual_seed(args.seed)
    window = (f"model.build.vision.image_px={SIDE_PX}", "model.build.vision.adapters=null")
    model = build(demo_run("experiment=monkey_finetune", *window).model.build)
    assert isinstance(model, MultimodalLM)
    fit = Fit(model, QwenTokenizer(args.out), seed=args.seed)
    log.info("%d parameters; the decoder from texts", sum(parameter.numel() for parameter in model.parameters()))
    fit_speech(fit, steps=args.speech_steps, batch=2 * args.batch, lr=4e-3)
    log.info("the ViT from pages")
    fit_eye(fit.vision.vit, schedule, steps=args.eye_steps, batch=args.batch, lr=4e-3, seed=args.seed)
    log.info("all together")
    fit_whole(fit, make(args.pictures, seed=args.seed), steps=args.steps, batch=args.batch, lr=2e-3)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, args.out / "base.safetensors")
    write_sums(args.out)


if __name__ == "__main__":
    main()
