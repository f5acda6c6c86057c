"""The linear scan in Triton: any GPU that Triton serves, and the CPU through its interpreter (for tests).

Sequences are cut into pieces, so many that they fill the device however few the rows and channels are. One launch takes
each piece's product of decays and its end from zero, a second scans those over the pieces, a third walks the pieces
again from the states that enter them. Where sequences and channels alone fill the device, only the third is run.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from longscan.ops.linear_scan.rows import accumulation, gradient_dtype
from longscan.ops.linear_scan.triton_kernels import across_kernel, summary_kernel, walk_kernel
from longscan.ops.triton_utils import multiprocessors, on_its_device, pieces

# Channels of a program, steps it takes at once (of complex numbers half as many: a tile is what lies in registers), and
# programs per multiprocessor that fill a device.
_BLOCK = 32
_TILE = 64
_PROGRAMS = 8
# Steps of the shortest piece worth a program.
_SHORTEST = 256


def unsupported(a: Tensor, b: Tensor, *_: Tensor | None) -> str | None:
    """Serves float32, bfloat16, float16 and complex64."""
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
            return f"its kernels take float32, bfloat16, float16 and complex64, {name} is {tensor.dtype}"
    return None


def _words(tensor: Tensor) -> Tensor:
    """What the kernels move: a complex number is a word of 64 bits."""
    return tensor.resolve_conj().view(torch.int64) if tensor.is_complex() else tensor


def piece_length(tokens: int, sequences: int, blocks: int, device: torch.device) -> int:
    """Steps of a piece, a power of two: as long as the device still has enough of them."""
    wanted = max(1, _PROGRAMS * multiprocessors(device) // blocks)
    if sequences >= wanted // 2:
        return triton.next_power_of_2(tokens)
    return max(_SHORTEST, triton.next_power_of_2(-(-tokens // wanted)))


class _Call:
    """What all launches of a call share."""

    def __init__(self, a: Tensor, like: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> None:
        batch, length, channels = like.shape
        self.a, self.packed = _words(a).expand(like.shape), cu_seqlens is not None
        self.offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        block = min(_BLOCK, triton.next_power_of_2(channels))
        self.blocks = triton.cdiv(channels, block)
        self.size = piece_length(batch * length, self.sequences, self.blocks, like.device)
        self.pieces = pieces(batch * length, self.sequences, self.size)
        self.cut = self.size < length
        self.sizes = (self.sequences, length, channels, self.size)
        self.options = {
            "PACKED": self.packed,
            "PAIRS": like.is_complex(),
            "TILE": min(_TILE // 2 if like.is_complex() else _TILE, self.size),
            "BLOCK": block,
            "num_warps": 4,
        }
        self.reverse = reverse

    def strides(self, tensor: Tensor) -> tuple[int, int, int]:
        return (0 if self.packed else tensor.stride(0)), tensor.stride(1), tensor.stride(2)

    def walk(
        self,
        b: Tensor,
        out: Tensor,
        state: Tensor | None,
        final: Tensor,
        h: Tensor | None = None,
        initial: Tensor | None = None,
        da: Tensor | None = None,
    ) -> None:
        """Fills `out` and `final`, and backward `da`."""
        b, state = _words(b), None if state is None else _words(state.contiguous())
        ends = None
        inputs = (*self.strides(self.a), *self.strides(b))
        if self.cut:
            products, ends = (_words(final.new_empty((self.pieces, final.shape[1]))) for _ in range(2))
            summary_kernel[(self.pieces * self.blocks,)](
                self.a, b, products, ends, self.offsets, *inputs, *self.sizes, REVERSE=self.reverse, **self.options
            )
            across_kernel[(self.sequences * self.blocks,)](
                products, ends, state, self.offsets, *self.sizes, HAS_STATE=state is not None, **self.options
            )
        if h is not None:
            h = _words(h)
        walk_kernel[(self.pieces * self.blocks,)](
            self.a, b, _words(out), state, ends, _words(final), h, None if initial is None else
            _words(initial.contiguous()), None if da is None else _words(da), self.offsets, *inputs,
            *((0, 0, 0) if h is None else self.strides(h)), *self.sizes, REVERSE=self.reverse,
            HAS_STATE=state is not None, HAS_INITIAL=initial is not None, CUT=self.cut, **self.options,
        )  # fmt: skip


@on_its_device
def forward(a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """h (batch, length, channels) in b's dtype, and final states (sequences, channels), float32 or complex64."""
    call = _Call(a, b, cu_seqlens, reverse=False)
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    final = torch.empty((call.sequences, b.shape[2]), dtype=accumulation(b), device=b.device)
    call.walk(b, h, initial_state, final)
    return h, final


@on_its_device
def backward(
    dh: Tensor, dfinal: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a at every step, (batch, length, channels), of b, and of the initial states."""
    call = _Call(a, h, cu_seqlens, reverse=True)
    da = torch.empty(h.shape, dtype=gradient_dtype(a, h), device=h.device)
    db = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dstate = torch.empty((call.sequences, h.shape[2]), dtype=accumulation(h), device=h.device)
    call.walk(dh, db, dfinal, dstate, h, initial_state, da)
    return da, db, dstate
