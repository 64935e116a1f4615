"""Public weights of parts: what transformers computes with them, our tower computes after an import."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.blip_2.configuration_blip_2 import Blip2Config
from transformers.models.blip_2.modeling_blip_2 import Blip2Model
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPModel, CLIPVisionModel
from transformers.models.convnext.configuration_convnext import ConvNextConfig
from transformers.models.convnext.modeling_convnext import ConvNextModel
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.sam.configuration_sam import SamConfig
from transformers.models.sam.modeling_sam import SamModel

from bestiary.mllm import MultimodalLM
from bestiary.training.parents import load_first_weights
from bestiary.variants.parts import Part
from bestiary.variants.sphinx.parts import sphinx_parts
from bestiary.variants.sphinx.weights import SPHINX_RULES
from bestiary.variants.sphinx_v.model import build_sphinx_v
from bestiary.variants.sphinx_v.sam import SAM_PARTS
from bestiary.variants.sphinx_v.weights import SPHINX_V
from bestiary.weights.inspecting import inspect
from bestiary.weights.parts import import_part
from tests.parity.cases import ROOT, read_json
from tests.variants.sphinx_tiny import DECODER, VISION

VIT: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VIEW = {"image_size": 24, "patch_size": 4}
CLIP_VISION = {**VIT, **VIEW, "intermediate_size": 16, "hidden_act": "gelu"}
SIZES = {**VISION, "dinov2": {**VISION["dinov2"], "position_grid": 6}}


@pytest.fixture
def model() -> MultimodalLM:
    torch.manual_seed(1)
    return build_sphinx_v(vision=SIZES, decoder=DECODER, prompt_dim=8, attention="sdpa").eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _shaken(module: nn.Module) -> Any:
    """Random everywhere: biases, norms and tables, which begin as zeros and ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def _clip() -> Any:
    text = {**VIT, "intermediate_size": 16, "vocab_size": 10, "max_position_embeddings": 4}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return _shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=CLIP_VISION, projection_dim=6)))


def _convnext() -> Any:
    module = _shaken(ConvNextModel(ConvNextConfig(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, image_size=24)))
    for norm in module.modules():
        if hasattr(norm, "eps"):
            norm.eps = 1e-5  # the epsilon of open_clip's convnext_xxlarge, which our tower has
    return module


def _dinov2() -> Any:
    return _shaken(Dinov2Model(Dinov2Config(**VIT, **VIEW, use_swiglu_ffn=True)))


def _blip2() -> Any:
    qformer = {**VIT, "num_hidden_layers": 2, "intermediate_size": 16, "encoder_hidden_size": 8}
    opt = OPTConfig(
        vocab_size=20, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2
    )
    config = Blip2Config(
        vision_config={**VIT, **VIEW, "intermediate_size": 16},
        qformer_config=qformer,
        text_config=opt.to_dict(),
        num_query_tokens=3,
    )
    return _shaken(Blip2Model(config))


def _sam() -> Any:
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    vision = {**VIT, "image_size": 32, "patch_size": 8, "output_channels": 8, "mlp_dim": 16}
    vision |= {"global_attn_indexes": [0], "num_pos_feats": 4}
    mask = {"hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    return _shaken(SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)))


def _llama() -> Any:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48}
    return _shaken(LlamaForCausalLM(LlamaConfig(hidden_size=16, vocab_size=50, rms_norm_eps=1e-5, **sizes)))


def _views() -> torch.Tensor:
    return torch.randn(2, 3, 24, 24)


def _clip_outputs(theirs: Any, ours: MultimodalLM) -> tuple[Any, Any]:
    views, vision = _views(), getattr(theirs, "vision_model", theirs)
    return vision.post_layernorm(vision(views).last_hidden_state), ours.vision.clip(views)


def _convnext_outputs(theirs: Any, ours: MultimodalLM) -> tuple[Any, Any]:
    views = _views()
    places = theirs(views).last_hidden_state.permute(0, 2, 3, 1)
    return theirs.layernorm(places), ours.vision.convnext(views)


def _dinov2_outputs(theirs: Any, ours: MultimodalLM) -> tuple[Any, Any]:
    views = _views()
    return theirs(views).last_hidden_state, ours.vision.dinov2(views)


