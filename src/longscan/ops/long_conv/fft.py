"""The long convolution by fast Fourier transform, on any device.

Cyclic convolution of size n equals the causal one at the places of u once n is at least both the number of inputs and
(length of u) + (length of the kernel) - 1: what wraps around falls on places of the past, which nobody reads. The
same holds of both gradients, which are cyclic correlations. A kernel much shorter than the sequence is served in
overlapping blocks (overlap-save): each is a row whose past is the end of the block before.

Transforms run along the last axis: a strided copy on the way in costs less than a transform across rows of channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.ops.packing import Rows, back_in_one_row, in_rows

# A block is about this many kernels long: longer ones repeat less, shorter ones have smaller transforms.
_BLOCK = 8
_SMALLEST_BLOCK = 256


def unsupported(*_: Tensor | None) -> str | None:
    """Every call is served."""
    return None


@cache
def fast_size(least: int) -> int:
    """The smallest 2^a 3^b 5^c that is even and at least ``least``: transforms of such sizes have no slow factor."""
    best = 1 << max(1, (least - 1).bit_length())
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            # The power of two that lifts this to the least size.
            size = threes << max(1, (-(-least // threes) - 1).bit_length())
            best = min(best, size)
            threes *= 3
        fives *= 5
    return best


class _Blocks:
    """Inputs (rows, channels, time) cut into overlapping blocks, and the way back.

    Attributes:
        size: of the transforms.
        new: outputs of a block.
        first: inputs of a block that come before its outputs.
    """

    def __init__(self, length: int, taps: int, past: int) -> None:
        self.length, self.past = length, past
        block = max(fast_size(_BLOCK * taps), _SMALLEST_BLOCK)
        if length > block:
            self.size, self.first = block, taps - 1
            self.new = block - self.first
            self.count = -(-length // self.new)
        else:
            self.size = fast_size(max(past + length, length + taps - 1))
            self.first, self.new, self.count = past, length, 1

    def cut(self, x: Tensor) -> Tensor:
        """(rows, channels, past + length) to (rows, blocks, channels, first + new)."""
        if self.count == 1:
            return x.unsqueeze(1)
        ahead, behind = self.first - self.past, self.count * self.new - self.length
        return F.pad(x, (ahead, behind)).unfold(2, self.first + self.new, self.new).transpose(1, 2)

    def cut_outputs(self, dy: Tensor) -> Tensor:
        """(rows, channels, length) to (rows, blocks, channels, first + new), zero at what comes before a block."""
        dy = F.pad(dy, (0, self.count * self.new - self.length)).unflatten(2, (self.count, self.new)).transpose(1, 2)
        return F.pad(dy, (self.first, 0))

    def join_outputs(self, y: Tensor) -> Tensor:
        """(rows, blocks, channels, size) to (rows, length, channels)."""
        y = y[..., self.first : self.first + self.new]
        return y.transpose(2, 3).flatten(1, 2)[:, : self.length]

    def add_inputs(self, dx: Tensor) -> Tensor:
        """Gradients of what ``cut`` gave, (rows, blocks, channels, size), to (rows, past + length, channels)."""
        dx = dx[..., : self.first + self.new].transpose(2, 3)
        if self.count == 1:
            return dx[:, 0]
        total = F.pad(dx[:, :, : self.new], (0, 0, 0, 0, 0, 1))
        total[:, 1:, : self.first] += dx[:, :, self.new :]
        return total.flatten(1, 2)[:, self.first - self.past : self.first + self.length]


def _channels_first(u: Tensor, past: Tensor | None, keep: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(rows, channels, time) of the last ``keep`` inputs of the past and of u; and how many of the past there are."""
    if past is None or not keep:
        return u.transpose(1, 2).to(dtype), 0
    past = past[:, -keep:]
    return torch.cat((past.to(dtype), u.to(dtype)), dim=1).transpose(1, 2), past.shape[1]


