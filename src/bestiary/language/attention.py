"""Packed attention: the segments of a batch never see one another, and padding is never computed.

The decoder runs on one flat row of real positions, `x[1, K, ...]`, in which segments of equal length lie side by side
(`PackedLayout`). A group of n segments of length L is then a plain view `[n, L, ...]`, so that one causal SDPA call
serves it without a mask and without a copy; variable-length kernels read the same row through `cu_seqlens`.
transformers reaches this through its AttentionInterface, under the name `ATTENTION_NAME`.

Shape letters: B rows, T positions of a row, K real positions of all rows, H query heads, G key/value heads,
d width of a head, n segments of a group, L their length, S all segments.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

Attention = Literal["auto", "sdpa", "varlen", "flash_attn"]
ATTENTION_NAME = "bestiary_packed"


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the segments of a [B, T] batch lie in the flat row of its real positions.

    shape: (B, T).
    groups: (n, L) of neighbouring segments of equal length; lengths ascend.
    order: int64[K], index b * T + t of every flat position; None where flat order is row-major order, unpadded.
    cu_seqlens: int32[S + 1], starts of the segments in the flat row, and K.
    """

    shape: tuple[int, int]
    groups: tuple[tuple[int, int], ...]
    order: Tensor | None
    cu_seqlens: Tensor

    @classmethod
    def from_spans(
        cls, spans: Sequence[tuple[int, int, int]], shape: tuple[int, int], device: torch.device | str = "cpu"
    ) -> PackedLayout:
        """The layout of segments given as (row, start, length), without a look at any device tensor."""
        rows, width = shape
        by_length = sorted((s for s in spans if s[2] > 0), key=lambda s: s[2])  # stable: ties stay in row-major order
        groups = tuple((len(list(same)), length) for length, same in groupby(by_length, key=lambda s: s[2]))
        lengths = np.array([length for _, _, length in by_length], dtype=np.int64)
        starts = np.array([row * width + start for row, start, _ in by_length], dtype=np.int64)
        ends = np.cumsum(lengths)
        order = np.repeat(starts - (ends - lengths), lengths) + np.arange(int(lengths.sum()))
        is_identity = len(order) == rows * width and bool((order == np.arange(len(order))).all())
        cu_seqlens = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device, non_blocking=True)
        index = None if is_identity else torch.from_numpy(order).to(device, non_blocking=True)
        return cls(shape, groups, index, cu_seqlens)

    @classmethod
    def from_segment_ids(cls, segment_ids_BT: Tensor) -> PackedLayout:
        """The layout of runs of equal non-zero ids (0 is padding); waits for the device where the ids are on one."""
        ids = segment_ids_BT.cpu().numpy()
        rows, width = ids.shape
        spans: list[tuple[int, int, int]] = []
        for row in range(rows):
            cuts = [0, *(np.flatnonzero(np.diff(ids[row])) + 1).tolist(), width]
            spans += [(row, a, b - a) for a, b in pairwise(cuts) if b > a and ids[row, a] != 0]
        return cls.from_spans(spans, (rows, width), segment_ids_BT.device)

    @property
    def max_length(self) -> int:
        """Positions of the longest segment."""
        return self.groups[-1][1] if self.groups else 0

    def pack(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] to [1, K, ...]; a view where nothing has to move."""
        flat = x_BT.flatten(0, 1)
        return (flat if self.order is None else flat.index_select(0, self.order))[None]

    def unpack(self, x_1K: Tensor) -> Tensor:
        """[1, K, ...] back to [B, T, ...], zeros at padding."""
        flat = x_1K[0]
        if self.order is not None:
            empty = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:])
            flat = empty.index_copy(0, self.order, flat)
        return flat.view(*self.shape, *flat.shape[1:])


def check_attention(attention: str) -> None:
    """Raise where this machine cannot run an explicitly asked implementation: what is missing, and what to do."""
    if attention not in get_args(Attention):
        raise ValueError(f"attention={attention!r} is unknown; choose one of {', '.join(get_args(Attention))}")
    if attention == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "attention=flash_attn needs the package flash-attn, which is not installed: "
            "pip install flash-attn on a machine with CUDA, or set attention=auto"
        )
    if attention in ("varlen", "flash_attn") and not torch.cuda.is_available():
        raise ValueError(
            f"attention={attention} needs an NVIDIA GPU and torch sees none here: set attention=auto (or sdpa)"
        )


def resolve_attention(attention: Attention, device: torch.device, dtype: torch.dtype) -> Attention:
    """The implementation for tensors of this device and dtype; an explicit wish they do not fit raises."""
    is_kernel_dtype = dtype in (torch.float16, torch.bfloat16)
    if attention == "auto":
        return "varlen" if device.type == "cuda" and is_kernel_dtype else "sdpa"
    if attention == "sdpa":
        return attention
    if device.type != "cuda":
        raise ValueError(
            f"attention={attention} got tensors on {device}: move the model to a GPU or set attention=sdpa"
        )
    if not is_kernel_dtype:
        raise ValueError(
            f"attention={attention} computes in bfloat16 or float16, got {dtype}: "
            "set cluster.precision=bf16-mixed (or bf16-true), or attention=sdpa"
        )
    return attention


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    dropout: float = 0.0,
    packed: PackedLayout | None = None,
    key_mask: Tensor | None = None,
    attention: Attention = "auto",
    sliding_window: int | None = None,
    softcap: float | None = None,
    query_scale: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of one decoder layer, in the signature transformers calls.

    With `packed`: query [1, H, K, d], key and value [1, G, K, d], causal within each segment. Without: one new
    position per sequence over a cache, query [B, H, 1, d], key and value [B, G, P, d], `key_mask` bool[B, 1, 1, P]
    or None where every key counts. Returns [1, K, H, d] or [B, 1, H, d].
    query_scale: float[1, K] or [B, 1], a factor on the query of every position.
    """
    if query_scale is not None:
        query = query * query_scale[:, None, :, None].to(query.dtype)
    longest = packed.max_length if packed is not None else key.shape[2]
    window = None if sliding_window is None or longest <= sliding_window else sliding_window
    is_odd = softcap is not None or window is not None
    if packed is None:
        if is_odd:
            allowed = _newest(key.shape[2], window, key_mask, key.device)
            return _spelled_out(query, key, value, allowed, scaling, softcap).transpose(1, 2), None
        return _decode_step(query, key, value, key_mask, scaling), None
    dtype = value.dtype  # under autocast the rotation leaves query and key in float32
    query, key = query.to(dtype), key.to(dtype)
    backend = resolve_attention(attention, query.device, dtype)
    if is_odd and attention != "auto" and backend != "sdpa":
        raise ValueError(
            f"attention={attention} has no soft cap (asked: {softcap}) and no sliding window shorter than a sample "
            f"(window {sliding_window}, longest sample {longest}): set attention=auto"
        )
    if is_odd:
        return _grouped_spelled_out(query, key, value, packed, scaling, softcap, window), None
    if backend == "sdpa":
        return _sdpa(query, key, value, packed, scaling, dropout), None
    kernel = _varlen if backend == "varlen" else _flash_attn
    return kernel(_flat(query), _flat(key), _flat(value), packed, scaling, dropout)[None], None


