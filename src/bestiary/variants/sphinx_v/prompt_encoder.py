"""SPHINX-V's prompt encoder: points and boxes on the picture become rows of the decoder.

A changed form of the prompt encoder of Segment Anything: coordinates are turned into random Fourier features; a point
goes through one linear layer, a box is the two corners side by side; learned embeddings tell used slots from empty
ones. Source: Draw-and-Understand commit 28a1bd1, class `llama_ens5_vp`; quirks are named where they are kept.

Shape letters: R region rows (prompt slots), E examples with prompts, C prompt width, D decoder width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from bestiary.schema import RegionKind, RegionRows
from bestiary.variants.sphinx.model import Projection

COORDINATE_SHIFT = 0.5
"""Added to coordinates that are fractions already, as if they were pixels; published weights were trained with it."""


class PromptEncoder(nn.Module):
    """Rows (coordinates, kind, used or empty) to float[R, 2 * dim].

    dim: width of one coordinate pair's code, 256 in the published weights. The Fourier matrix never trains.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"prompt dim={dim} must be even: half of it are sines, half cosines")
        self.out_dim = 2 * dim
        self.gaussian = nn.Parameter(torch.randn(2, dim // 2), requires_grad=False)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in ("empty", "used"))
        box_dims = (2 * dim, 2 * dim, dim, dim)  # empty, used, first corner, second corner
        self.box_embeddings = nn.ModuleList(nn.Embedding(1, width) for width in box_dims)
        self.up = nn.Linear(dim, 2 * dim)
        nn.init.xavier_uniform_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def fourier(self, xy: torch.Tensor) -> torch.Tensor:
        """Sines, then cosines of the coordinates' random projections: float32[..., dim]; xy: float[..., 2].

        Products and a sum rather than a matrix product, so that autocast cannot round the phases.
        """
        matrix = self.gaussian.float()
        centred = 2 * (xy.float() + COORDINATE_SHIFT) - 1
        phase = 2 * torch.pi * (centred[..., :1] * matrix[0] + centred[..., 1:] * matrix[1])
        return torch.cat([phase.sin(), phase.cos()], dim=-1)

    def forward(self, coords: torch.Tensor, kinds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """float[R, 2 * dim]; coords: float[R, 4], fractions of the padded square; kinds: RegionKind; valid: bool."""
        used = valid.bool().unsqueeze(-1)
        empty_point, used_point = _weights(self.point_embeddings)
        empty_box, used_box, first, second = _weights(self.box_embeddings)
        point = self.fourier(coords[:, :2])
        corners = torch.cat([point + first, self.fourier(coords[:, 2:]) + second], dim=-1)
        box = corners + torch.where(used, used_box, empty_box)
        lifted = self.up((point + torch.where(used, used_point, empty_point)).to(self.up.weight.dtype))
        return torch.where((kinds == RegionKind.POINT).unsqueeze(-1), lifted.to(box.dtype), box)


def _weights(embeddings: nn.ModuleList) -> list[torch.Tensor]:
    return [cast(nn.Embedding, embedding).weight for embedding in embeddings]


SAM_NAMES = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "gaussian",
    "prompt_encoder.point_embeddings.0.weight": "point_embeddings.0.weight",
    "prompt_encoder.point_embeddings.1.weight": "point_embeddings.1.weight",
    "prompt_encoder.point_embeddings.2.weight": "box_embeddings.2.weight",
    "prompt_encoder.point_embeddings.3.weight": "box_embeddings.3.weight",
}
"""SAM's names and ours; its mask parts and its "no point" embedding have no place here."""


class PromptRows(nn.Module):
    """Tags, prompt encoder and projection: the rows of all REGION positions.

    out_dim: decoder width D; dim: see `PromptEncoder`.
    num_slots: slots that the processor fills at least; the module itself takes any number.
    """

    def __init__(self, *, out_dim: int, dim: int, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.encoder = PromptEncoder(dim)
        self.proj = Projection(self.encoder.out_dim, out_dim)
        self.start = nn.Parameter(torch.rand(1, 1, out_dim))
        self.end = nn.Parameter(torch.rand(1, 1, out_dim))

    @property
    def layout(self) -> dict[str, int]:
        """What the processor must know: the least number of slots of a sample with prompts."""
        return {"num_slots": self.num_slots}

    def forward(self, regions: RegionRows) -> torch.Tensor:
        """float[R + 2 * E, D]: for every example with prompts its start tag, its slots, its end tag."""
        slots = self.slots(regions)
        counts = torch.as_tensor(regions.counts, device=slots.device)
        num_rows, num_examples = slots.shape[0], counts.shape[0]
        example = torch.arange(num_examples, device=slots.device)
        owner = torch.repeat_interleave(example, counts, output_size=num_rows)
        last = counts.cumsum(0) + 2 * example + 1
        places = [last - counts - 1, torch.arange(num_rows, device=slots.device) + 2 * owner + 1, last]
        tags = [tag[0].to(slots.dtype).expand(num_examples, -1) for tag in (self.start, self.end)]
        rows = torch.cat([tags[0], slots, tags[1]])
        return torch.empty_like(rows).index_copy(0, torch.cat(places), rows)

    def slots(self, regions: RegionRows) -> torch.Tensor:
        """float[R, D]: the prompt slots without tags."""
        weight = self.proj.weight
        coords, kinds, valid = (
            torch.as_tensor(x, device=weight.device) for x in (regions.coords, regions.kinds, regions.valid)
        )
        return self.proj(self.encoder(coords, kinds, valid).to(weight.dtype))  # type: ignore[no-any-return]


def reference_rows(sparse_vp: torch.Tensor, *, quirks: bool = True) -> RegionRows:
    """The published code's prompts as region rows.

    sparse_vp: float[B, S, 4], fractions of the padded square: points (x, y, -1, -1), boxes (x0, y0, x1, y1), empty
        slots all zero, or (0, 0, -1, -1) beside points.
    quirks: as published: a sample is of points only if all its rows are, otherwise every row is read as a box, -1
        included, and any row with a coordinate other than 0 counts as used. Without: every row is what it says, and
        only the zero rows after the last prompt are empty, so that a point at (0, 0) counts.
    """
    looks_point = (sparse_vp[..., 2:] == -1).all(dim=-1)
    is_point = looks_point.all(dim=1, keepdim=True).expand_as(looks_point) if quirks else looks_point
    coords = torch.where(is_point.unsqueeze(-1) & sparse_vp.new_tensor([0, 0, 1, 1]).bool(), 0.0, sparse_vp)
    valid = (coords != 0).any(dim=-1)
    if not quirks:
        valid = valid.flip(1).cumsum(dim=1).flip(1) > 0  # everything up to the last row with content
        valid[:, :1] = True
    return RegionRows(
        coords=coords.flatten(0, 1),
        kinds=torch.where(is_point, RegionKind.POINT, RegionKind.BOX).flatten(),
        valid=valid.flatten(),
        counts=torch.full((sparse_vp.shape[0],), sparse_vp.shape[1]),
    )
