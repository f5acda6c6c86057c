"""The selective scan in CUDA C++, for NVIDIA GPUs of compute capability 8.0 and later.

This file plans the launches; the kernels are in scan_forward.cu, scan_backward.cu, scan_flow.cu and scan_chain.cu,
compiled when they are first needed (`longscan.ops.nvrtc`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longscan.ops import nvrtc
from longscan.ops.nvrtc import FORMATS, addresses, rows
from longscan.ops.selective_scan.cuda_call import Call, dense, steps
from longscan.ops.selective_scan.cuda_plan import Split, backward_split, forward_split

#: Steps between saved states, and of a tile of the backward pass.
CHUNK = 32

# Most real and most complex states of a channel that a launch takes. More are taken in several launches: outputs, and
# what flows into x, dt and z, are sums over states.
_MOST = {False: 32, True: 16}

# Steps whose states the backward pass holds in registers.
_SUB = 4

# Warps of a block, and blocks that a multiprocessor has registers for.
_FORWARD_WARPS = 4
_FLOW = {"AHEAD": 2, "WARPS": _FORWARD_WARPS, "RESIDENT": 4}
_BACKWARD_WARPS, _BACKWARD_BLOCKS = 4, 2


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
    if x.dtype not in FORMATS:
        return f"its kernels take float32, bfloat16 and float16, not {x.dtype}"
    return nvrtc.refuse_device(x.device.index or 0)


def chunk_length(state: int) -> int:
    """Steps between saved states."""
    return CHUNK


def checkpoints_shape(tokens: int, channels: int, state: int, num_sequences: int) -> tuple[int, ...]:
    """Shape of the saved states: an upper bound on the chunks that `num_sequences` sequences can make."""
    return (tokens // CHUNK + num_sequences, channels, state)


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
    with torch.cuda.device(x.device):
        calls = _calls(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
        call = calls[0]
        shape = checkpoints_shape(call.tokens, call.channels, A.shape[1], call.sequences) if save else (0,)
        saved = torch.empty(shape, dtype=call.A.dtype, device=x.device)
        y, finals = None, []
        for part, own in zip(calls, _saved_parts(saved, calls), strict=True):
            output, final = _forward(part, forward_split(*part.size), own if save else None)
            y = _add(y, output)
            finals.append(final)
        assert y is not None
        return y.to(x.dtype), _joined(finals), saved


def _calls(
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
    softplus: bool,
) -> list[Call]:
    """A call for every so many states; the skip is added by the first one."""
    most, states = _MOST[A.is_complex()], A.shape[1]
    calls = []
    for first in range(0, states, most):
        own = slice(first, first + most)
        initial = None if initial_state is None else initial_state[..., own]
        parts = (A[:, own], B[..., own], C[..., own], D if first == 0 else None)
        calls.append(Call.of(x, dt, *parts, z, dt_bias, initial, cu_seqlens, softplus, partial=states > most))
    return calls


def _saved_parts(saved: Tensor, calls: list[Call]) -> list[Tensor]:
    """The saved states of each call, one after the other in memory."""
    places = saved.numel() // sum(call.states for call in calls)
    return list(saved.view(-1).split([places * call.states for call in calls]))


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum, in place of the total."""
    return part if total is None else total.add_(part)


def _joined(parts: list[Tensor]) -> Tensor:
    """Along the states."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _forward_tile(lanes: int, numbers: int, channels: int) -> dict[str, int]:
    """Macros that say how a forward pass is laid out, when a lane takes `numbers` and a group has `channels`."""
    if numbers >= 8 or lanes == 1:
        return {"TILE": 8 if lanes == 1 else 16, "AHEAD": 1, "RESIDENT": 3, "TEAM": 1}
    alone = channels < 32 // lanes * _FORWARD_WARPS
    ahead, resident = (3, 2) if numbers == 4 else (6, 1)
    return {"TILE": 32, "AHEAD": ahead, "RESIDENT": resident, "TEAM": 1 if alone else _FORWARD_WARPS}


def _forward(call: Call, split: Split, saved: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and final state; `saved` is written."""
    x = call.x
    y = call.new_result()
    # B and C that are constant in time take registers of their own.
    lanes, each = call.lanes(split.numbers if call.B.dim() == call.C.dim() == 4 else min(split.numbers, 8))
    tile = _forward_tile(lanes, each * call.planes, call.channels // call.groups)
    blocks = call.blocks(32 // lanes * tile["TEAM"])
    options = call.options(lanes, each, y)
    pieces = call.pieces(split.steps)
    items = pieces * call.groups * blocks
    layout = {"CHUNK": CHUNK, "WARPS": _FORWARD_WARPS, **tile}
    ends, sums = (call.new_states(pieces), call.new_sums(pieces)) if split.steps else (None, None)

    def scan(output: bool, before: Tensor | None, final: Tensor | None) -> None:
        own = {"OUTPUT": output, "SAVE": output and saved is not None, "CHUNKED": split.steps > 0}
        run = call.kernel("scan_forward.cu", "scan_forward", {**options, **layout, **own})
        given = (x, call.dt, call.z, call.A, call.B, call.C, call.D, call.dt_bias)
        tensors = (*given, y, before, final, saved, ends, sums)
        strides = (*steps(x, call.dt, call.z), *call.strides)
        arguments = (*addresses(*tensors, call.offsets), *strides, *call.sizes(blocks), split.steps, items)
        run.launch(-(-items * tile["TEAM"] // _FORWARD_WARPS), 32 * _FORWARD_WARPS, arguments)

    if ends is None or sums is None:
        final = call.new_states(call.sequences)
        scan(True, call.initial, final)
        return y, final
    scan(False, None, None)
    borders, final = call.chain(options, ends, sums, call.initial, split.steps, reverse=False)
    scan(True, borders, None)
    return y, final


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
    with torch.cuda.device(x.device):
        calls = _calls(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
        dy, dfinals = rows(dy.to(x.dtype)), dfinal.split([call.states for call in calls], dim=-1)
        total: Gradients | None = None
        for call, own, saved in zip(calls, dfinals, _saved_parts(checkpoints, calls), strict=True):
            part = _backward(call, backward_split(*call.size), dy, dense(own), saved)
            total = part if total is None else total.plus(part)
        assert total is not None
        dx, ddt, dz = (None if t is None else t.to(x.dtype) for t in (total.x, total.dt, total.z))
        dA, dB, dC = _joined(total.A), _joined(total.B), _joined(total.C)
        dinitial = None if initial_state is None else _joined(total.initial)
        return dx, ddt, dA, dB.to(B.dtype), dC.to(C.dtype), total.D, dz, total.dt_bias, dinitial


@dataclass
class Gradients:
    """Of a call's arguments; those with states, of each of its parts."""

    x: Tensor
    dt: Tensor
    z: Tensor | None
    D: Tensor | None
    dt_bias: Tensor | None
    A: list[Tensor]
    B: list[Tensor]
    C: list[Tensor]
    initial: list[Tensor]

    def plus(self, other: Gradients) -> Gradients:
        """With those of the states that follow."""
        self.x += other.x
        self.dt += other.dt
        if self.z is not None and other.z is not None:
            self.z += other.z
        if self.dt_bias is not None and other.dt_bias is not None:
            self.dt_bias += other.dt_bias
        for own, others in zip(self._by_state, other._by_state, strict=True):
            own += others
        return self

    @property
    def _by_state(self) -> tuple[list[Tensor], ...]:
        return self.A, self.B, self.C, self.initial


def _backward(call: Call, split: Split, dy: Tensor, dfinal: Tensor, saved: Tensor) -> Gradients:
    x, z = call.x, call.z
    lanes, each = call.lanes(split.numbers)
    width = 32 // lanes
    # No more warps than a group has channels for.
    warps = min(_BACKWARD_WARPS, 1 << (call.blocks(width) - 1).bit_length())
    blocks = call.blocks(width * warps)
    options = call.options(lanes, each, dy)
    pieces = call.pieces(split.steps)
    if split.steps:
        dfinal, dinitial = _flows(call, options, dy, dfinal, split.steps)
    else:
        dinitial = call.new_states(call.sequences)

    def partial(tensor: Tensor, groups: int) -> Tensor:
        """Room for the partial sums of B's or C's gradient."""
        if tensor.dim() != 4:
            return call.new_states(pieces)
        parts = call.groups // groups * blocks
        shape = (parts, call.tokens, groups, call.planes, lanes * each)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    dx, ddt, dz = call.new_result(), call.new_result(), None if z is None else call.new_result()
    dA, dD, dbias = call.new_states(pieces), call.new_sums(pieces), call.new_sums(pieces)
    dB, dC = partial(call.B, call.b_groups), partial(call.C, call.c_groups)
    layout = {"TILE": CHUNK, "SUB": _SUB, "WARPS": warps, "RESIDENT": _BACKWARD_BLOCKS}
    run = call.kernel("scan_backward.cu", "scan_backward", {**options, **layout, "CHUNKED": split.steps > 0})
    given = (dy, x, call.dt, z, call.A, call.B, call.C, call.D, call.dt_bias, saved, dfinal)
    found = (dx, ddt, dz, dA, dB, dC, dD, dbias, dinitial)
    strides = (*steps(dy, x, call.dt, z), *call.strides)
    arguments = (*addresses(*given, *found, call.offsets), *strides, *call.sizes(blocks), split.steps, call.tokens)
    run.launch(pieces * call.groups * blocks, 32 * warps, arguments)
    grad_A, grad_B, grad_C, grad_D, grad_bias = _collect(call, options, pieces, dA, dB, dC, dD, dbias)
    return Gradients(dx, ddt, dz, grad_D, grad_bias, [grad_A], [grad_B], [grad_C], [dinitial])


def _flows(call: Call, options: dict[str, int], dy: Tensor, dfinal: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """What flows into each piece of `span` steps at its end, and out of each sequence at its start."""
    lanes = options["LANES"]
    pieces, blocks = call.pieces(span), call.blocks(32 // lanes)
    items = pieces * call.groups * blocks
    local, sums = call.new_states(pieces), call.new_sums(pieces)
    run = call.kernel("scan_flow.cu", "scan_flow", {**options, "TILE": 8 if lanes == 1 else 16, **_FLOW})
    tensors = addresses(dy, call.dt, call.z, call.A, call.C, call.dt_bias, local, sums, call.offsets)
    strides = (*steps(dy, call.dt, call.z), *call.strides[3:])
    *sizes, _, c_share = call.sizes(blocks)
    run.launch(-(-items // _FORWARD_WARPS), 32 * _FORWARD_WARPS, (*tensors, *strides, *sizes, c_share, span, items))
    return call.chain(options, local, sums, dfinal, span, reverse=True)


def _collect(
    call: Call, options: dict[str, int], pieces: int, dA: Tensor, dB: Tensor, dC: Tensor, dD: Tensor, dbias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of A, B, C, D and the dt bias, from their summands."""
    A, B, C = (torch.empty(like.shape, dtype=like.dtype, device=like.device) for like in (call.A, call.B, call.C))
    D, bias = (None if like is None else torch.empty_like(like) for like in (call.D, call.dt_bias))
    own = call.channels * call.states * call.planes
    b_parts, c_parts = dB.shape[0], dC.shape[0]
    # Constant ones lie as A does, complex numbers as pairs.
    b_count, c_count = (own if part.dim() == 3 else part[0].numel() for part in (dB, dC))
    vector = 1 if any(count % 4 for count in (own, b_count, c_count, call.channels)) else 4
    run = call.kernel("scan_collect.cu", "scan_collect", {**options, "VECTOR": vector})
    tensors = addresses(dA, dB, dC, dD, dbias, A, B, C, D, bias)
    sizes = (pieces, b_parts, c_parts, b_count, c_count, call.channels, call.states)
    run.launch(-(-(b_count + c_count + own + call.channels) // (128 * vector)), 128, (*tensors, *sizes))
    return A, B, C, D, bias


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
    """One step in place: Triton's kernel, which reads and writes the state once and has nothing left to gain."""
    from longscan.ops.selective_scan import triton

    return triton.update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus)