def _flat(x_1HKd: Tensor) -> Tensor:
    """[1, H, K, d] to [K, H, d], the memory order of the projections: a view."""
    return x_1HKd[0].transpose(0, 1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float, dropout: float) -> Tensor:
    """One causal SDPA call per group of equally long segments."""
    sizes = [count * length for count, length in layout.groups]
    is_grouped = query.shape[1] != key.shape[1]
    # split, not slices: its backward pass is one concatenation instead of one full-size sum per group
    pieces = zip(*(torch.split(_flat(x), sizes) for x in (query, key, value)), strict=True)
    parts = []
    for shape, piece in zip(layout.groups, pieces, strict=True):
        q, k, v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in piece)
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=shape[1] > 1, scale=scaling, enable_gqa=is_grouped
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def _grouped_spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """`_spelled_out` for every group of equally long segments."""
    sizes = [count * length for count, length in layout.groups]
    pieces = zip(*(torch.split(_flat(x), sizes) for x in (query, key, value)), strict=True)
    parts = []
    for shape, piece in zip(layout.groups, pieces, strict=True):
        q, k, v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in piece)
        places = torch.arange(shape[1], device=q.device)
        behind = places[:, None] - places
        allowed = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        parts.append(_spelled_out(q, k, v, allowed, scaling, softcap).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def _spelled_out(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Attention [n, H, L, d] with all scores in memory, for what no kernel here does: Gemma 2's cap and window."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    scores = (query.to(value.dtype) @ key.to(value.dtype).transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _newest(length: int, window: int | None, key_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which columns of a cache a new position sees, bool[..., 1, P]: those of its sequence, the window's last."""
    if window is None:
        return key_mask
    inside = torch.arange(length, device=device) >= length - window
    return inside if key_mask is None else key_mask & inside


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float, dropout: float) -> Tensor:
    """torch's own variable-length kernel, causal by its window."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError(f"torch's variable-length attention has no dropout (asked: {dropout}): set attention=sdpa")
    cu, longest = layout.cu_seqlens, layout.max_length
    is_grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=is_grouped)
    assert isinstance(out, Tensor)
    return out


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float, dropout: float) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    kernel: Callable[..., Tensor] = flash_attn_varlen_func
    cu, longest = layout.cu_seqlens, layout.max_length
    return kernel(q, k, v, cu, cu, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=True)


def _decode_step(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scaling: float) -> Tensor:
    """One query per sequence: the heads that share a key head stand in as query positions, so no key is repeated."""
    rows, heads, _, width = query.shape
    query = query.to(value.dtype).reshape(rows, key.shape[1], heads // key.shape[1], width)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, scale=scaling)
    return out.reshape(rows, 1, heads, width)


AttentionInterface.register(ATTENTION_NAME, packed_attention)
