r"""The inside of a Mamba block, from its input to what goes into the last projection, with a backward pass of its own.

Left to autograd, each half of the first projection's gradient is copied into one tensor, the two gradients that meet in
u are added in a pass of their own, and all that is between two operators is kept. Here products are taken of the halves
where they lie, the last product adds to the gradient that is there, and, on request, the convolution's output and dt
are computed again instead of kept (Gu and Dao 2023, section 3.3.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longscan.ops import backends
from longscan.ops.checks import ACCUMULATION, activation_dtype, check_shape, prepare_cu_seqlens, refuse_tangents


def mamba_inner(
    x: Tensor,
    in_proj: tuple[Tensor, Tensor | None],
    conv: tuple[Tensor, Tensor | None],
    x_proj: Tensor,
    dt_proj: tuple[Tensor, Tensor],
    A: Tensor,
    D: Tensor,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` of the equations in :mod:`longscan.mixers.mamba`, gated, before the last projection; A real.

    Args:
        x: (batch, length, d_model).
        in_proj: weight (2 d_inner, d_model), and bias (2 d_inner,) or None.
        conv: weight (d_inner, d_conv), and bias (d_inner,) or None.
        x_proj: (dt_rank + 2 N, d_inner).
        dt_proj: weight (d_inner, dt_rank) and bias (d_inner,).
        A: (d_inner, N) real, negative.
        D: (d_inner,).
        conv_state: (sequences, d_conv - 1, d_inner) or None.
        ssm_state: (sequences, d_inner, N) or None.
        cu_seqlens: offsets of sequences packed in one row.
        recompute: keep less for the backward pass, at the price of a convolution and a small product.

    Returns:
        y (batch, length, d_inner) in x's dtype (autocast's, where it is on), and both states after it. All carry
        gradients, once.

    Raises:
        ArgumentError: a state of another shape, offsets that are none, a tangent of forward-mode differentiation.
    """
    refuse_tangents(x=x, conv_state=conv_state, ssm_state=ssm_state, A=A, x_proj=x_proj, in_proj=in_proj[0])
    dtype, backend, sequences = activation_dtype(x), backends.requested(None), x.shape[0]
    if cu_seqlens is not None:
        cu_seqlens = prepare_cu_seqlens(cu_seqlens, x.shape[0], x.device)
        sequences = cu_seqlens.shape[0] - 1
    channels, width = conv[0].shape
    if conv_state is not None:
        check_shape("state.conv", conv_state, (sequences, width - 1, channels), "(sequences, d_conv - 1, d_inner)")
    if ssm_state is not None:
        check_shape("state.ssm", ssm_state, (sequences, *A.shape), "(sequences, d_inner, N)")
    tensors = (x, *in_proj, *conv, x_proj, *dt_proj, A, D, conv_state, ssm_state)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        out: tuple[Tensor, Tensor, Tensor] = _Inner.apply(*tensors, cu_seqlens, dtype, backend, recompute)
        return out
    return _Pass(tensors, cu_seqlens, dtype, backend).run(save=False)


