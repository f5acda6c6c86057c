"""Residual layers for models that are no language models: mixers and MLPs with the norm that one wants, and dropout."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.models.options import MixerChoice
from longscan.nn.mixer import SequenceMixer
from longscan.nn.mlp import make_mlp
from longscan.nn.norms import RMSNorm
from longscan.nn.sequence_parallel import whole_sequences_only
from longscan.nn.state import ModelState, State

NORMS = ("rms", "layer", "batch")


class ChannelBatchNorm(nn.BatchNorm1d):
    """Batch norm of each channel over all places that count, (batch, length, channels)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask (batch, length) is False where a sequence is only filled up; x stays as it is there."""
        if mask is None:
            return super().forward(x.flatten(0, -2)).view_as(x)
        return x.masked_scatter(mask[..., None], super().forward(x[mask]))


def make_norm(kind: str, d_model: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """One of :data:`NORMS`."""
    if kind == "rms":
        return RMSNorm(d_model, device=device, dtype=dtype)
    kinds: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "batch": ChannelBatchNorm}
    return kinds[kind](d_model, device=device, dtype=dtype)


class Residual(nn.Module):
    """A branch beside the stream: x + dropout(branch(norm(x))), or the norm of the sum.

    Args:
        branch: a mixer or an MLP.
        norm: one of :data:`NORMS`.
        prenorm: whether the norm stands before the branch or after the sum.
        dropout: probability with which a channel of the branch is left out, for a whole sequence at once (as in S4's
            models).
    """

    def __init__(
        self,
        branch: nn.Module,
        d_model: int,
        *,
        norm: str = "layer",
        prenorm: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.branch, self.prenorm, self.dropout = branch, prenorm, dropout
        self.norm = make_norm(norm, d_model, device, dtype)

    @property
    def mixer(self) -> SequenceMixer | None:
        """The branch, if it is a mixer."""
        return self.branch if isinstance(self.branch, SequenceMixer) else None

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State | None]:
        """x (batch, length, d_model) to the same shape, and the mixer's state."""
        y = self._norm(x, mask) if self.prenorm else x
        if self.mixer is None:
            y = self.branch(y)
        elif state is not None and y.shape[1] == 1:
            y, state = self.mixer.step(y.squeeze(1), state)
            y = y.unsqueeze(1)
        else:
            y, state = self.mixer(y, state)
        if self.training and self.dropout:
            # One draw for all places: dropout of (batch, channels, length) along the last axis.
            y = F.dropout1d(y.transpose(1, 2), self.dropout).transpose(1, 2)
        y = x + y
        return y if self.prenorm else self._norm(y, mask), state

    def _norm(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.norm(x, mask) if isinstance(self.norm, ChannelBatchNorm) else self.norm(x)


class Stack(nn.Module):
    """Layers of mixers, each followed by an MLP if one is wanted.

    Args:
        config: which mixers.
        d_model: width.
        n_layer: number of mixers.
        d_intermediate: width of the MLPs; 0 means none.
        mlp: their kind, one of :data:`longscan.nn.mlp.MLPS`.
        norm, prenorm, dropout: of every branch, see :class:`Residual`.
    """

    def __init__(
        self,
        config: MixerChoice,
        d_model: int,
        n_layer: int,
        *,
        d_intermediate: int = 0,
        mlp: str = "gated",
        norm: str = "layer",
        prenorm: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for layer in range(n_layer):
            branches: list[nn.Module] = [config.build_mixer(layer, d_model, device=device, dtype=dtype)]
            if d_intermediate:
                branches.append(make_mlp(mlp, d_model, d_intermediate, device=device, dtype=dtype))
            self.layers.extend(
                Residual(branch, d_model, norm=norm, prenorm=prenorm, dropout=dropout, device=device, dtype=dtype)
                for branch in branches
            )

    @property
    def _residuals(self) -> list[Residual]:
        return cast("list[Residual]", list(self.layers))

    @property
    def mixers(self) -> list[SequenceMixer]:
        """The mixers, in order."""
        return [layer.mixer for layer in self._residuals if layer.mixer is not None]

    def initial_state(self, batch: int, dtype: torch.dtype | None = None) -> ModelState:
        """The state before the first place, of every mixer."""
        return ModelState(tuple(mixer.initial_state(batch, dtype=dtype) for mixer in self.mixers))

    def state_bytes(self, batch: int = 1, length: int = 0) -> int:
        """Bytes of the state of ``batch`` sequences after ``length`` places."""
        return sum(mixer.state_bytes(batch, length) for mixer in self.mixers)

    def forward(
        self, x: Tensor, state: ModelState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ModelState | None]:
        """x (batch, length, d_model) to the same shape; mask is of batch norms (:class:`ChannelBatchNorm`)."""
        whole_sequences_only("this model", "batch norms, dropout and pooling look at all of a sequence")
        before = None if state is None else iter(state.layers)
        after: list[State | None] = []
        for layer in self._residuals:
            own = next(before) if before is not None and layer.mixer is not None else None
            x, own = layer(x, own, mask)
            if layer.mixer is not None:
                after.append(own)
        return x, None if state is None else ModelState(tuple(after))
