"""The decay attention in Triton: any GPU that Triton serves, and the CPU through its interpreter (for tests).

Chunks are as long as registers allow: what is written of states at their borders shrinks with their number. The
backward pass keeps more at once, so its chunks are shorter; it computes the states again in any case. Loads ahead of
their use (`num_stages`) are few, so that the kernels fit the shared memory of small GPUs too.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longscan.ops.decay_attention.triton_kernels import (
    gradient_kernel,
    outer_kernel,
    output_kernel,
    pass_kernel,
    step_kernel,
)
from longscan.ops.triton_utils import channels_together, on_its_device, pieces, refuse_dtype, row_strides

# Entries of a state that a program of `pass_kernel` walks with.
_ENTRIES = 512


def unsupported(q: Tensor, *_: Tensor | None) -> str | None:
    """Why these arguments cannot be served, in words; None when they can."""
    return refuse_dtype(q)


@cache
def _tensor_float(device: torch.device) -> bool:
    """Whether the device multiplies in TF32."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _numerics(q: Tensor) -> dict[str, Any]:
    """What products are made of. States can outgrow float16, which TF32 has all digits of."""
    # The interpreter, on the CPU, has no products of bfloat16.
    if q.dtype == torch.bfloat16 and q.device.type != "cpu":
        return {"COMPUTE": tl.bfloat16, "PRECISION": "ieee"}
    if not _tensor_float(q.device):
        return {"COMPUTE": tl.float32, "PRECISION": "ieee"}
    return {"COMPUTE": tl.float32, "PRECISION": "tf32" if q.dtype == torch.float16 else "tf32x3"}


def _block(width: int, largest: int) -> int:
    return max(16, min(largest, triton.next_power_of_2(width)))


class _Call(NamedTuple):
    """One call's arguments as the kernels take them, with chunks of one length."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    cu_seqlens: Tensor | None
    chunk: int

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, chunk: int
    ) -> _Call:
        q, k, v = (channels_together(tensor) for tensor in (q, k, v))
        if log_decay is not None:
            log_decay = log_decay.expand(v.shape[:3])
        return cls(q, k, v, log_decay, None if cu_seqlens is None else cu_seqlens.contiguous(), chunk)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def sequences(self) -> int:
        return self.v.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """sequences, length, heads, and the heads that share queries and keys."""
        return self.sequences, self.v.shape[1], self.v.shape[2], self.v.shape[2] // self.q.shape[2]

    @property
    def programs(self) -> int:
        """Chunks times heads."""
        batch, length, heads, _ = self.v.shape
        return pieces(batch * length, self.sequences, self.chunk) * heads

    def strides(self, *tensors: Tensor | None) -> tuple[int, ...]:
        """Strides between rows, steps and heads of each."""
        found: tuple[int, ...] = ()
        for tensor in tensors:
            found += (0, 0, 0) if tensor is None else (*row_strides(tensor, self.packed), tensor.stride(2))
        return found

    def options(self) -> dict[str, Any]:
        largest = 64 if self.q.dtype == torch.bfloat16 else 32
        d_k, d_v = self.q.shape[3], self.v.shape[3]
        return {
            "D_K": d_k, "D_V": d_v, "CHUNK": self.chunk, "BLOCK_K": _block(d_k, largest),
            "BLOCK_V": _block(d_v, largest), "DECAY": self.log_decay is not None, "PACKED": self.packed,
            "num_warps": 8 if self.chunk > 64 else 4, **_numerics(self.q),
        }  # fmt: skip

    def borders(self, x: Tensor, w: Tensor, start: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
        """The states that enter the chunks (programs, d_k, d_v), and the last: from k, v and the initial state.

        With `reverse`, their gradients, and the initial state's: from q, dy and the final state's.
        """
        device, heads, d_k, d_v = self.q.device, self.v.shape[2], self.q.shape[3], self.v.shape[3]
        options = self.options()
        drives = torch.empty((self.programs, d_k, d_v), dtype=torch.float32, device=device)
        totals = None
        if self.log_decay is not None:
            totals = torch.empty((self.programs,), dtype=torch.float32, device=device)
        blocks = triton.cdiv(d_k, options["BLOCK_K"]) * triton.cdiv(d_v, options["BLOCK_V"])
        outer_kernel[(self.programs, blocks)](
            x, w, self.log_decay, drives, totals, self.cu_seqlens, *self.strides(x, w, self.log_decay), *self.sizes,
            FROM_START=reverse, **options,
        )  # fmt: skip
        kept = torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32
        borders = torch.empty(drives.shape, dtype=kept, device=device)
        last = torch.empty((self.sequences, heads, d_k, d_v), dtype=torch.float32, device=device)
        pass_kernel[(self.sequences * heads, triton.cdiv(d_k * d_v, _ENTRIES))](
            drives, totals, None if start is None else start.contiguous(), borders, last, self.cu_seqlens,
            self.v.shape[1], heads, SIZE=d_k * d_v, CHUNK=self.chunk, BLOCK=_ENTRIES,
            DECAY=self.log_decay is not None, HAS_START=start is not None, REVERSE=reverse, PACKED=self.packed,
            num_warps=4,
        )  # fmt: skip
        return borders, last


@on_its_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, heads, d_v) and final states, as the reference."""
    call = _Call.of(q, k, v, log_decay, cu_seqlens, 128 if q.dtype == torch.bfloat16 else 64)
    states, final = call.borders(call.k, call.v, initial_state, reverse=False)
    y = torch.empty(v.shape, dtype=torch.float32 if wide else v.dtype, device=v.device)
    output_kernel[(call.programs,)](
        call.q, call.k, call.v, call.log_decay, states, y, call.cu_seqlens,
        *call.strides(call.q, call.k, call.v, call.log_decay, y), *call.sizes, num_stages=1, **call.options(),
    )  # fmt: skip
    return y, final


