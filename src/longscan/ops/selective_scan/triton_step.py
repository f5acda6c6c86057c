"""One step of the selective scan in Triton: what generation calls once a token."""

# Triton's kernels take pointers and compile-time constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from longscan.ops.triton_utils import silu, softplus

_RUNTIME = [
    "state_row", "state_channel", "state_column", "x_row", "x_channel", "dt_row", "dt_channel", "z_row", "z_channel",
    "A_channel", "A_column", "B_row", "B_channel", "B_column", "C_row", "C_channel", "C_column", "channels", "states",
    "b_size", "c_size",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def step_kernel(
    state, x, dt, z, A, B, C, D, dt_bias, y,
    state_row, state_channel, state_column, x_row, x_channel, dt_row, dt_channel, z_row, z_channel,
    A_channel, A_column, B_row, B_channel, B_column, C_row, C_channel, C_column, channels, states, b_size, c_size,
    COMPLEX: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Moves a block of channels of one sequence on by a step, in place.

    Complex tensors come as views on their real parts; the imaginary part is the next number. Channel c reads entry
    c // b_size of B along its second axis.
    """
    blocks = tl.cdiv(channels, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks
    d = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, COLUMNS)
    live = d < channels
    inside = live[:, None] & (n < states)[None, :]

    delta = tl.load(dt + row * dt_row + d * dt_channel, mask=live, other=0.0).to(tl.float32)
    if HAS_BIAS:
        delta += tl.load(dt_bias + d, mask=live, other=0.0)
    if SOFTPLUS:
        delta = softplus(delta)
    values = tl.load(x + row * x_row + d * x_channel, mask=live, other=0.0).to(tl.float32)
    drive = (delta * values)[:, None]

    h_at = state + row * state_row + d[:, None] * state_channel + n[None, :] * state_column
    A_at = A + d[:, None] * A_channel + n[None, :] * A_column
    B_at = B + row * B_row + (d // b_size)[:, None] * B_channel + n[None, :] * B_column
    C_at = C + row * C_row + (d // c_size)[:, None] * C_channel + n[None, :] * C_column
    hr = tl.load(h_at, mask=inside, other=0.0)
    Br = tl.load(B_at, mask=inside, other=0.0).to(tl.float32)
    Cr = tl.load(C_at, mask=inside, other=0.0).to(tl.float32)
    size = tl.exp(delta[:, None] * tl.load(A_at, mask=inside, other=0.0))
    if COMPLEX:
        hi = tl.load(h_at + 1, mask=inside, other=0.0)
        Bi = tl.load(B_at + 1, mask=inside, other=0.0)
        Ci = tl.load(C_at + 1, mask=inside, other=0.0)
        angle = delta[:, None] * tl.load(A_at + 1, mask=inside, other=0.0)
        ar = size * tl.cos(angle)
        ai = size * tl.sin(angle)
        new = ar * hr - ai * hi + drive * Br
        hi = ar * hi + ai * hr + drive * Bi
        hr = new
        total = 2.0 * tl.sum(hr * Cr - hi * Ci, 1)
        tl.store(h_at + 1, hi, mask=inside)
    else:
        hr = size * hr + drive * Br
        total = tl.sum(hr * Cr, 1)
    tl.store(h_at, hr, mask=inside)
    if HAS_D:
        total += tl.load(D + d, mask=live, other=0.0) * values
    if HAS_Z:
        total *= silu(tl.load(z + row * z_row + d * z_channel, mask=live, other=0.0).to(tl.float32))
    tl.store(y + row * channels + d, total.to(y.dtype.element_ty), mask=live)