def _blip2_outputs(theirs: Any, ours: MultimodalLM) -> tuple[Any, Any]:
    views = _views()
    image = theirs.vision_model(views).last_hidden_state
    queries = theirs.query_tokens.expand(2, -1, -1)
    return theirs.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state, ours.vision.qformer(
        views
    )


def _sam_outputs(theirs: Any, ours: MultimodalLM) -> tuple[Any, Any]:
    xy = torch.rand(5, 2)
    encoder: Any = ours.regions.encoder
    points = [theirs.prompt_encoder.point_embed[n].weight for n in range(4)]
    own = [
        encoder.point_embeddings[0],
        encoder.point_embeddings[1],
        encoder.box_embeddings[2],
        encoder.box_embeddings[3],
    ]
    code = theirs.shared_image_embedding(xy + 0.5)  # SPHINX-V adds half a pixel to fractions
    return torch.cat([code, *points]), torch.cat([encoder.fourier(xy), *(row.weight for row in own)])


def _llama_outputs(theirs: Any, ours: MultimodalLM) -> tuple[Any, Any]:
    ids, decoder = torch.randint(0, 50, (2, 7)), ours.decoder
    hidden = decoder(decoder.embed(ids), torch.arange(7).expand(2, -1))
    return theirs(ids).logits, decoder.head(hidden)


Outputs = Callable[[Any, MultimodalLM], tuple[Any, Any]]
KINDS: dict[str, tuple[Callable[[], Any], Outputs, str, int]] = {
    "llama": (_llama, _llama_outputs, "decoder.", 0),
    "clip": (_clip, _clip_outputs, "vision.clip.", 23),
    "clip vision": (
        lambda: _shaken(CLIPVisionModel(CLIPVisionConfig(**CLIP_VISION))),
        _clip_outputs,
        "vision.clip.",
        0,
    ),
    "convnext": (_convnext, _convnext_outputs, "vision.convnext.", 0),
    "dinov2": (_dinov2, _dinov2_outputs, "vision.dinov2.", 0),
    "blip-2": (_blip2, _blip2_outputs, "vision.qformer.", 22),
    "sam": (_sam, _sam_outputs, "regions.encoder.", -1),
}
"""Maker, outputs of both, prefix of our names, tensors dropped (-1: any number)."""


