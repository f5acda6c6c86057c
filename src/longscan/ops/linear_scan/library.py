"""The linear scan as torch.library operators: what autograd, torch.compile, export and opcheck see.

The operators take normalised arguments: a of three axes, each as long as b's or 1; a and b both complex or neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longscan.ops import backends
from longscan.ops.checks import ACCUMULATION, check_offsets, once_differentiable

torch.library.define(
    "longscan::linear_scan",
    "(Tensor a, Tensor b, Tensor? initial_state, Tensor? cu_seqlens, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "longscan::linear_scan_backward",
    "(Tensor dh, Tensor dfinal, Tensor a, Tensor h, Tensor? initial_state, Tensor? cu_seqlens, str backend) -> "
    "(Tensor, Tensor, Tensor)",
)
linear_scan = torch.ops.longscan.linear_scan.default


def state_dtype(b: Tensor) -> torch.dtype:
    """The dtype of the state and of all sums."""
    return b.dtype if b.is_complex() else ACCUMULATION[b.dtype]


def _state_shape(b: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    return (b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1), b.shape[2]


@torch.library.impl("longscan::linear_scan", "CompositeExplicitAutograd")
def _forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, b.shape[1])
    module = backends.resolve("linear_scan", backend, (a, b, initial_state, cu_seqlens))
    h, final = module.forward(a, b, initial_state, cu_seqlens)
    return h.contiguous(), final.contiguous()


@torch.library.register_fake("longscan::linear_scan")
def _forward_fake(a: Tensor, b: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, _: str) -> Any:
    return b.new_empty(b.shape), b.new_empty(_state_shape(b, cu_seqlens), dtype=state_dtype(b))


@torch.library.impl("longscan::linear_scan_backward", "CompositeExplicitAutograd")
def _backward(
    dh: Tensor,
    dfinal: Tensor,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = backends.resolve("linear_scan", backend, (a, h, initial_state, cu_seqlens))
    da, db, dinitial = module.backward(dh, dfinal, a, h, initial_state, cu_seqlens)
    if initial_state is None:
        dinitial = dh.new_empty(0)
    return da.sum_to_size(a.shape).to(a.dtype).contiguous(), db.contiguous(), dinitial.contiguous()


@torch.library.register_fake("longscan::linear_scan_backward")
def _backward_fake(dh: Tensor, dfinal: Tensor, a: Tensor, h: Tensor, initial: Tensor | None, *_: Any) -> Any:
    return (
        a.new_empty(a.shape),
        h.new_empty(h.shape),
        dh.new_empty(0) if initial is None else initial.new_empty(initial.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, initial_state, cu_seqlens, backend = inputs
    h, final = output
    ctx.save_for_backward(a, h, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)
    ctx.final_like = (final.shape, final.dtype)
    ctx.backend = backend


def _autograd(ctx: Any, dh: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    a, h, initial_state, cu_seqlens = ctx.saved_tensors
    if dh is None:
        dh = torch.zeros_like(h, memory_format=torch.contiguous_format)
    if dfinal is None:
        shape, dtype = ctx.final_like
        dfinal = h.new_zeros(shape, dtype=dtype)
    grads = torch.ops.longscan.linear_scan_backward.default(dh, dfinal, a, h, initial_state, cu_seqlens, ctx.backend)
    needed = (grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad[:3], strict=True))
    return (*needed, None, None)


torch.library.register_autograd("longscan::linear_scan", _autograd, setup_context=_setup_context)
once_differentiable("linear_scan")
