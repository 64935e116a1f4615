"""config.json of a published Monkey or Qwen-VL folder: read into arguments of our model, and written for one of ours.

The decoder's words stand at the top, the ViT's in `visual`. Ranks of adapters and what a list of names leaves out are
told by the tensors. Source: reference/monkey.md, sections 1.1 to 1.4, 2 and 3.5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from bestiary.mllm import MultimodalLM
from bestiary.variants.monkey.adapter import ATTENTION_RANK, DECODER_RANK, MLP_RANK
from bestiary.variants.monkey.decoder import SEQ_LENGTH, QwenDecoder
from bestiary.variants.monkey.model import MonkeyVision
from bestiary.variants.monkey.vit import VitBlock
from bestiary.variants.monkey.windows import grid_of
from bestiary.variants.parts import ANY_HEADS, MAX_DEPTH, depth, size

Shapes = Mapping[str, Sequence[int]]
Config = Mapping[str, Any]

EMBEDDING = "transformer.wte.weight"
MONKEY_TYPE, QWEN_TYPE = "monkey", "qwen"
_LAYER, _VISUAL, _RESAMPLER = "transformer.h", "transformer.visual", "transformer.visual.attn_pool"
_BLOCK = f"{_VISUAL}.transformer.resblocks"
_WINDOW = re.compile(re.escape(_BLOCK) + r"\.\d+\.(?:attn\.\w+_lora|mlp_lora)\.(\d+)\..+")
_BESIDE = re.compile(re.escape(_LAYER) + r"\.\d+\.(?:attn|mlp)\.\w+_lora\..+")
WINDOW_PX = 448
"""Of windows and of the global view; the published code has it as a literal (section 1.1)."""
NUM_QUERIES = 256  # section 1.4
MAX_POSITIONS = 8192  # section 2
PLAIN = {"rotary_pct": 1.0, "no_bias": True, "tie_word_embeddings": False, "scale_attn_weights": True}
"""Words that every published config.json says alike, and that our decoder cannot do otherwise (section 2)."""
_LARGEST = 1 << 24
"""Of any size; what is beyond it is a damaged file, not a model to be built."""
_SIZES = {
    "hidden_size": (1, _LARGEST),
    "intermediate_size": (2, _LARGEST),
    "num_hidden_layers": (1, MAX_DEPTH),
    "num_attention_heads": (1, _LARGEST),
    "vocab_size": (1, _LARGEST),
    "visual.width": (1, _LARGEST),
    "visual.layers": (1, MAX_DEPTH),
    "visual.heads": (1, _LARGEST),
    "visual.patch_size": (1, _LARGEST),
    "visual.window": (1, _LARGEST),
    "visual.n_queries": (1, _LARGEST),
    "visual.lora_repeat_num": (0, _LARGEST),
}
_OTHER_SIZES = {"seq_length": (2, _LARGEST), "max_position_embeddings": (1, _LARGEST), "kv_channels": (1, _LARGEST)}
"""Whole numbers that config.json need not say: smallest and largest."""
_REALS = {"layer_norm_epsilon": 1, "rotary_emb_base": 1e12, "visual.mlp_ratio": 1000}
"""Numbers above 0: largest."""
_SWITCHES = ("use_dynamic_ntk", "use_logn_attn")


def is_qwen_vl(config: Config) -> bool:
    """Whether config.json is Qwen-VL's: a Qwen with eyes."""
    return config.get("model_type") == QWEN_TYPE and isinstance(config.get("visual"), dict)


def window_numbers(names: Sequence[str] | Mapping[str, object]) -> set[int]:
    """The windows that published names hold adapters of."""
    return {int(match[1]) for name in names if (match := _WINDOW.fullmatch(name))}


def only_decoder_adapters(names: Sequence[str] | Mapping[str, object]) -> bool:
    """Whether published names are those of the decoder's adapters and no others."""
    return bool(names) and all(_BESIDE.fullmatch(name) for name in names)


