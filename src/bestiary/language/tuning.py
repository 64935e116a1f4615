"""Training a decoder by little: adapters beside its linear layers, norms and biases alone, and quantised frozen layers.

The adapters are peft's, the quantised layers bitsandbytes'; this module puts them into a `Decoder` and knows how their
tensors are called. A name without either is called plain: `model.layers.0.self_attn.q_proj.weight` stays plain while
peft calls that tensor `...q_proj.base_layer.weight`. Everything that goes to disk about the base has plain names.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bestiary.config import Tuning
from bestiary.language.decoder import Decoder

ADAPTER = "default"
"""peft's name of its only adapter; part of our tensors' names, not of an exported adapter's."""
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.default\.weight")
_QUANTISED = re.compile(
    r"(?P<module>.+)\.(?:weight\.(?:nested_)?(?:absmax|quant_map)|weight\.quant_state\.\w+|SCB|weight_format)"
)
"""What bitsandbytes keeps beside a quantised weight."""
_OUTLIERS = 6.0  # LLM.int8() (Dettmers et al. 2022), section 3.2: columns with larger features stay in half precision


@dataclass(frozen=True, slots=True)
class BuiltInAdapters:
    """Adapters that a model is built with and that are linear in evaluation, so that weights can take them in.

    argument: of the model's builder, which adds them. beside: weight -> (its adapter, which part of the adapter's rows
    is this weight's, how many parts there are); an adapter has `lora_a.weight`, `lora_b.weight` and `lora_scale`.
    """

    argument: str
    beside: Mapping[str, tuple[str, int, int]]


def plain_name(name: str) -> str:
    """The name a tensor has without tuning; an adapter's own name is returned as it is."""
    name = name.replace(".base_layer.", ".")
    match = _QUANTISED.fullmatch(name)
    return f"{match['module']}.weight" if match and not is_adapter(name) else name


def is_adapter(name: str) -> bool:
    """True for a matrix of an adapter."""
    return _LORA.fullmatch(name) is not None


def adapted_modules(names: Iterable[str]) -> list[str]:
    """The modules that these names hold adapters of, in their order."""
    found = (match["module"] for name in names if (match := _LORA.fullmatch(name)))
    return list(dict.fromkeys(found))


def lora_names(module: str) -> tuple[str, str]:
    """Names of A, float[rank, in], and B, float[out, rank], of a module's adapter."""
    return f"{module}.lora_A.{ADAPTER}.weight", f"{module}.lora_B.{ADAPTER}.weight"


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale * b a, summed in float32 and kept in the widest dtype of the three. weight: float[out, in]."""
    dtype = torch.promote_types(weight.dtype, torch.promote_types(a.dtype, b.dtype))
    return (weight.float() + scale * (b.float() @ a.float())).to(dtype)


def linear_layers(decoder: nn.Module) -> list[str]:
    """Names of the linear layers, the output head included unless it shares the embeddings' weight."""
    embeddings = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
    named = decoder.named_modules()
    return [name for name, module in named if isinstance(module, nn.Linear) and id(module.weight) not in embeddings]


def norms_and_biases(decoder: nn.Module) -> list[str]:
    """Parameter names of the norms, and of the biases where the model has any (LLaMA has none, Qwen2 a few)."""
    found = []
    for owner, module in decoder.named_modules():
        is_norm = type(module).__name__.endswith("Norm")
        names = (name for name, _ in module.named_parameters(recurse=False) if is_norm or name == "bias")
        found += [f"{owner}.{name}" if owner else name for name in names]
    return found


def tune(
    decoder: Decoder,
    tuning: Tuning,
    *,
    adapted: Collection[str],
    whole: Collection[str],
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Put adapters beside the linear layers `adapted` and quantise those whose weight rests; in place.

    The weights of the base must be in the decoder already. whole: parameters that train themselves, so that their
    layers are not quantised. seed: the adapters' first values are a function of it and the decoder's shape alone; they
    change nothing until B, zero at first, has learned. device: where weights are quantised (their home afterwards).
    """
    if tuning.quantize != "none":
        resting = [name for name in linear_layers(decoder) if f"{name}.weight" not in whole]
        quantize(decoder, resting, tuning.quantize, device=device)
    if adapted:
        _add_adapters(decoder, tuning, adapted, seed)
    if tuning.method != "full":
        names = {plain_name(name): name for name, _ in decoder.named_parameters() if not is_adapter(name)}
        adapters = {name for name, _ in decoder.named_parameters() if is_adapter(name)}
        decoder.tunable = frozenset(names[name] for name in whole) | adapters
    decoder.choose_precision()


def quantize(decoder: Decoder, layers: Iterable[str], kind: str, *, device: torch.device | str) -> None:
    """Hold the weights of these linear layers in NF4 (`nf4`) or in int8, in place; they can no longer train."""
    for name in layers:
        layer = cast(nn.Linear, decoder.get_submodule(name))
        if layer.weight.is_meta:
            continue  # a plan without weights: there is nothing to quantise
        decoder.set_submodule(name, (_nf4 if kind == "nf4" else _int8)(layer, device))
    told: Any = decoder  # how peft learns which of its layers fits
    told.is_loaded_in_4bit, told.is_loaded_in_8bit = kind == "nf4", kind == "int8"


def check_quantization(kind: str) -> None:
    """Raise unless bitsandbytes is there; called before anything heavy."""
    if kind != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"tuning.quantize={kind} needs the package bitsandbytes, which is not installed: "
            "pip install 'bestiary[cuda]' (it also runs on CPUs, slowly: pip install bitsandbytes), "
            "or set tuning.quantize=none"
        )


def lora_config(tuning: Tuning, modules: Iterable[str], *, is_trainable: bool = True) -> Any:
    """peft's own configuration of the adapters of these modules."""
    from peft import LoraConfig

    return LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]  # a float works and is written as one
        lora_dropout=tuning.dropout,
        target_modules=sorted(modules),
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=not is_trainable,
    )


def num_elements(parameter: nn.Parameter) -> int:
    """Weights a parameter stands for: NF4 packs two of them into one byte."""
    quantised = getattr(parameter, "quant_state", None)
    return int(torch.Size(quantised.shape).numel()) if quantised is not None else parameter.numel()


def _add_adapters(decoder: Decoder, tuning: Tuning, modules: Collection[str], seed: int) -> None:
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(tuning, modules), decoder, adapter_name=ADAPTER)
    placed = adapted_modules(name for name, _ in decoder.named_parameters())
    assert sorted(placed) == sorted(modules), sorted(set(placed) ^ set(modules))[:3]


def _nf4(layer: nn.Linear, device: torch.device | str) -> nn.Module:
    """NF4 with its scales quantised once more; computes in the dtype of its input."""
    bitsandbytes = importlib.import_module("bitsandbytes")
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4", device="meta"
    )
    made.weight = bitsandbytes.nn.Params4bit(
        layer.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    made.bias = layer.bias
    # On some CPUs it repacks weights for inference, which fails for widths that are no multiple of 64 (0.50.2).
    made.support_avx512bf16_for_cpu = False
    return cast(nn.Module, made.to(device))


def _int8(layer: nn.Linear, device: torch.device | str) -> nn.Module:
    """One scale a row; outlying columns of the input are multiplied in half precision on GPUs."""
    bitsandbytes = importlib.import_module("bitsandbytes")
    made = bitsandbytes.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=_OUTLIERS,
        device="meta",
    )
    made.weight = bitsandbytes.nn.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return cast(nn.Module, made.to(device))
