"""Layers whose weights are int8 (:mod:`longscan.ops.int8`): a quarter of float32's memory, for inference.

Their weights are not trained; gradients pass through them, so that adapters around them can be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longscan.nn.linear import StepProjection, is_plain
from longscan.ops.int8 import Int8Matrix, groups, quantize


class _Int8Weight(nn.Module):
    """Holds an :class:`Int8Matrix`; ``.to(dtype)`` changes the dtype of what the layer gives, never its weights."""

    scales: Tensor

    def __init__(self, matrix: Int8Matrix) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.values = nn.Parameter(matrix.values, requires_grad=False)
        self.register_buffer("scales", matrix.scales)

    @property
    def matrix(self) -> Int8Matrix:
        return Int8Matrix(self.values, self.scales)

    @property
    def weight(self) -> Tensor:
        """The whole weight in the activations' dtype, made anew each time."""
        return self.matrix.dense().to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Int8Weight:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return "{} x {}, int8".format(*self.values.shape)


class Int8Linear(_Int8Weight):
    """``nn.Linear`` with an int8 weight.

    Args:
        matrix: (out_features, in_features).
        bias: (out_features,).
    """

    def __init__(self, matrix: Int8Matrix, bias: nn.Parameter | None = None) -> None:
        super().__init__(matrix)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in x's dtype or the bias's, if that is wider."""
        y = F.linear(x, self.matrix.dense().to(x.dtype))
        return y if self.bias is None else y + self.bias


class Int8Embedding(_Int8Weight):
    """``nn.Embedding`` with an int8 weight; args: matrix (tokens, width)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Integers of any shape to (..., width)."""
        return self.matrix.rows(tokens).to(self.dtype)


@torch.no_grad()
def quantize_layers(module: nn.Module) -> None:
    """Put int8 layers in the place of all plain linear layers and embeddings below ``module``.

    Layers that are more than their weights (adapters, hooks, subclasses) stay as they are. Layers on the meta device
    become such ones, to be given weights.
    """
    for name, child in module.named_children():
        if is_plain(child, nn.Embedding):
            setattr(module, name, Int8Embedding(_quantized(child.weight)))  # type: ignore[arg-type]
        elif is_plain(child, nn.Linear, StepProjection):
            setattr(module, name, Int8Linear(_quantized(child.weight), child.bias))  # type: ignore[arg-type]
        else:
            quantize_layers(child)


def _quantized(weight: Tensor) -> Int8Matrix:
    if weight.is_meta:
        rows, columns = weight.shape
        values = torch.empty(rows, columns, dtype=torch.int8, device="meta")
        return Int8Matrix(values, torch.empty(rows, groups(columns), device="meta"))
    return quantize(weight)