def completed(config: Config, shapes: Shapes) -> dict[str, Any]:
    """config.json with what it leaves out read off the tensors; {} works, heads and grid (which no shape shows) apart.

    ValueError for values that are none, and for words that contradict one another or that no model of ours has.
    """
    for word, value in PLAIN.items():
        if config.get(word, value) != value:
            raise ValueError(f"config.json says {word} {config[word]!r}; there is no Monkey but with {value!r}")
    told = _decoder_told(shapes) | {name: value for name, value in config.items() if name != "visual"}
    told["visual"] = visual = _visual_told(shapes) | visual_of(config)
    num_windows = len(window_numbers(shapes))
    if is_qwen_vl(config):  # one view, whatever its size, and no adapters
        visual["window"], visual["lora_repeat_num"] = _sides(visual.get("image_size"))[0], 0
    elif "image_size" not in visual:
        visual["image_size"] = [visual["window"], visual["window"] * max(1, num_windows)]
    visual["image_size"] = _sides(visual["image_size"])
    visual.setdefault("lora_repeat_num", num_windows)
    _check_numbers(told, visual)
    _check_multiples(told, visual, window="visual.image_size" if is_qwen_vl(config) else "visual.window")
    height, width = visual["image_size"]
    try:
        rows, columns = grid_of(height, width, visual["window"])
    except ValueError as error:
        raise ValueError(
            f"config.json says visual.image_size {height} x {width}: {error}, or fetch it again"
        ) from error
    if visual["lora_repeat_num"] not in (0, rows * columns):
        raise ValueError(
            f"config.json says visual.lora_repeat_num {visual['lora_repeat_num']} but {height} x {width} px have "
            f"{rows} x {columns} windows of {visual['window']} px; is it the config.json of these weights?"
        )
    heads, head_dim = told["num_attention_heads"], told.get("kv_channels")
    if head_dim is not None and told["hidden_size"] != heads * head_dim:
        raise ValueError(
            f"config.json says {heads} heads (num_attention_heads) of {head_dim} (kv_channels), which do not make a "
            f"width of {told['hidden_size']}; fetch it again"
        )
    return told


def visual_of(config: Config) -> dict[str, Any]:
    """What config.json says in `visual`, {} without one; ValueError for anything but an object."""
    found = config.get("visual")
    if not isinstance(found, dict | None):
        raise ValueError(f"config.json says visual {_shown(found)}, which is no object of words; fetch it again")
    return dict(found or {})


def _check_numbers(told: Config, visual: Config) -> None:
    """Raise where a size is no whole number that a model could have, a number is none or a switch is neither."""
    said = {word: value for word, value in told.items() if word != "visual" and (word, value) != ("kv_channels", None)}
    said |= {f"visual.{word}": value for word, value in visual.items() if word != "image_size"}
    ranges = [(word, said.get(word), *bounds) for word, bounds in _SIZES.items()]
    ranges += [(word, said[word], *bounds) for word, bounds in _OTHER_SIZES.items() if word in said]
    ranges += [("visual.image_size", side, 1, _LARGEST) for side in visual["image_size"]]
    for word, value, low, high in ranges:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _no(word, value, f"no whole number of {low} to {high}")
    for word, largest in _REALS.items():
        value = said.get(word, None if word == "visual.mlp_ratio" else 1)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= largest:
            raise _no(word, value, f"no number above 0 and up to {largest:g}")
    for word in _SWITCHES:
        if not isinstance(said.get(word, True), bool):
            raise _no(word, said[word], "neither true nor false")


def _no(word: str, value: object, problem: str) -> ValueError:
    return ValueError(f"config.json says {word} {_shown(value)}, which is {problem}; fetch it again")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_multiples(told: Config, visual: Config, *, window: str) -> None:
    """Raise where sizes do not divide one another as they must; window: the word that says how large a view is."""
    pairs = [
        ("visual.patch_size", visual["patch_size"], window, visual["window"]),
        ("visual.heads", visual["heads"], "visual.width", visual["width"]),
        ("num_attention_heads", told["num_attention_heads"], "hidden_size", told["hidden_size"]),
    ]
    for part, count, whole, total in pairs:
        if total % count:
            raise ValueError(
                f"config.json says {part} {count}, but its {whole} {total} is no multiple of that; fetch it again"
            )
    if math.isqrt(visual["n_queries"]) ** 2 != visual["n_queries"]:
        raise _no("visual.n_queries", visual["n_queries"], "no square number")


