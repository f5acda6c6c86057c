"""Absolute positions, added to embeddings: learned, or sines (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError
from longscan.nn.sequence_parallel import first_position

#: Names in configurations.
POSITIONS = ("none", "sinusoidal", "learned")


def places(length: int, device: torch.device, before: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Where in its sequence each token stands, (batch or 1, length) int64.

    Args:
        length: tokens of a row, within :func:`longscan.nn.sequence_parallel.sequence_parallel` of this process's part.
        device: of the result.
        before: (sequences,), tokens that came before; None: none.
        cu_seqlens: (sequences + 1,) offsets of sequences packed in one row (the whole of it).
    """
    place = torch.arange(length, device=device) + first_position()
    if cu_seqlens is None:
        return place[None] if before is None else before[:, None] + place
    # The last sequence that does not start behind it: one that is empty starts where the next one does.
    sequence = torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True) - 1
    place = place - cu_seqlens[sequence]
    return (place if before is None else before[sequence] + place)[None]


class SinusoidalPositions(nn.Module):
    """``scale x + PE``, where ``PE[p, 2i]`` and ``PE[p, 2i+1]`` are sine and cosine of ``p / 10000^(2i / d_model)``.

    Angles are computed in float32 and nothing is cached, so there is no longest length.

    Args:
        d_model: width.
        scale: of x; for embeddings whose numbers are of size 1 / sqrt(d_model), sqrt(d_model) (section 3.4).
    """

    def __init__(self, d_model: int, scale: float = 1.0) -> None:
        super().__init__()
        self.d_model, self.scale = d_model, scale

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (batch, length, d_model) and positions (batch or 1, length), integers, to the like of x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        exponents = torch.arange(0, self.d_model, 2, device=x.device, dtype=wide) / self.d_model
        angles = positions[..., None].to(wide) * 10_000.0**-exponents
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.d_model]
        return (x.to(wide) * self.scale + waves).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.d_model}, scale={self.scale:.4g}"


class LearnedPositions(nn.Module):
    """``x + weight[position]`` (GPT and its successors), up to a longest sequence.

    Args:
        d_model: width.
        longest: positions that there are.
    """

    def __init__(
        self,
        d_model: int,
        longest: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(longest, d_model, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (batch, length, d_model) and positions (batch or 1, length), integers, to the like of x.

        Raises:
            ArgumentError: a position that is not there. Positions are looked at on the CPU only: elsewhere it would
                cost a wait.
        """
        longest = len(self.weight)
        if (
            positions.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and (last := int(positions.max())) >= longest
        ):
            raise ArgumentError(
                f"max_positions: the model has {longest} learned positions, and this token is number {last + 1} of its "
                'sequence; positions="sinusoidal" has no longest sequence'
            )
        return x + self.weight[positions].to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, longest={len(self.weight)}"


def make_positions(
    kind: str,
    d_model: int,
    longest: int,
    *,
    scale: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SinusoidalPositions | LearnedPositions | None:
    """One of :data:`POSITIONS`; ``longest`` is of learned ones, ``scale`` of sines."""
    if kind == "learned":
        return LearnedPositions(d_model, longest, device=device, dtype=dtype)
    return SinusoidalPositions(d_model, scale) if kind == "sinusoidal" else None
