"""The head's cross entropy with the scores' part in one Triton kernel, which overwrites scores with their gradients."""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longscan.ops.linear_cross_entropy import reference
from longscan.ops.triton_utils import on_its_device, refuse_dtype

# Scores that a program has in registers at a time.
_BLOCK = 4096


def unsupported(hidden: Tensor, weight: Tensor) -> str | None:
    """Why these arguments cannot be served, in words; None when they can."""
    return refuse_dtype(hidden)


@triton.jit(do_not_specialize=["row_stride", "vocabulary", "columns"])
def _loss_kernel(
    scores, targets, losses, row_stride, vocabulary, columns, SAVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row of scores to its loss and, with SAVE, to its gradients in place; columns from `vocabulary` on are none."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * row_stride
    target = tl.load(targets + row)
    counts = target >= 0
    # The largest score so far, the sum of all relative to it, and the target's.
    top = -float("inf")
    total = 0.0
    own = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(scores + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(value, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher), 0)
        top = higher
        own += tl.sum(tl.where(at == target, value, 0.0), 0)
    logarithm = top + tl.log(total)
    tl.store(losses + row, tl.where(counts, logarithm - own, 0.0))
    if SAVE:
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(scores + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
            slope = tl.exp(value - logarithm) - tl.where(at == target, 1.0, 0.0)
            tl.store(scores + at, tl.where(counts, slope, 0.0).to(scores.dtype.element_ty), mask=at < columns)


@on_its_device
def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum of the losses and, with `save`, its gradients: hidden's in its dtype, weight's in its own."""

    def losses(scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = scores.shape
        out = torch.empty(rows, dtype=torch.float32, device=scores.device)
        block = min(_BLOCK, triton.next_power_of_2(columns))
        _loss_kernel[(rows,)](
            scores, own, out, scores.stride(0), vocab_size, columns, SAVE=save, BLOCK=block,
            num_warps=min(8, max(1, block // 512)),
        )  # fmt: skip
        return out.sum(), scores

    return reference.in_pieces(hidden, weight, targets, save, losses)