def require_heads(config: Config) -> None:
    """Raise where config.json leaves out what no tensor shows: heads, and how large the pictures are."""
    visual = visual_of(config)
    wanted = {"num_attention_heads": config, "visual.heads": visual, "visual.image_size": visual}
    for name, part in wanted.items():
        if name.rpartition(".")[2] not in part:
            raise ValueError(f"config.json does not say {name}, which no tensor shows; fetch it again")


def vision_arguments(told: Config, shapes: Shapes) -> dict[str, Any]:
    """Arguments of `build_monkey(vision=)` from a completed config.json; ranks are those of the tensors."""
    visual = told["visual"]
    places = {"attention_rank": ("attn.in_proj_lora", ATTENTION_RANK), "mlp_rank": ("mlp_lora", MLP_RANK)}
    ranks = {word: _rank(shapes, f"{_BLOCK}.0.{place}.0", usual) for word, (place, usual) in places.items()}
    return {
        "image_px": list(visual["image_size"]),
        "window_px": visual["window"],
        "patch_px": visual["patch_size"],
        "width": visual["width"],
        "layers": visual["layers"],
        "heads": visual["heads"],
        "mlp_dim": int(visual["width"] * visual["mlp_ratio"]),
        "num_queries": visual["n_queries"],
        "adapters": ranks if visual["lora_repeat_num"] else None,
    }


def build_arguments(told: Config, shapes: Shapes) -> dict[str, Any]:
    """Arguments of `build_monkey` from a completed config.json and the tensors."""
    return {
        "vision": vision_arguments(told, shapes),
        "decoder": decoder_arguments(told),
        "seq_length": told.get("seq_length", SEQ_LENGTH),
        "dynamic_ntk": told.get("use_dynamic_ntk", True),
        "logn_attention": told.get("use_logn_attn", True),
        "decoder_lora": decoder_lora(shapes),
    }


def decoder_arguments(told: Config) -> dict[str, Any]:
    """Arguments of `qwen_config` from a completed config.json."""
    return {
        "hidden_size": told["hidden_size"],
        "intermediate_size": told["intermediate_size"] // 2,
        "num_hidden_layers": told["num_hidden_layers"],
        "num_attention_heads": told["num_attention_heads"],
        "vocab_size": told["vocab_size"],
        "max_position_embeddings": told.get("max_position_embeddings", MAX_POSITIONS),
        "rms_norm_eps": float(told.get("layer_norm_epsilon", 1e-6)),
        "rope_theta": float(told.get("rotary_emb_base", 10000)),
    }


def decoder_lora(shapes: Shapes) -> dict[str, int] | None:
    """Arguments of the decoder's adapters, where the tensors have any."""
    beside = f"{_LAYER}.0.attn.c_attn_lora"
    has_any = any(name.startswith(f"{beside}.") for name in shapes)
    return {"rank": _rank(shapes, beside, DECODER_RANK)} if has_any else None


def _rank(shapes: Shapes, adapter: str, usual: int) -> int:
    name = f"{adapter}.lora_a.weight"
    return size(shapes, name, 2)[0] if name in shapes else usual


def model_node(told: Config, shapes: Shapes) -> dict[str, Any]:
    """What conf/model would say of the model; the tokenizer is the one beside the weights."""
    package = "bestiary.variants.monkey"
    return {
        "name": "monkey",
        "build": {"_target_": f"{package}.model.build_monkey", **build_arguments(told, shapes)},
        "processor": {"_target_": f"{package}.processor.MonkeyProcessor", "tokenizer": "qwen.tiktoken"},
        "module": {"_target_": "bestiary.training.module.MLLMModule"},
    }


