"""What the references do to a picture: Pillow all the way, then float32.

Pad to a square with the mean colour, bicubic to 448, scale and normalise (reference/sphinx.md, transform). Written from
its description as the path to be measured against; not used by the project.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

SIDE = 448
FILL = (122, 116, 104)
"""CLIP's mean colour, as bytes."""
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def prepare(data: bytes, side: int = SIDE) -> torch.Tensor:
    """float32[3, side, side], normalised; torch's steps are those of torchvision's ToTensor and Normalize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), FILL)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    small = square.resize((side, side), Image.Resampling.BICUBIC)
    pixels_CHW = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous().float().div(255)
    return pixels_CHW.sub_(MEAN).div_(STD)
