"""Folders as the Hub has them, with small random models: what the experts open in tests."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "cat", "dog", "red", "blue", "on", "the"]


def tokenizer(special: list[str], words: list[str], **named: str) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>", **named
    )


def blip2(folder: Path, *, is_matcher: bool = False, seed: int = 0) -> Path:
    """A BLIP-2 with two layers everywhere and pictures of 28 x 28."""
    torch.manual_seed(seed)
    words = tokenizer(["<s>", "<pad>", "</s>", "<unk>"], WORDS)
    processor = transformers.Blip2Processor(
        transformers.BlipImageProcessorPil(size={"height": 28, "width": 28}), words, num_query_tokens=4
    )
    config = transformers.Blip2Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "initializer_range": 0.3,
        },
        qformer_config={
            "vocab_size": len(words),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
            "initializer_range": 0.3,
            "use_qformer_text_input": is_matcher,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": len(words),
            "hidden_size": 16,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "init_std": 0.6,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
        },
        num_query_tokens=4,
        image_text_hidden_size=8,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    kind = transformers.Blip2ForImageTextRetrieval if is_matcher else transformers.Blip2ForConditionalGeneration
    return _saved(kind(config), processor, folder)


def florence(folder: Path) -> Path:
    """A Florence-2 with pictures of 32 x 32 and all place words."""
    torch.manual_seed(0)
    words = tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>", "<image>"],
        [*WORDS, *(f"<loc_{number}>" for number in range(1000))],
        extra_special_tokens={"image_token": "<image>"},
    )
    images = transformers.CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, resample=3, crop_size={"height": 32, "width": 32}
    )
    images.image_seq_length = 2
    config = transformers.Florence2Config(
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 8],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [8, 16],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "window_size": 4,
            "projection_dim": 16,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": len(words),
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 128,
            "init_std": 0.6,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return _saved(
        transformers.Florence2ForConditionalGeneration(config),
        transformers.Florence2Processor(images, words),
        folder,
    )


def sam(folder: Path) -> Path:
    """A SAM with pictures of 64 pixels."""
    torch.manual_seed(0)
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
            "initializer_range": 0.3,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
        initializer_range=0.3,
    )
    images = transformers.SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, mask_size={"longest_edge": 16}
    )
    return _saved(transformers.SamModel(config), transformers.SamProcessor(images), folder)


def _saved(model: transformers.PreTrainedModel, processor: transformers.ProcessorMixin, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
