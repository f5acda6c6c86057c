"""What the selection does: the step sizes that a trained Mamba gives the tokens it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.mixers import Mamba
from longscan.models import LanguageModel


@torch.no_grad()
def step_sizes(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    """dt of every Mamba layer, (batch, length, d_inner) each, while the model reads tokens (batch, length)."""
    streams: list[Tensor] = []
    model.backbone.mix(model.backbone.embedding(tokens), streams=streams)
    found = []
    for block, stream in zip(model.backbone.blocks, streams, strict=False):
        if isinstance(block.mixer, Mamba):
            x, _ = block.norm(stream, None, stream.dtype)
            found.append(block.mixer.step_sizes(x.to(block.mixer.activation_dtype())))
    return found
