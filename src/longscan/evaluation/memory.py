"""How long the channels of a Mamba remember, and what their states become on the way to a long sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.evaluation.selection import step_sizes
from longscan.mixers import Mamba
from longscan.mixers.mamba import MambaState
from longscan.models import LanguageModel


@torch.no_grad()
def memory_lengths(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    """For every Mamba layer, (d_inner,) tokens until a channel's most lasting state has faded to 1/e, while the model
    reads tokens (batch, length): one over the mean, over all of them, of dt times the smallest \\|A\\|."""
    mixers = [block.mixer for block in model.backbone.blocks if isinstance(block.mixer, Mamba)]
    steps = step_sizes(model, tokens)
    return [
        (dt.double().mean((0, 1)) * mixer.A.real.abs().amin(1)).reciprocal()
        for dt, mixer in zip(steps, mixers, strict=True)
    ]


@torch.no_grad()
def state_norms(model: LanguageModel, tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """For every Mamba layer, (lengths, d_inner) root mean squares of each channel's states after so many tokens.

    Args:
        model: whose states.
        tokens: (batch, at least the last of the lengths).
        lengths: rising.

    Raises:
        ArgumentError: there are not so many tokens, or the lengths do not rise.
    """
    if list(lengths) != sorted(set(lengths)) or not 0 < lengths[0] <= lengths[-1] <= tokens.shape[1]:
        raise ArgumentError(f"lengths must rise from at least 1 to at most {tokens.shape[1]}, got {list(lengths)}")
    state, begin = model.initial_state(tokens.shape[0]), 0
    found: list[list[Tensor]] = []
    for end in lengths:
        _, after = model.backbone(tokens[:, begin:end], state)
        assert after is not None
        state, begin = after, end
        states = [layer.ssm for layer in state.layers if isinstance(layer, MambaState)]
        found.append([ssm.abs().double().square().mean((0, 2)).sqrt() for ssm in states])
    return [torch.stack(rows) for rows in zip(*found, strict=True)]