def _times(spectrum: Tensor, kernel: Tensor) -> Tensor:
    """(rows, blocks, channels, F) by (systems, F): each system serves channels / systems channels in a row."""
    return (spectrum.unflatten(2, (kernel.shape[0], -1)) * kernel[:, None]).flatten(2, 3)


def _convolve(u: Tensor, kernel: Tensor, past: Tensor | None) -> Tensor:
    """u (rows, length, channels), past (rows, times, channels): as `forward`, for sequences of one length."""
    x, kept = _channels_first(u, past, kernel.shape[1] - 1, kernel.dtype)
    kernel = kernel[:, : x.shape[2]]
    blocks = _Blocks(u.shape[1], kernel.shape[1], kept)
    spectrum = torch.fft.rfft(blocks.cut(x), blocks.size)
    spectrum = _times(spectrum, torch.fft.rfft(kernel, blocks.size))
    return blocks.join_outputs(torch.fft.irfft(spectrum, blocks.size)).to(u.dtype)


def _gradients(dy: Tensor, u: Tensor, kernel: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `backward`, for sequences of one length."""
    x, kept = _channels_first(u, past, kernel.shape[1] - 1, kernel.dtype)
    systems, taps = kernel.shape
    kernel = kernel[:, : x.shape[2]]
    blocks = _Blocks(u.shape[1], kernel.shape[1], kept)
    out = torch.fft.rfft(blocks.cut_outputs(dy.transpose(1, 2).to(kernel.dtype)), blocks.size)
    spectrum = torch.fft.rfft(blocks.cut(x), blocks.size)
    products = (out * spectrum.conj()).unflatten(2, (systems, -1)).sum((0, 1, 3))
    dkernel = torch.fft.irfft(products, blocks.size)[:, : kernel.shape[1]]
    dkernel = F.pad(dkernel, (0, taps - kernel.shape[1]))
    del spectrum, products
    dx = torch.fft.irfft(_times(out, torch.fft.rfft(kernel, blocks.size).conj()), blocks.size)
    dx = blocks.add_inputs(dx)
    dpast = None
    if past is not None:
        # What lies further back than the kernel reaches has no gradient.
        dpast = F.pad(dx[:, :kept], (0, 0, past.shape[1] - kept, 0)).to(past.dtype)
    return dx[:, kept:].to(u.dtype), dkernel, dpast


def _rows(cu_seqlens: Tensor, length: int, past: Tensor | None) -> Iterator[tuple[Rows, Tensor | None]]:
    for rows in in_rows(cu_seqlens, length):
        yield rows, None if past is None else past.index_select(0, rows.sequences)


def forward(u: Tensor, kernel: Tensor, past: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Output (batch, length, channels) in u's dtype."""
    if cu_seqlens is None:
        return _convolve(u, kernel, past)
    parts = _rows(cu_seqlens, u.shape[1], past)
    return back_in_one_row([(rows, _convolve(rows.take(u), kernel, before)) for rows, before in parts])


def backward(
    dy: Tensor, u: Tensor, kernel: Tensor, past: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of u, kernel and past (None where there is none); the transforms are computed again."""
    if cu_seqlens is None:
        return _gradients(dy, u, kernel, past)
    parts: list[tuple[Rows, Tensor]] = []
    dkernel = torch.zeros_like(kernel)
    dpast = None if past is None else torch.zeros_like(past)
    for rows, before in _rows(cu_seqlens, u.shape[1], past):
        # Behind a sequence's end its last input is repeated: no gradient comes from there.
        own = rows.take(dy).masked_fill(~rows.real[..., None], 0)
        du, dk, dbefore = _gradients(own, rows.take(u), kernel, before)
        parts.append((rows, du))
        dkernel += dk
        if dpast is not None and dbefore is not None:
            dpast.index_copy_(0, rows.sequences, dbefore)
    return back_in_one_row(parts), dkernel, dpast
