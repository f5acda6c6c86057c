"""The functions of `mamba_ssm.ops.selective_scan_interface`, over our operators.

Same arguments, defaults, layouts and results as mamba-ssm 2.3; on any device. Beyond theirs: the last state carries
gradients, a constant B counts in it, N has no upper bound, and the weights of the inner norms get gradients.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.layouts import as_complex, channels_last, varying, without_autocast
from longscan.integrations.mamba_ssm.recompute import Recompute
from longscan.ops import causal_conv1d, selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan in mamba-ssm's layout.

    Args:
        u, delta, z: (batch, channels, length), float32, bfloat16 or float16 (float64 by the reference).
        A: (channels, state), float32 or complex64, real part at most 0.
        B, C: (channels, state), (batch, state, length) or (batch, groups, state, length); with a complex A the varying
            ones are real, with real and imaginary parts side by side along the last axis, 2 length.
        D, delta_bias: (channels,).
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.

    Returns:
        out (batch, channels, length) in u's dtype, a channel-last view; with `return_last_state` also the state
        (batch, channels, state), float32 or complex64. Both carry gradients.

    Raises:
        ArgumentError: a shape, dtype, device or value is not allowed.
    """
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, None)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` by our definition in plain PyTorch: slow, any device, float64 too."""
    return _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, "reference")


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if u.dim() != 3:
        raise ArgumentError(f"u: got shape {tuple(u.shape)}, expected (batch, channels, length)")
    length = u.shape[2]
    with without_autocast(u):
        y, state = _pair(
            selective_scan(
                channels_last(u),
                channels_last(delta),
                A,
                varying("B", B, length, A.is_complex()),
                varying("C", C, length, A.is_complex()),
                D,
                None if z is None else channels_last(z),
                delta_bias,
                dt_softplus=delta_softplus,
                return_final_state=True,
                backend=backend,
            )
        )
    out = channels_last(y)
    return (out, state) if return_last_state else out


def _pair(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    assert isinstance(result, tuple)
    return result


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba block between its input projection and its output, in one call.

    Args:
        xz: (batch, 2 channels, length), what the input projection gave.
        conv1d_weight, conv1d_bias: (channels, 1, width) and (channels,); SiLU follows.
        x_proj_weight: (rank + 2 state, channels); with a complex A, 2 state real numbers for B and for C, the parts of
            each state side by side.
        delta_proj_weight: (channels, rank).
        out_proj_weight, out_proj_bias: (d_model, channels) and (d_model,).
        A: (channels, state), float32 or complex64.
        B, C: None where they come from x_proj; else as in `selective_scan_fn`.
        D, delta_bias: (channels,).
        B_proj_bias, C_proj_bias: added to B and C of x_proj.
        delta_softplus: apply softplus to delta + delta_bias.
        checkpoint_lvl: 1 computes the convolution's output and delta again in the backward pass instead of keeping
            them for it, 0 keeps them.
        b_rms_weight, c_rms_weight: (state,); with them B and C pass an RMS norm. For a real A.
        dt_rms_weight: (channels,); with it delta passes an RMS norm, before its bias.
        b_c_dt_rms_eps: epsilon of those norms.

    Returns:
        (batch, length, d_model).

    Raises:
        ArgumentError: a shape, dtype, device or value is not allowed.
    """
    if checkpoint_lvl not in (0, 1):
        raise ArgumentError(f"checkpoint_lvl: got {checkpoint_lvl!r}, allowed are 0 and 1")
    return _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
        A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus,
        (b_rms_weight, c_rms_weight, dt_rms_weight), b_c_dt_rms_eps, checkpoint_lvl == 1, None,
    )  # fmt: skip


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` by our definitions in plain PyTorch: slow, any device, float64 too."""
    return _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias,
        A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, delta_softplus, (None, None, None), 0.0, False, "reference",
    )  # fmt: skip


def _inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    B_proj_bias: Tensor | None,
    C_proj_bias: Tensor | None,
    delta_softplus: bool,
    norms: tuple[Tensor | None, Tensor | None, Tensor | None],
    eps: float,
    recompute: bool,
    backend: str | None,
) -> Tensor:
    if xz.dim() != 3 or xz.shape[1] % 2:
        raise ArgumentError(f"xz: got shape {tuple(xz.shape)}, expected (batch, 2 channels, length)")
    if conv1d_weight.dim() != 3 or conv1d_weight.shape[1] != 1:
        raise ArgumentError(f"conv1d_weight: got shape {tuple(conv1d_weight.shape)}, expected (channels, 1, width)")
    b_norm, c_norm, dt_norm = norms
    if A.is_complex() and not (b_norm is None and c_norm is None):
        raise ArgumentError("b_rms_weight, c_rms_weight: norms of B and C are for a real A, this one is complex")
    length, rank = xz.shape[2], delta_proj_weight.shape[1]
    state = A.shape[1] * (2 if A.is_complex() else 1)

    def convolve(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = causal_conv1d(u, weight.squeeze(1), bias, activation="silu", backend=backend)
        assert isinstance(out, Tensor)
        return out

    def project(selected: Tensor, weight: Tensor, norm: Tensor | None) -> Tensor:
        delta = F.linear(selected[..., :rank], weight)
        return delta if norm is None else _rms_norm(delta, norm, eps)

    u, z = channels_last(xz).chunk(2, dim=-1)
    with Recompute(recompute, xz.device) as block:
        filtered = convolve(u, conv1d_weight, conv1d_bias)
        block.drop(filtered, partial(convolve, u.detach(), conv1d_weight.detach(), _detached(conv1d_bias)))
        selected = F.linear(filtered, x_proj_weight)
        delta = project(selected, delta_proj_weight, dt_norm)
        block.drop(delta, partial(project, selected.detach(), delta_proj_weight.detach(), _detached(dt_norm)))
        parts: list[Tensor] = []
        for name, given, here, bias, norm in (
            ("B", B, selected[..., rank : rank + state], B_proj_bias, b_norm),
            ("C", C, selected[..., -state:], C_proj_bias, c_norm),
        ):
            if given is not None:
                part = varying(name, given, length, A.is_complex())
            else:
                part = here if bias is None else here + bias.to(here.dtype)
                part = as_complex(part.unflatten(-1, (-1, 2))) if A.is_complex() else part
            parts.append(part if norm is None else _rms_norm(part, norm, eps))
        B, C = parts
        y = selective_scan(
            filtered, delta, A, B, C, D, z, delta_bias, dt_softplus=delta_softplus, backend=backend
        )  # fmt: skip
        assert isinstance(y, Tensor)
    # Transformers hands a float32 bias beside weights of half precision.
    return F.linear(y, out_proj_weight, None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


class SelectiveScanFn:
    """`selective_scan_fn` for callers of mamba-ssm's autograd function, ``SelectiveScanFn.apply(u, delta, ...)``."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """`mamba_inner_fn` for callers of mamba-ssm's autograd function, ``MambaInnerFn.apply(xz, ...)``."""

    apply = staticmethod(mamba_inner_fn)
