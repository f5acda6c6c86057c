"""The MLPs that stand between mixers: gated in a Transformer++ block, plain in the first Transformer's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Name in configurations -> what stands between the two matrices of a plain MLP.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}

#: Names in configurations.
MLPS = ("gated", *ACTIVATIONS)


class GatedMLP(nn.Module):
    """SwiGLU: ``fc2(u * silu(g))`` with ``(u, g) = fc1(x)`` (Shazeer 2020, without biases)."""

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * d_intermediate, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(d_intermediate, d_model, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) to the same shape."""
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))


class MLP(nn.Module):
    """``fc2(f(fc1(x)))`` with biases (Vaswani et al. 2017, equation 2, where f is "relu"; GPT-2 has "gelu_tanh")."""

    def __init__(
        self,
        d_model: int,
        d_intermediate: int,
        activation: str = "relu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(d_model, d_intermediate, device=device, dtype=dtype)
        self.fc2 = nn.Linear(d_intermediate, d_model, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_model) to the same shape."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def make_mlp(
    kind: str,
    d_model: int,
    d_intermediate: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GatedMLP | MLP:
    """One of :data:`MLPS`."""
    if kind == "gated":
        return GatedMLP(d_model, d_intermediate, device=device, dtype=dtype)
    return MLP(d_model, d_intermediate, kind, device=device, dtype=dtype)