def config_of(model: MultimodalLM, *, image_start_id: int) -> dict[str, Any]:
    """config.json of a model of ours, in the words of the published one."""
    vision, decoder = model.vision, model.decoder
    assert isinstance(vision, MonkeyVision) and isinstance(decoder, QwenDecoder)
    config = decoder.config
    return {
        "architectures": ["MonkeyLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_monkey.MonkeyLMHeadModel",
        },
        "model_type": MONKEY_TYPE,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "bf16": decoder.lm_head.weight.dtype.itemsize == 2,
        "fp16": False,
        "fp32": decoder.lm_head.weight.dtype.itemsize == 4,
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.intermediate_size,
        "kv_channels": config.hidden_size // config.num_attention_heads,
        "layer_norm_epsilon": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "rotary_emb_base": config.rope_parameters["rope_theta"],
        "seq_length": decoder.seq_length,
        "tokenizer_type": "QWenTokenizer",
        "use_dynamic_ntk": decoder.dynamic_ntk,
        "use_flash_attn": False,
        "use_logn_attn": decoder.logn_attention,
        "vocab_size": config.vocab_size,
        **PLAIN,
        "visual": _visual_words(vision, image_start_id),
    }


def _visual_words(vision: MonkeyVision, image_start_id: int) -> dict[str, Any]:
    """The words of `visual`; those that the published code has as literals only where ours differ."""
    height, width, block = vision.height_px, vision.width_px, cast(VitBlock, vision.vit.blocks[0])
    queries, out_dim = vision.resampler.query.shape
    own = {
        "heads": block.attn.heads,
        "image_size": height if height == width else [height, width],
        "image_start_id": image_start_id,
        "layers": len(vision.vit.blocks),
        "mlp_ratio": _ratio(block.mlp.c_fc.out_features, vision.vit.width),
        "output_dim": out_dim,
        "patch_size": vision.vit.conv1.kernel_size[0],
        "width": vision.vit.width,
        "lora_repeat_num": vision.num_adapters,
    }
    literals = {"n_queries": (queries, NUM_QUERIES), "window": (vision.window_px, WINDOW_PX)}
    return own | {word: value for word, (value, usual) in literals.items() if value != usual}


def _ratio(hidden: int, width: int) -> float:
    """The shortest ratio that gives this hidden width again, as int(width * ratio)."""
    for digits in range(1, 17):
        step = 10.0**-digits
        ratio = round(math.ceil(hidden / width / step) * step, digits)
        if int(width * ratio) == hidden:
            return ratio
    raise ValueError(f"an MLP of {hidden} beside a width of {width} is no ratio that config.json could say")


def _sides(image_size: object) -> list[Any]:
    """Height and width (section 1.1: the convention of the published pair)."""
    if isinstance(image_size, list) and len(image_size) == 2:
        return image_size
    return [image_size, image_size]


def _visual_told(shapes: Shapes) -> dict[str, Any]:
    """`visual` as the tensors tell it, as far as they are there; heads are any."""
    told: dict[str, Any] = {"heads": ANY_HEADS, "window": WINDOW_PX, "n_queries": NUM_QUERIES}
    if f"{_VISUAL}.conv1.weight" in shapes:
        width, _, patch, _ = size(shapes, f"{_VISUAL}.conv1.weight", 4)
        hidden = size(shapes, f"{_BLOCK}.0.mlp.c_fc.weight", 2)[0]
        told |= {"width": width, "patch_size": patch, "layers": depth(shapes, _BLOCK)}
        told |= {"mlp_ratio": _ratio(hidden, width)}
    if f"{_RESAMPLER}.query" in shapes:
        told |= {"n_queries": size(shapes, f"{_RESAMPLER}.query", 2)[0]}
    return told


def _decoder_told(shapes: Shapes) -> dict[str, Any]:
    """The decoder's sizes as the tensors tell them; heads are any."""
    vocab, dim = size(shapes, EMBEDDING, 2)
    return {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": 2 * size(shapes, f"{_LAYER}.0.mlp.w1.weight", 2)[0],
        "num_hidden_layers": depth(shapes, _LAYER),
        "num_attention_heads": ANY_HEADS,
    }


def adapted_decoder(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `qwen_config` for a decoder that adapters alone tell of; heads and vocabulary are any."""
    first = f"{_LAYER}.0"
    return {
        "hidden_size": size(shapes, f"{first}.attn.c_attn_lora.lora_a.weight", 2)[1],
        "intermediate_size": size(shapes, f"{first}.mlp.w1_lora.lora_b.weight", 2)[0],
        "num_hidden_layers": depth(shapes, _LAYER),
        "num_attention_heads": ANY_HEADS,
        "vocab_size": 1,
        "max_position_embeddings": MAX_POSITIONS,
    }
