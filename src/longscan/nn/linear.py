"""A linear layer whose product and bias are wanted apart, so that the bias can go into a fused operator."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class StepProjection(nn.Linear):
    """A linear layer that may have a float32 bias beside a half-precision weight.

    By itself it gives the exact sum, in the wider of the two dtypes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y = F.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


def product_and_bias(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The product of a linear layer with x, and the bias that is still to be added.

    A layer that is more than its weight and bias (an adapter around it, a hook, quantised weights) is called as a
    whole, and nothing is left to be added.
    """
    if is_plain(layer, nn.Linear, StepProjection):
        return F.linear(x, layer.weight), layer.bias
    return layer(x), None


def is_plain(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a module is exactly one of these types and nothing is hooked to its call, so that reading its weights
    gives what calling it would."""
    return (
        type(module) in kinds
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )
