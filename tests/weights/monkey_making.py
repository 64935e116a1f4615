"""Published folders of small Monkeys and Qwen-VLs, and run directories, made of models drawn from a seed."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bestiary.config import Data, Model, Run, Source, Stage
from bestiary.mllm import MultimodalLM
from bestiary.text.qwen_tokenizer import CONTROLS, QwenTokenizer
from bestiary.training.checkpoints import TrainState, write
from bestiary.variants.hf_folder import Format, plan_hf, write_hf
from bestiary.variants.monkey import config_json, weights
from bestiary.variants.monkey.model import build_monkey

RANKS = {"attention_rank": 2, "mlp_rank": 3}
VISION = {"image_px": [16, 16], "window_px": 8, "patch_px": 4, "width": 16, "layers": 2, "heads": 2, "num_queries": 4}
MERGES = [b"wh", b"at", b"what"]
DECODER = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 256 + len(MERGES) + len(CONTROLS) + 5, "max_position_embeddings": 512,
}  # fmt: skip
WORDS = {"bos_token_id": None, "chat_format": "raw", "do_sample": True, "top_k": 0}


def vocabulary(folder: Path) -> Path:
    """A small qwen.tiktoken: every byte, and three merges."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*(bytes([byte]) for byte in range(256)), *MERGES]
    path = folder / "qwen.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def build_node(image_px: Any = (16, 16), *, adapters: bool = True, **changes: Any) -> dict[str, Any]:
    """Arguments of `build_monkey`."""
    vision = {**VISION, "image_px": list(image_px), "adapters": RANKS if adapters else None}
    return {"vision": vision, "decoder": DECODER, **changes}


def model_of(node: dict[str, Any], *, seed: int = 0, spread: float = 0.0) -> MultimodalLM:
    """The model; spread: of every matrix, so that no adapter does nothing and rounding decides nothing."""
    torch.manual_seed(seed)
    model = build_monkey(**node).eval()
    with torch.no_grad():
        for parameter in model.parameters() if spread else ():
            parameter.normal_(std=spread) if parameter.dim() > 1 else None
    return model


def publish(folder: Path, model: MultimodalLM, *, kind: Format = "safetensors", shard_bytes: int = 1 << 40) -> Path:
    """The folder as transformers would have saved the model, with a generation_config.json that samples."""
    state = weights.to_reference(model.state_dict())
    return _written(folder, config_json.config_of(model, image_start_id=7), state, kind, shard_bytes)


def publish_qwen_vl(folder: Path, model: MultimodalLM, *, dtype: torch.dtype = torch.float32) -> Path:
    """A Qwen-VL of the model's tensors but the adapters, and a config.json in its words."""
    told = config_json.config_of(model, image_start_id=7)
    told |= {"model_type": "qwen", "architectures": ["QWenLMHeadModel"]}
    visual = told["visual"]
    visual["image_size"] = visual.pop("window")
    del visual["lora_repeat_num"]
    state = weights.to_reference({n: t for n, t in model.state_dict().items() if "_lora." not in n})
    return _written(folder, told, {name: tensor.to(dtype) for name, tensor in state.items()}, "bin", 1 << 40)


def _written(
    folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], kind: Format, shard_bytes: int
) -> Path:
    vocabulary(folder)
    sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    write_hf(folder, plan_hf(sizes, max_shard_bytes=shard_bytes, kind=kind), state.__getitem__)
    for name, told in {
        "config": config,
        "generation_config": WORDS,
        "tokenizer_config": {"padding_side": "left"},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(told, indent=1))
    (folder / "modeling_monkey.py").write_text("raise SystemExit('never run')\n")
    return folder


def run_of(folder: Path, node: dict[str, Any], model: MultimodalLM, begun_as: list[Path], tokenizer: Path) -> Path:
    """A run directory as training leaves it."""
    processor = {"_target_": "bestiary.variants.monkey.processor.MonkeyProcessor", "tokenizer": str(tokenizer)}
    told = {"name": "monkey", "build": {"_target_": "bestiary.variants.monkey.model.build_monkey", **node}}
    told |= {"processor": processor, "module": {"_target_": "bestiary.training.module.MLLMModule"}}
    data = Data(root="none", max_tokens=300, sources={"a": Source(path="a", weight=1.0)})
    config = OmegaConf.structured(Run(data=data, stage=Stage(name="monkey_finetune", max_steps=1, batch_size=1)))
    config.stage.optimizer.lr = 0.1
    config.model = Model(**told, weights=[str(path) for path in begun_as])
    folder.mkdir(parents=True)
    for name in ("config.yaml", "config.resolved.yaml"):
        OmegaConf.save(config, folder / name)
    identity = {"tokenizer": QwenTokenizer(tokenizer).sha256, **model.identity}
    state = TrainState(step=3, stage="monkey_finetune", seed=0, identity=identity)
    write(folder / "checkpoints", state, model=model.state_dict(), optimizer={}, rng={}, keep=0)
    return folder
