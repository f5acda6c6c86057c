"""What the selection does: the step sizes that a trained Mamba gives the tokens it reads, and what its states hold."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longscan.mixers import Mamba
from longscan.mixers.mamba import MambaState
from longscan.models import LanguageModel


@dataclasses.dataclass(frozen=True)
class Selection:
    """Of one Mamba layer, while the model reads tokens (batch, length).

    Args:
        layer: its place among all layers, from 0.
        dt: step sizes (batch, length, d_inner).
        norms: of each channel's states after each token, (batch, length, d_inner).
        kept: of what was written at each token, the share that is in the states after the last one (batch, length);
            over all states, as far as each was written to.
    """

    layer: int
    dt: Tensor
    norms: Tensor
    kept: Tensor


@torch.no_grad()
def step_sizes(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    """dt of every Mamba layer, (batch, length, d_inner) each, while the model reads tokens (batch, length)."""
    return [dt for _, dt in _steps(model, tokens)]


@torch.no_grad()
def selections(model: LanguageModel, tokens: Tensor) -> list[Selection]:
    """What every Mamba layer does with tokens (batch, length); states are looked at token by token."""
    state = model.initial_state(len(tokens))
    norms: list[list[Tensor]] = [[] for _ in model.backbone.blocks]
    for token in tokens.unbind(1):
        _, state = model.backbone.step(token, state)
        for found, own in zip(norms, state.layers, strict=True):
            if isinstance(own, MambaState):
                found.append(torch.linalg.vector_norm(own.ssm, dim=-1).float())
    layers = []
    for layer, dt in _steps(model, tokens):
        mixer = model.backbone.blocks[layer].mixer
        assert isinstance(mixer, Mamba)
        layers.append(Selection(layer, dt, torch.stack(norms[layer], dim=1), _kept(dt, mixer.A_log)))
    return layers


def _steps(model: LanguageModel, tokens: Tensor) -> list[tuple[int, Tensor]]:
    streams: list[Tensor] = []
    model.backbone.mix(model.backbone.embedding(tokens), streams=streams)
    found = []
    for layer, (block, stream) in enumerate(zip(model.backbone.blocks, streams, strict=False)):
        if isinstance(block.mixer, Mamba):
            x = stream if block.norm is None else block.norm(stream, None, stream.dtype)[0]
            found.append((layer, block.mixer.step_sizes(x.to(block.mixer.activation_dtype()))))
    return found


def _kept(dt: Tensor, A_log: Tensor) -> Tensor:
    """(batch, length): the mean of exp(A * the sum of dt after a token) over channels and states, weighted by its own
    dt, in proportion to which it was written."""
    after = dt.flip(1).cumsum(1).flip(1) - dt
    decays = torch.exp(-after[..., None] * A_log.float().exp()).mean(-1)
    return (dt * decays).sum(-1) / dt.sum(-1)
