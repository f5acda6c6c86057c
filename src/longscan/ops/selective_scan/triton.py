"""The selective scan in Triton: any GPU that Triton serves, and the CPU through its interpreter (for tests).

This file plans the launches; the kernels are in triton_forward.py, triton_backward.py and triton_step.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from longscan.ops.selective_scan.triton_backward import flow_kernel, gradient_kernel
from longscan.ops.selective_scan.triton_forward import chain_kernel, scan_kernel
from longscan.ops.selective_scan.triton_layout import TILE, columns, from_time_last, planes, to_time_last
from longscan.ops.selective_scan.triton_step import step_kernel
from longscan.ops.triton_utils import (
    channels_together,
    multiprocessors,
    on_its_device,
    pieces,
    refuse_dtype,
    row_strides,
    warp_size,
)

#: Warps a multiprocessor needs in flight before the forward pass stops cutting time into chunks.
_FILL = 8

#: Programs of the backward pass a multiprocessor is given; they loop over the chunks.
_RESIDENT = 4

#: Steps the backward pass takes at once, and registers it may use: it holds twice what the forward pass holds.
_BACKWARD_TILE = 8
_REGISTERS = 128

#: Bytes that the states between tiles may take in the backward pass; more states mean fewer programs.
_SCRATCH = 1 << 29


def unsupported(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> str | None:
    """Why these arguments cannot be served, in words; None when they can."""
    return refuse_dtype(x)


def chunk_length(state: int) -> int:
    """Steps between saved states: saved bytes do not grow with the number of states."""
    return triton.cdiv(max(64, 4 * state), TILE) * TILE


def checkpoints_shape(tokens: int, channels: int, state: int, num_sequences: int) -> tuple[int, ...]:
    """Shape of the saved states. What lies inside is the kernels' own layout."""
    return pieces(tokens, num_sequences, chunk_length(state)), state, channels


@dataclass(frozen=True)
class _Plan:
    """What forward and backward derive alike from the arguments of a call."""

    batch: int
    length: int
    channels: int
    state: int
    sequences: int
    groups: int  # of channels that share their B and their C
    b_groups: int
    c_groups: int
    block: int  # channels of a program
    warps: int
    chunk: int
    complex: bool
    packed: bool

    @staticmethod
    def of(x: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None) -> _Plan:
        batch, length, channels = x.shape
        b_groups = B.shape[2] if B.dim() == 4 else 1
        c_groups = C.shape[2] if C.dim() == 4 else 1
        groups = math.lcm(b_groups, c_groups)
        # One warp's threads each own a channel, so that a scan never leaves a thread; wider blocks share B and C.
        warps = min(4, max(1, triton.next_power_of_2(triton.cdiv(channels // groups, warp_size()))))
        return _Plan(
            batch,
            length,
            channels,
            A.shape[1],
            batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            groups,
            b_groups,
            c_groups,
            warps * warp_size() if x.device.type != "cpu" else min(64, triton.next_power_of_2(channels // groups)),
            warps,
            chunk_length(A.shape[1]),
            A.is_complex(),
            cu_seqlens is not None,
        )

    @property
    def planes(self) -> int:
        return 2 if self.complex else 1

    @property
    def blocks(self) -> int:
        """Blocks of a group's channels."""
        return triton.cdiv(self.channels // self.groups, self.block)

    @property
    def pieces(self) -> int:
        return pieces(self.batch * self.length, self.sequences, self.chunk)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes every time-walking kernel takes, in their order."""
        return (
            self.sequences, self.length, self.channels, self.state, self.groups, self.blocks,
            self.groups // self.b_groups, self.groups // self.c_groups, self.chunk,
            columns(self.batch * self.length, self.sequences),
        )  # fmt: skip

    def states(self, count: int, device: torch.device) -> Tensor:
        """Room for `count` states, in the kernels' layout."""
        return torch.empty((count, self.planes, self.state, self.channels), dtype=torch.float32, device=device)

    def options(self, dt_softplus: bool) -> dict[str, Any]:
        return {
            "PACKED": self.packed,
            "COMPLEX": self.complex,
            "SOFTPLUS": dt_softplus,
            "TILE": TILE,
            "BLOCK": self.block,
            "num_warps": self.warps,
        }


def _state_last(tensor: Tensor, is_complex: bool) -> Tensor:
    """(count, planes, state, channels) as (count, channels, state)."""
    tensor = tensor.transpose(2, 3)
    return torch.complex(tensor[:, 0], tensor[:, 1]) if is_complex else tensor[:, 0].contiguous()


def _channels_last(tensor: Tensor) -> Tensor:
    """(count, channels, state) as float32 (count, planes, state, channels), a fresh tensor."""
    return planes(tensor).movedim(0, 1).transpose(2, 3).clone(memory_format=torch.contiguous_format)


def _transposed_decay(A: Tensor) -> Tensor:
    """A as (planes, state, channels), its real part for base 2."""
    out = planes(A).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    out[0] *= math.log2(math.e)
    return out


def _coefficients(tensor: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Tensor:
    """B or C as the kernels read it: time last, or a constant with channels last, (planes, state, channels)."""
    if tensor.dim() == 2:
        return planes(tensor).transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return to_time_last(tensor, cu_seqlens, sequences)


@on_its_device
def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    dt_softplus: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state and (with `save`) the states at chunk borders."""
    plan = _Plan.of(x, A, B, C, cu_seqlens)
    device = x.device
    x, dt, z = channels_together(x), channels_together(dt), None if z is None else channels_together(z)
    cu_seqlens = _contiguous(cu_seqlens)
    decay = _transposed_decay(A)
    b = _coefficients(B, cu_seqlens, plan.sequences)
    c = _coefficients(C, cu_seqlens, plan.sequences)
    skip, bias = _or_zeros(D, plan, device), _or_zeros(dt_bias, plan, device)
    y = torch.empty((plan.batch, plan.length, plan.channels), dtype=x.dtype, device=device)
    edge = plan.states(plan.sequences, device).zero_() if initial_state is None else _channels_last(initial_state)

    blocks = plan.groups * plan.blocks
    longer = plan.batch * plan.length > plan.sequences * plan.chunk
    chunked = longer and plan.sequences * blocks * plan.warps < _FILL * multiprocessors(device)
    checkpoints = torch.empty((0,), dtype=torch.complex64 if plan.complex else torch.float32, device=device)
    borders = edge
    if save:
        shape = checkpoints_shape(plan.batch * plan.length, plan.channels, plan.state, plan.sequences)
        checkpoints = checkpoints.new_empty(shape)
        borders = torch.view_as_real(checkpoints) if plan.complex else checkpoints
    elif chunked:
        borders = plan.states(plan.pieces, device)
    carry = plan.states(plan.pieces, device) if chunked else edge
    sums = torch.empty((plan.pieces if chunked else 0, plan.channels), dtype=torch.float32, device=device)

    strides = (
        *row_strides(x, plan.packed), *row_strides(dt, plan.packed), *row_strides(x if z is None else z, plan.packed),
        *row_strides(y, plan.packed),
    )  # fmt: skip
    tensors = (x, dt, z, decay, b, c, skip, bias, y, carry, borders, sums, cu_seqlens)
    options = {
        **plan.options(dt_softplus),
        "B_STEP": B.dim() == 4,
        "C_STEP": C.dim() == 4,
        "HAS_Z": z is not None,
    }
    if chunked:
        grid = (plan.pieces * blocks,)
        scan_kernel[grid](*tensors, *strides, *plan.sizes, CHUNKED=True, OUTPUT=False, SAVE=False, **options)
        _chain(plan, carry, sums, decay, borders, edge, cu_seqlens, reverse=False)
        scan_kernel[grid](*tensors, *strides, *plan.sizes, CHUNKED=True, OUTPUT=True, SAVE=False, **options)
    else:
        grid = (plan.sequences * blocks,)
        scan_kernel[grid](*tensors, *strides, *plan.sizes, CHUNKED=False, OUTPUT=True, SAVE=save, **options)
    return y, _state_last(edge, plan.complex), checkpoints


@on_its_device
def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    *,
    dt_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state (None where the argument is None)."""
    plan = _Plan.of(x, A, B, C, cu_seqlens)
    device, packed = x.device, plan.packed
    dy, x, dt = channels_together(dy), channels_together(x), channels_together(dt)
    z = None if z is None else channels_together(z)
    cu_seqlens = _contiguous(cu_seqlens)
    decay = _transposed_decay(A)
    b = _coefficients(B, cu_seqlens, plan.sequences)
    c = _coefficients(C, cu_seqlens, plan.sequences)
    skip, bias = _or_zeros(D, plan, device), _or_zeros(dt_bias, plan, device)
    borders = torch.view_as_real(checkpoints) if plan.complex else checkpoints
    blocks = plan.groups * plan.blocks
    options = {**plan.options(dt_softplus), "C_STEP": C.dim() == 4, "HAS_Z": z is not None}

    local, flows = plan.states(plan.pieces, device), plan.states(plan.pieces, device)
    sums = torch.empty((plan.pieces, plan.channels), dtype=torch.float32, device=device)
    dy_strides, dt_strides = row_strides(dy, packed), row_strides(dt, packed)
    z_strides = row_strides(x if z is None else z, packed)
    flow_kernel[(plan.pieces * blocks,)](
        dy, dt, z, decay, c, bias, local, sums, cu_seqlens, *dy_strides, *dt_strides, *z_strides, *plan.sizes, **options
    )  # fmt: skip
    edge = _channels_last(dfinal)
    _chain(plan, local, sums, decay, flows, edge, cu_seqlens, reverse=True)
    del local

    dx, ddt = torch.empty(x.shape, dtype=x.dtype, device=device), torch.empty(x.shape, dtype=x.dtype, device=device)
    dz = None if z is None else torch.empty(x.shape, dtype=x.dtype, device=device)
    # Pieces that no sequence fills are never visited: their partial sums stay zero.
    dA = plan.states(plan.pieces, device).zero_()
    dB = _partial_sums(plan, B, plan.b_groups, device)
    dC = _partial_sums(plan, C, plan.c_groups, device)
    dD, dbias = torch.zeros_like(sums), torch.zeros_like(sums)

    items = plan.pieces * blocks
    per_program = 4 * (plan.chunk // _BACKWARD_TILE) * plan.planes * plan.state * plan.block
    programs = max(1, min(items, _RESIDENT * multiprocessors(device), _SCRATCH // per_program))
    scratch = torch.empty((programs * per_program // 4,), dtype=torch.float32, device=device)
    gradient_kernel[(programs,)](
        dy, x, dt, z, decay, b, c, skip, bias, borders, flows, scratch,
        dx, ddt, dz, dA, dB, dC, dD, dbias, cu_seqlens,
        *dy_strides, *row_strides(x, packed), *dt_strides, *z_strides, *row_strides(dx, packed),
        items, plan.block, *plan.sizes, B_STEP=B.dim() == 4, ALIGN=TILE,
        **{**options, "TILE": _BACKWARD_TILE}, **_limits(x),
    )  # fmt: skip
    del scratch, flows
    return (
        dx,
        ddt,
        _state_last(dA.sum(0, keepdim=True), plan.complex)[0],
        _collect(plan, dB, B, cu_seqlens),
        _collect(plan, dC, C, cu_seqlens),
        None if D is None else dD.sum(0),
        dz,
        None if dt_bias is None else dbias.sum(0),
        None if initial_state is None else _state_last(edge, plan.complex),
    )


@on_its_device
def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    *,
    dt_softplus: bool,
) -> Tensor:
    """One step from `state` (batch, channels, state), which is overwritten; x, dt, z (batch, channels)."""
    batch, channels = x.shape
    states = A.shape[1]
    y = torch.empty((batch, channels), dtype=x.dtype, device=x.device)
    is_complex = A.is_complex()
    if is_complex:
        state, A, B, C = (torch.view_as_real(tensor.resolve_conj()) for tensor in (state, A, B, C))
    width = triton.next_power_of_2(states)
    # About eight numbers of a state to a thread.
    block = max(1, min(triton.next_power_of_2(channels), 1024 // width))
    shares = []
    for tensor in (B, C):
        constant = tensor.dim() == (3 if is_complex else 2)
        shares.append(1 if constant else channels // tensor.shape[1])
    step_kernel[(batch * triton.cdiv(channels, block),)](
        state, x, dt, z, A, B, C, _contiguous(D), _contiguous(dt_bias), y,
        *state.stride()[:3], *x.stride(), *dt.stride(), *(x if z is None else z).stride(), *A.stride()[:2],
        *_step_strides(B, is_complex), *_step_strides(C, is_complex), channels, states, *shares,
        COMPLEX=is_complex, HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
        SOFTPLUS=dt_softplus, BLOCK=block, COLUMNS=width, num_warps=4,
    )  # fmt: skip
    return y


def _limits(x: Tensor) -> dict[str, int]:
    """More programs at a time are worth a few spilled registers; only NVIDIA's compiler is told so."""
    return {"maxnreg": _REGISTERS} if x.is_cuda and torch.version.hip is None else {}


def _step_strides(tensor: Tensor, is_complex: bool) -> tuple[int, ...]:
    """Strides of one step's B or C along rows, groups (or channels) and states; a constant has no rows."""
    strides = tensor.stride()[:-1] if is_complex else tensor.stride()
    return strides if len(strides) == 3 else (0, *strides)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _or_zeros(tensor: Tensor | None, plan: _Plan, device: torch.device) -> Tensor:
    """A parameter per channel; zeros instead of None spare the large kernels a compiled variant each."""
    return torch.zeros((plan.channels,), dtype=torch.float32, device=device) if tensor is None else tensor.contiguous()


def _chain(
    plan: _Plan,
    local: Tensor,
    sums: Tensor,
    decay: Tensor,
    borders: Tensor,
    edge: Tensor,
    offsets: Tensor | None,
    *,
    reverse: bool,
) -> None:
    grid = (plan.sequences * plan.state * triton.cdiv(plan.channels, plan.block),)
    chain_kernel[grid](
        local, sums, decay, borders, edge, offsets, plan.sequences, plan.length, plan.channels, plan.state, plan.chunk,
        PACKED=plan.packed, COMPLEX=plan.complex, REVERSE=reverse, TILE=TILE, BLOCK=plan.block, num_warps=plan.warps,
    )  # fmt: skip


def _partial_sums(plan: _Plan, tensor: Tensor, groups: int, device: torch.device) -> Tensor:
    """Room for the partial sums of B's or C's gradient."""
    if tensor.dim() == 2:
        return plan.states(plan.pieces, device).zero_()
    parts = plan.groups // groups * plan.blocks
    width = columns(plan.batch * plan.length, plan.sequences)
    return torch.empty((parts, plan.planes, groups, plan.state, width), dtype=torch.float32, device=device)


def _collect(plan: _Plan, partial: Tensor, like: Tensor, offsets: Tensor | None) -> Tensor:
    """The sum of the partial sums of B's or C's gradient, in its shape and dtype."""
    if like.dim() == 2:
        return _state_last(partial.sum(0, keepdim=True), plan.complex)[0].to(like.dtype)
    return from_time_last(partial, like, offsets, plan.sequences)
