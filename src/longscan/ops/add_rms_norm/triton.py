"""The residual sum and RMSNorm in Triton: any GPU that Triton serves, and the CPU in its interpreter (for tests)."""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longscan.ops.triton_utils import multiprocessors, on_its_device, refuse_dtype

# A row lies whole in the registers of a program.
_WIDEST = 1 << 16

# Programs of the backward pass a multiprocessor is given; they loop over the rows.
_RESIDENT = 4


def unsupported(x: Tensor, weight: Tensor, residual: Tensor | None) -> str | None:
    """Why these arguments cannot be served, in words; None when they can."""
    if x.shape[-1] > _WIDEST:
        return f"its kernels hold a whole row of at most {_WIDEST} channels, not {x.shape[-1]}"
    if residual is not None and residual.dtype == torch.float64:
        return refuse_dtype(residual)
    return refuse_dtype(x)


# Numbers that a program takes at once: several rows, where they are short.
_TILE = 1024


def _rows_at_once(block: int) -> int:
    return max(1, _TILE // block)


def _warps(block: int) -> int:
    return min(16, max(1, block * _rows_at_once(block) // 512))


@triton.jit(do_not_specialize=["x_row", "x_channel", "residual_row", "residual_channel", "rows", "channels"])
def _forward_kernel(
    x, weight, residual, normed, total_out, rstd_out, x_row, x_channel, residual_row, residual_channel, rows, channels,
    eps, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    live = (row < rows) & (c < channels)
    total = tl.load(x + row * x_row + c.to(tl.int64) * x_channel, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = residual + row * residual_row + c.to(tl.int64) * residual_channel
        total += tl.load(at, mask=live, other=0.0).to(tl.float32)
    # What is normalised is the stream as it is kept, after rounding.
    kept = total.to(total_out.dtype.element_ty)
    tl.store(total_out + row * channels + c, kept, mask=live)
    total = kept.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(total * total, 1, keep_dims=True) / channels + eps)
    tl.store(rstd_out + row, rstd, mask=row < rows)
    scaled = total * rstd * tl.load(weight + c, mask=c < channels, other=0.0)
    tl.store(normed + row * channels + c, scaled.to(normed.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["g_row", "g_channel", "h_row", "h_channel", "rows", "channels"])
def _backward_kernel(
    dnormed, dtotal, total, weight, rstd, dx, dresidual, dweight, g_row, g_channel, h_row, h_channel, rows, channels,
    HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles program_id, program_id + programs, ... of ROWS rows; dweight (programs, channels) is each program's sum."""
    c = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + c, mask=c < channels, other=0.0)
    into_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        live = (row < rows) & (c < channels)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        unit = tl.load(total + row * channels + c, mask=live, other=0.0).to(tl.float32) * r
        g = tl.load(dnormed + row * g_row + c.to(tl.int64) * g_channel, mask=live, other=0.0).to(tl.float32)
        h = tl.load(dtotal + row * h_row + c.to(tl.int64) * h_channel, mask=live, other=0.0).to(tl.float32)
        into_weight += g * unit
        g *= scale
        gradient = h + r * (g - unit * (tl.sum(g * unit, 1, keep_dims=True) / channels))
        tl.store(dx + row * channels + c, gradient.to(dx.dtype.element_ty), mask=live)
        if HAS_RESIDUAL:
            tl.store(dresidual + row * channels + c, gradient.to(dresidual.dtype.element_ty), mask=live)
    at = tl.program_id(0).to(tl.int64) * channels + c
    tl.store(dweight + at, tl.sum(into_weight, 0, keep_dims=True), mask=c < channels)


@on_its_device
def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, *, eps: float, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed (tokens, channels) in x's dtype, the new residual in `residual_dtype`, and rstd (tokens,)."""
    rows, channels = x.shape
    normed = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    total = torch.empty((rows, channels), dtype=residual_dtype, device=x.device)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(channels)
    at_once = _rows_at_once(block)
    _forward_kernel[(triton.cdiv(rows, at_once),)](
        x, weight.contiguous(), residual, normed, total, rstd,
        *x.stride(), *(x if residual is None else residual).stride(), rows, channels,
        eps, HAS_RESIDUAL=residual is not None, ROWS=at_once, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return normed, total, rstd


@on_its_device
def backward(
    dnormed: Tensor,
    dresidual_out: Tensor,
    residual_out: Tensor,
    weight: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and residual (None where there was none)."""
    rows, channels = residual_out.shape
    dx = torch.empty((rows, channels), dtype=x_dtype, device=residual_out.device)
    dresidual = torch.empty_like(residual_out, memory_format=torch.contiguous_format) if has_residual else None
    block = triton.next_power_of_2(channels)
    at_once = _rows_at_once(block)
    programs = min(triton.cdiv(rows, at_once), _RESIDENT * multiprocessors(residual_out.device))
    dweight = torch.empty((programs, channels), dtype=torch.float32, device=residual_out.device)
    _backward_kernel[(programs,)](
        dnormed, dresidual_out, residual_out.contiguous(), weight.contiguous(), rstd, dx, dresidual, dweight,
        *dnormed.stride(), *dresidual_out.stride(), rows, channels,
        HAS_RESIDUAL=has_residual, ROWS=at_once, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype), dresidual
