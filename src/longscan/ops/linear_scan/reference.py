"""The definition of the linear scan: one step after another, plain PyTorch, any device, any dtype up to complex128."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longscan.ops.linear_scan import rows


def unsupported(*_: Tensor | None) -> str | None:
    """It serves every call."""
    return None


def scan(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t]: a, b (rows, length, channels), before (rows, channels)."""
    h, outputs = before, []
    for decay, add in zip(a.unbind(1), b.unbind(1), strict=True):
        h = decay * h + add
        outputs.append(h)
    return torch.stack(outputs, 1)


forward = partial(rows.forward, scan)
backward = partial(rows.backward, scan)