@pytest.mark.parametrize("kind", KINDS)
def test_our_tower_computes_what_transformers_does_with_the_same_weights(
    tmp_path: Path, kind: str, model: MultimodalLM
) -> None:
    make, outputs, prefix, num_dropped = KINDS[kind]
    theirs = make()
    theirs.save_pretrained(tmp_path / "in")
    done = import_part(tmp_path / "in", tmp_path / "out")
    assert not done.fit.missing and not done.fit.unexpected and f"{done.target}." == prefix
    assert num_dropped == -1 or len(done.fit.dropped) == num_dropped, done.fit.dropped
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_first_weights(model, [str(tmp_path / "out")], {})
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(prefix) for name in changed)
    with torch.no_grad():
        expected, found = outputs(theirs, model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert dict(inspect(tmp_path / "in").lines)["mapped"].startswith("100 %")


RENAMED: dict[str, tuple[Callable[[], Any], Outputs, dict[str, str]]] = {
    "timm": (
        _convnext,
        _convnext_outputs,
        {
            "embeddings.patch_embeddings": "stem.0",
            "embeddings.layernorm": "stem.1",
            "encoder.stages": "stages",
            "downsampling_layer": "downsample",
            ".layers.": ".blocks.",
            "layer_scale_parameter": "gamma",
            "dwconv": "conv_dw",
            "pwconv": "mlp.fc",
            "layernorm": "norm",
        },
    ),
    "torch.hub": (
        _dinov2,
        _dinov2_outputs,
        {
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "embeddings.": "",
            "encoder.layer.": "blocks.",
            "layer_scale": "ls",
            ".lambda1": ".gamma",
            "mlp.weights_in": "mlp.w12",
            "mlp.weights_out": "mlp.w3",
            "attention.output.dense": "attn.proj",
            "layernorm": "norm",
        },
    ),
    "sam_vit_h": (
        _sam,
        _sam_outputs,
        {
            "shared_image_embedding": "prompt_encoder.pe_layer",
            "pe_layer.positional_embedding": "pe_layer.positional_encoding_gaussian_matrix",
            "point_embed.": "point_embeddings.",
            "vision_encoder": "image_encoder",
        },
    ),
}
"""Maker, outputs of both, and how the other publishers call what transformers' files call so."""


def _published(theirs: Any, folder: Path, words: dict[str, str]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    theirs.save_pretrained(folder)
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for word, other in words.items():
            name = name.replace(word, other)
        state[name] = tensor
    return state


def _fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Query, key and value as one tensor, as torch.hub's DINOv2 has them."""
    for name in [name for name in state if ".attention.attention.query." in name]:
        words = [name.replace("query", word) for word in ("query", "key", "value")]
        state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat([state.pop(word) for word in words])
    return state


@pytest.mark.parametrize("kind", RENAMED)
def test_other_publishers_files_hold_the_same_weights(tmp_path: Path, kind: str, model: MultimodalLM) -> None:
    make, outputs, words = RENAMED[kind]
    theirs = make()
    state = _fused(_published(theirs, tmp_path / "hf", words))
    if kind == "timm":  # a whole CLIP of open_clip
        state = {
            f"visual.trunk.{n.replace('norm.', 'head.norm.') if n.startswith('norm') else n}": t
            for n, t in state.items()
        }
        state |= {"text_projection": torch.zeros(2, 2), "visual.head.proj.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "weights.pth")
    done = import_part(tmp_path / "weights.pth", tmp_path / "out")
    assert not done.fit.missing and not done.fit.unexpected
    load_first_weights(model, [str(tmp_path / "out")], {})
    with torch.no_grad():
        expected, found = outputs(theirs, model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_what_does_not_fit_is_one_line_and_nothing_is_written(tmp_path: Path, model: MultimodalLM) -> None:
    folder = tmp_path / "in"
    _llama().save_pretrained(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    _changed(folder, lambda state: state.update({"model.odd": torch.zeros(1), name: torch.zeros(3, 16)}))
    with pytest.raises(ValueError, match=r"1 of another shape, first model\.layers\.1.*1 unexpected, first model\.odd"):
        import_part(folder, tmp_path / "out")
    _changed(folder, lambda state: state.__delitem__(name))
    with pytest.raises(ValueError, match=r"1 missing, first model\.layers\.1\.mlp\.up_proj"):
        import_part(folder, tmp_path / "out", keep_unknown=True)
    done = import_part(folder, tmp_path / "out", keep_unknown=True, may_lack=["model.layers.1.*"])
    assert done.fit.missing == (name,) and done.fit.unexpected == ("model.odd",)
    small = build_sphinx_v(vision=SIZES, decoder={**DECODER, "vocab_size": 51}, prompt_dim=8)
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(50, 16\), the model has \(51, 16\)"):
        load_first_weights(small, [str(tmp_path / "out")], {})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"model_type 'gpt2'.*known: LLaMA, CLIP, ConvNeXt, DINOv2, BLIP-2"):
        import_part(folder, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", (*sphinx_parts(SPHINX_RULES), *SAM_PARTS), ids=lambda part: "/".join((part.name, *part.sign))
)
def test_a_part_of_published_size_maps_whole(part: Part) -> None:
    """SPHINX-V 13B's own encoders and decoder, under the names of the part's layout."""
    told = read_json(ROOT / "sphinxv" / "manifest" / "sphinxv_13b_params.json")
    ours: dict[str, tuple[int, ...]] = {}
    for name, shape in told.get("params", told).items():
        empty = {name: torch.empty(shape, device="meta")}
        ours |= {key: tuple(value.shape) for key, value in SPHINX_V.to_ours(empty, head_dim=128).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in ours.items():
        place = part.converter.find(name) if name.startswith(f"{part.target}.") and ".unused." not in name else None
        if place is not None:
            theirs = part.sign[0] + place[2]
            rows = shapes[theirs][0] if theirs in shapes else 0
            shapes[theirs] = (rows + shape[0], *shape[1:])
    layers = {"num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824}
    found = part.fit(shapes, {"vocab_size": 32000, "hidden_size": 5120, **layers})
    assert found.num_mapped == len(shapes) == found.num_names
