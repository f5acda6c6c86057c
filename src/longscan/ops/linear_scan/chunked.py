"""The linear scan in two levels, plain PyTorch on every device.

Time is cut into stretches, about as many as they are long. All stretches are walked side by side, each from zero, with
the product of its decays; then the stretches in turn; then what entered a stretch is added to all its steps. So the
number of operations in a row grows with the root of the length.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.ops.linear_scan import rows


def unsupported(*_: Tensor | None) -> str | None:
    """It serves every call."""
    return None


def scan(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t]: a, b (rows, length, channels), before (rows, channels)."""
    length = b.shape[1]
    inner = math.isqrt(length - 1) + 1
    outer = -(-length // inner)
    # Steps first, so that each is one block of memory.
    a, b = (
        F.pad(t, (0, 0, 0, outer * inner - length)).unflatten(1, (outer, inner)).transpose(1, 2).contiguous()
        for t in (a, b)
    )
    for step in range(1, inner):
        b[:, step].addcmul_(a[:, step], b[:, step - 1])
        a[:, step].mul_(a[:, step - 1])
    entering = [before]
    for stretch in range(outer - 1):
        entering.append(torch.addcmul(b[:, -1, stretch], a[:, -1, stretch], entering[-1]))
    b.addcmul_(a, torch.stack(entering, 1)[:, None])
    return b.transpose(1, 2).flatten(1, 2)[:, :length]


forward = partial(rows.forward, scan)
backward = partial(rows.backward, scan)
