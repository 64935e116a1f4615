"""SPHINX-V's published names (2364 tensors with the prefix `llma.`) and ours: SPHINX's and the prompt parts."""

from __future__ import annotations

from functools import partial

from bestiary.variants.conversion import Converter, Rule
from bestiary.variants.sphinx import weights
from bestiary.variants.sphinx.weights import SPHINX_RULES

SPHINX_V = Converter(
    (
        *SPHINX_RULES,
        Rule("llma.start_vp", ("regions.start",)),
        Rule("llma.end_vp", ("regions.end",)),
        Rule("llma.vp_encoder.pe_layer.positional_encoding_gaussian_matrix", ("regions.encoder.gaussian",)),
        Rule("llma.vp_encoder.{rest}", ("regions.encoder.{rest}",)),
        Rule("llma.vp_proj.{i}.{p}", ("regions.proj.{i}.{p}",)),
    )
)

to_reference = partial(weights.to_reference, names=SPHINX_V)
"""See `sphinx.weights.to_reference`."""
manifest = partial(weights.manifest, names=SPHINX_V)
"""See `sphinx.weights.manifest`."""
load_reference = partial(weights.load_reference, names=SPHINX_V)
"""See `sphinx.weights.load_reference`."""
load_published = partial(weights.load_published, names=SPHINX_V)
"""See `sphinx.weights.load_published`."""
