"""The selective scan as plain PyTorch would do it in parallel: every decay and every state is a tensor in memory.

What a fused kernel is measured against (Gu and Dao 2023, section 4.5, "Scan (PyTorch)"): the (batch, length, channels,
state) tensors that it never writes down are here written and read several times over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan import diagnostics


def scan(inputs: dict[str, Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The scan with skip, gate, dt bias and softplus: a call that gives y, and the inputs it differentiates.

    Computes in float32 at least.

    Raises:
        MemoryError: on the CPU, whose system would not refuse but kill: the tensors are larger than the memory.
    """
    x, dt, A, B, C, D, z, dt_bias = leaves = list(inputs.values())
    if x.device.type == "cpu":
        _check_memory(x.numel() * A.shape[1], backward=x.requires_grad)

    def call() -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        u, b, c = x.to(wide), B.to(wide), C.to(wide)
        step = F.softplus(dt.to(wide) + dt_bias)
        decays = torch.exp(step[..., None] * A)
        states = parallel_scan(decays, (step * u)[..., None] * b[:, :, None])
        y = (states @ c[..., None]).squeeze(-1) + D * u
        return (y * F.silu(z.to(wide))).to(x.dtype)

    return call, leaves


def parallel_scan(decays: Tensor, inputs: Tensor) -> Tensor:
    """h[t] = decays[t] h[t-1] + inputs[t] along axis 1, from zero, in 2 log2(length) steps whose work is linear.

    Pairs of neighbours are merged, the scan of the merged ones gives every second state, and one more step the others
    (Blelloch 1990).
    """
    length = inputs.shape[1]
    if length == 1:
        return inputs
    pairs = length // 2
    left, right = slice(0, 2 * pairs, 2), slice(1, None, 2)
    merged = decays[:, right] * inputs[:, left] + inputs[:, right]
    odd = parallel_scan(decays[:, right] * decays[:, left], merged)
    others = odd[:, : (length - 1) // 2]
    even = torch.cat([inputs[:, :1], decays[:, 2::2] * others + inputs[:, 2::2]], dim=1)
    states = torch.stack([even[:, :pairs], odd], dim=2).flatten(1, 2)
    return torch.cat([states, even[:, pairs:]], dim=1) if length % 2 else states


def _check_memory(numbers: int, *, backward: bool) -> None:
    """`numbers`: entries of one of the large tensors, of which a pass holds about 6, and backward keeps twice that."""
    there, needed = diagnostics.machine.physical_memory(), numbers * 4 * (12 if backward else 6)
    if there is not None and needed > there // 2:
        raise MemoryError(f"about {needed / 1e9:.0f} GB needed")
