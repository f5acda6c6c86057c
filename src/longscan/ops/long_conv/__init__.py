"""Causal convolutions as long as the sequence: what time-invariant state space models and Hyena are trained by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.checks import ACCUMULATION, check_floating, check_shape, check_tensors, prepare_cu_seqlens
from longscan.ops.long_conv import library

__all__ = ["long_conv"]


def long_conv(
    u: Tensor,
    kernel: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Convolves each channel with a long kernel, causally, by fast Fourier transform.

    .. math:: y_t = \sum_{l=0}^{K-1} k_l\, u_{t-l} + D u_t

    Gu et al. 2022 (arXiv 2111.00396), section 2.4; Poli et al. 2023 (arXiv 2302.10866), section 2.

    Args:
        u: (batch, length, channels), float32, bfloat16, float16 or float64.
        kernel: (channels, K), K at least 1, shorter or longer than u; or (systems, K) where systems divides channels:
            each kernel then serves channels / systems channels in a row.
        D: (systems,), the skip; None for none.
        initial_state: (batch, any, channels), the inputs that came before, oldest first; with `cu_seqlens`
            (num_sequences, any, channels). The last K - 1 of them matter; zero before those given.
        cu_seqlens: (num_sequences + 1,) integers, 0 first, `length` last: sequences packed in the one row of a batch
            of 1; no kernel reaches over a border.
        return_final_state: also return the last K - 1 inputs, with which a next call goes on.
        backend: "auto" (None), "reference" or "fft"; a name never falls back to another.

    Returns:
        y (batch, length, channels) in u's dtype; with `return_final_state` also the state, (batch or num_sequences,
        K - 1, channels) in u's dtype, zero where there was no input. Both carry gradients.

    Precision: transforms and sums are float32, or float64 for float64, under autocast too. Errors of a transform are
    relative to the largest output of its channel. NaN or infinity at one time reaches every output of its channel and
    sequence.

    Cost: of order (length + K) log(length + K) operations a channel, or, for a kernel of less than an eighth of the
    length, length log(K) in blocks; memory of order length. For the backward pass the arguments alone are kept.

    Raises:
        ArgumentError: a shape, dtype or device is not allowed, or the offsets decrease.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> long_conv(torch.randn(2, 100, 8), torch.randn(8, 100)).shape
        torch.Size([2, 100, 8])
    """
    if u.dim() != 3 or 0 in u.shape:
        raise ArgumentError(f"u: got shape {tuple(u.shape)}, expected (batch, length, channels), each at least 1")
    batch, _, channels = u.shape
    check_floating("u", u)
    check_floating("kernel", kernel)
    if kernel.dim() != 2 or 0 in kernel.shape or channels % kernel.shape[0]:
        raise ArgumentError(
            f"kernel: got shape {tuple(kernel.shape)}, expected (channels, K) = ({channels}, at least 1), or "
            "(systems, K) with a divisor of channels"
        )
    systems, taps = kernel.shape
    if D is not None:
        check_floating("D", D)
        check_shape("D", D, (systems,), "(systems,), as many as there are kernels")
    check_tensors(u=u, kernel=kernel, D=D, initial_state=initial_state)
    sequences = batch
    if cu_seqlens is not None:
        cu_seqlens = prepare_cu_seqlens(cu_seqlens, batch, u.device)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_floating("initial_state", initial_state)
        if initial_state.dim() != 3 or (initial_state.shape[0], initial_state.shape[2]) != (sequences, channels):
            raise ArgumentError(
                f"initial_state: got shape {tuple(initial_state.shape)}, expected ({sequences}, any, {channels}) = "
                f"({'batch' if cu_seqlens is None else 'num_sequences'}, past inputs, channels)"
            )
        initial_state = initial_state.to(u.dtype)
    kernel = kernel.to(ACCUMULATION[u.dtype])
    if D is not None:
        # The skip is a tap of lag 0.
        kernel = torch.cat((kernel[:, :1] + D[:, None].to(kernel.dtype), kernel[:, 1:]), dim=1)
    y = library.long_conv(u, kernel, initial_state, cu_seqlens, backends.requested(backend))
    return (y, _last_inputs(u, initial_state, cu_seqlens, taps - 1)) if return_final_state else y


def _last_inputs(u: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, count: int) -> Tensor:
    """The last ``count`` inputs of each sequence, oldest first, zero where there were fewer."""
    if cu_seqlens is None:
        x = u if past is None else torch.cat((past, u), dim=1)
        x = x[:, max(0, x.shape[1] - count) :]
        return F.pad(x, (0, 0, count - x.shape[1], 0))
    start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    places = end - count + torch.arange(count, device=u.device)  # (sequences, count), some before the start
    last = u[0][places.clamp(min=0)]
    before = torch.zeros_like(last)
    if past is not None and past.shape[1]:
        age = places - start + past.shape[1]
        index = age.clamp(0, past.shape[1] - 1)[..., None].expand(-1, -1, u.shape[2])
        before = torch.where((age >= 0)[..., None], past.gather(1, index), before)
    return torch.where((places >= start)[..., None], last, before)