@on_its_device
def backward(
    dy: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, log_decay and initial_state (None where the argument is None), as the reference."""
    dy = channels_together(dy)
    call = _Call.of(q, k, v, log_decay, cu_seqlens, 64)
    states, _ = call.borders(call.k, call.v, initial_state, reverse=False)
    later, dinitial = call.borders(call.q, dy, dfinal, reverse=True)
    heads, shared = v.shape[2], call.sizes[3]
    dq, dk = (torch.empty((*v.shape[:3], q.shape[3]), dtype=q.dtype, device=q.device) for _ in range(2))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dg = None if log_decay is None else torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
    gradient_kernel[(call.programs,)](
        dy, call.q, call.k, call.v, call.log_decay, states, later, dq, dk, dv, dg, call.cu_seqlens,
        *call.strides(dy, call.q, call.k, call.v, call.log_decay, dq, dv, dg), *call.sizes, num_stages=2,
        **call.options(),
    )  # fmt: skip
    if shared > 1:
        dq, dk = (tensor.unflatten(2, (heads // shared, shared)).sum(3) for tensor in (dq, dk))
    if dg is not None and log_decay is not None and log_decay.dim() == 1:
        dg = dg.sum((0, 1))
    return dq, dk, dv, dg, None if initial_state is None else dinitial


@on_its_device
def update(state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """One step from `state` (batch, heads, d_k, d_v), which is overwritten; q, k, v (batch, heads, ...)."""
    batch, heads, d_k, d_v = state.shape
    q, k, v = (channels_together(tensor) for tensor in (q, k, v))
    decay_strides = (0, 0) if log_decay is None else log_decay.expand(batch, heads).stride()
    y = torch.empty((batch, heads, d_v), dtype=state.dtype, device=state.device)
    block = min(32, triton.next_power_of_2(d_v))
    step_kernel[(batch * heads, triton.cdiv(d_v, block))](
        state, q, k, v, log_decay, y,
        *state.stride(), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *decay_strides, heads, heads // q.shape[1],
        D_K=d_k, D_V=d_v, BLOCK_K=min(64, triton.next_power_of_2(d_k)), BLOCK_V=block, DECAY=log_decay is not None,
        num_warps=4,
    )  # fmt: skip
    return y