class _Pass:
    """The tensors of one call, weights in the dtypes that the operators take."""

    def __init__(self, tensors: tuple[Any, ...], cu_seqlens: Tensor | None, dtype: torch.dtype, backend: str) -> None:
        x, in_weight, in_bias, taps, tap_bias, x_weight, dt_weight, dt_bias, A, D, conv_state, ssm_state = tensors
        real = ACCUMULATION[dtype]
        # Backends keep different things for the backward pass: both passes are one's, wherever backward is called.
        self.backend = backend
        self.cu_seqlens = cu_seqlens
        self.x = x.to(dtype)
        self.in_weight, self.x_weight, self.dt_weight = in_weight.to(dtype), x_weight.to(dtype), dt_weight.to(dtype)
        self.in_bias = None if in_bias is None else in_bias.to(dtype)
        self.filter = (taps.to(real), None if tap_bias is None else tap_bias.to(real))
        self.A, self.D, self.dt_bias = A.to(real), D.to(real), dt_bias.to(real)
        self.conv_state = None if conv_state is None else conv_state.to(dtype)
        self.ssm_state = None if ssm_state is None else ssm_state.to(real)
        self.rank, self.states = dt_weight.shape[1], A.shape[1]
        self.offset = self.rank + _gap(self.rank, self.states, self.x)

    def project(self) -> Tensor:
        """Both halves of the first projection, side by side."""
        return F.linear(self.x, self.in_weight, self.in_bias)

    def convolve(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution and SiLU of the first half, and the state after it."""
        first, _ = both.chunk(2, dim=-1)
        arguments = (first, *self.filter, self.conv_state, self.cu_seqlens, True, self.backend)
        out: tuple[Tensor, Tensor] = torch.ops.longscan.causal_conv1d.default(*arguments)
        return out

    def select(self, u: Tensor) -> Tensor:
        """r, perhaps a gap, B and C, side by side."""
        weight, gap = self.x_weight, self.offset - self.rank
        if gap:
            weight = torch.cat([weight[: self.rank], weight.new_zeros(gap, weight.shape[1]), weight[self.rank :]])
        return F.linear(u, weight)

    def steps(self, selected: Tensor) -> Tensor:
        """dt before its bias and softplus."""
        return F.linear(selected[..., : self.rank], self.dt_weight)

    def scan_arguments(self, u: Tensor, dt: Tensor, selected: Tensor, both: Tensor) -> tuple[Any, ...]:
        B, C = selected[..., None, self.offset :].split(self.states, dim=-1)
        _, z = both.chunk(2, dim=-1)
        return u, dt, self.A, B, C, self.D, z, self.dt_bias, self.ssm_state, self.cu_seqlens

    def run(self, save: bool) -> Any:
        """y and the states; with `save` also what the backward pass needs."""
        both = self.project()
        u, conv = self.convolve(both)
        selected = self.select(u)
        dt = self.steps(selected)
        arguments = self.scan_arguments(u, dt, selected, both)
        y, ssm, checkpoints = torch.ops.longscan.selective_scan.default(*arguments, True, save, self.backend)
        return ((y, conv, ssm), (both, u, selected, dt, checkpoints)) if save else (y, conv, ssm)


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, cu_seqlens, dtype, backend, recompute = args
        # Products in autocast's dtype are asked for as such.
        with torch.autocast(tensors[0].device.type, enabled=False):
            outputs, (both, u, selected, dt, checkpoints) = _Pass(tuple(tensors), cu_seqlens, dtype, backend).run(
                save=True
            )
        kept = (both, None, selected, None, checkpoints) if recompute else (both, u, selected, dt, checkpoints)
        ctx.save_for_backward(*tensors, *kept, cu_seqlens)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.backend, ctx.shapes = dtype, backend, [(output.shape, output.dtype) for output in outputs]
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        *saved, cu_seqlens = ctx.saved_tensors
        tensors, (both, u, selected, dt, checkpoints) = tuple(saved[:12]), saved[12:]
        dy, dconv, dssm = (
            both.new_zeros(shape, dtype=dtype) if gradient is None else gradient
            for gradient, (shape, dtype) in zip(gradients, ctx.shapes, strict=True)
        )
        with torch.autocast(both.device.type, enabled=False):
            found = _gradients(
                _Pass(tensors, cu_seqlens, ctx.dtype, ctx.backend),
                (dy, dconv, dssm),
                (both, u, selected, dt, checkpoints),
                tensors,
            )
        needed = (
            gradient.to(tensor.dtype) if needs and gradient is not None else None
            for gradient, tensor, needs in zip(found, tensors, ctx.needs_input_grad, strict=False)
        )
        return (*needed, None, None, None, None)


def _gradients(
    call: _Pass, gradients: tuple[Tensor, ...], kept: tuple[Any, ...], tensors: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the twelve tensors of `mamba_inner`, in their order."""
    (dy, dconv, dssm), (both, u, selected, dt, checkpoints) = gradients, kept
    if u is None:
        u, dt = call.convolve(both)[0], call.steps(selected)
    scan = torch.ops.longscan.selective_scan_backward.default
    arguments = call.scan_arguments(u, dt, selected, both)
    du, ddt, dA, dB, dC, dD, dz, dbias, dssm_state = scan(dy, dssm, *arguments, checkpoints, True, call.backend)
    du, ddt, dz, u, x = (_rows(part) for part in (du, ddt, dz, u, call.x))
    selected = _rows(selected)
    dselected = torch.cat((ddt @ call.dt_weight, _rows(dB.squeeze(2)), _rows(dC.squeeze(2))), dim=-1)
    du.addmm_(dselected, call.x_weight)
    convolution = torch.ops.longscan.causal_conv1d_backward.default
    first, _ = both.chunk(2, dim=-1)
    arguments = (first, *call.filter, call.conv_state, call.cu_seqlens, True, call.backend)
    dfirst, dtaps, dtap_bias, dconv_state = convolution(du.view(first.shape), dconv, *arguments)
    halves = (_rows(dfirst), dz)
    top, bottom = call.in_weight.chunk(2)
    dx = halves[0] @ top
    dx.addmm_(halves[1], bottom)
    dtype = tensors[1].dtype
    return (
        dx.view(call.x.shape),
        torch.cat([_weight_gradient(half, x, dtype) for half in halves]),
        torch.cat([half.sum(0) for half in halves]) if call.in_bias is not None else None,
        dtaps,
        dtap_bias if call.filter[1] is not None else None,
        _weight_gradient(dselected, u, tensors[5].dtype),
        _weight_gradient(ddt, selected[:, : call.rank], tensors[6].dtype),
        dbias,
        dA,
        dD,
        dconv_state if call.conv_state is not None else None,
        dssm_state if call.ssm_state is not None else None,
    )


def _gap(rank: int, states: int, x: Tensor) -> int:
    """Columns between r and B: on a GPU B and C start at whole vectors of 16 bytes, if their own width allows."""
    vector = 16 // x.element_size()
    return -rank % vector if x.is_cuda and states % vector == 0 else 0


def _rows(tensor: Tensor) -> Tensor:
    """(batch, length, n) as (places, n)."""
    return tensor.flatten(0, 1)


def _weight_gradient(outputs: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """outputs^T inputs, rounded to `dtype` once."""
    if outputs.device.type == "cuda" and dtype == torch.float32 != outputs.dtype:
        return torch.mm(outputs.t(), inputs, out_dtype=dtype)
    return (outputs.t() @ inputs).to(dtype)
