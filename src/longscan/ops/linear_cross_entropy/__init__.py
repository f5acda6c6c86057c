"""A linear head and the cross entropy of its scores, without all scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops import backends
from longscan.ops.checks import activation_dtype, check_floating, check_shape, check_tensors, values_are_checked
from longscan.ops.linear_cross_entropy import library

__all__ = ["IGNORED", "linear_cross_entropy"]

#: The target of a place that does not count, as in `torch.nn.functional.cross_entropy`.
IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Cross entropy of the scores of a linear head, in nats.

    .. math:: \ell_t = \log \sum_{v < V} e^{w_v \cdot h_t} - w_{y_t} \cdot h_t

    Scores are made for some thousand places at a time. While they are there, so are their gradients, which go on into
    those of hidden and weight at once: nothing of the size (places, vocabulary) is kept for the backward pass.

    Args:
        hidden: (..., channels), float32, bfloat16 or float16; float64 is served by the reference.
        weight: (rows, channels), any of these dtypes; the product is in hidden's (autocast's, where it is on).
        targets: (...), int64 or int32, below ``vocab_size``; -100 where a place does not count.
        vocab_size: rows from here on are padding, which no score is made of. Default: all rows count.
        reduction: "mean" over the places that count, or "sum".
        backend: "auto" (None), "reference" or "triton"; a name never falls back to another.

    Returns:
        A float32 (float64 for float64) scalar. The sum over a row's scores is float32 whatever their dtype, and so is
        the weight's gradient until it is complete.

    Raises:
        ArgumentError: a shape, dtype, device, reduction or (on the CPU) a target is not allowed.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> loss = linear_cross_entropy(torch.randn(2, 5, 8), torch.randn(100, 8), torch.randint(100, (2, 5)))
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if hidden.dim() < 1 or 0 in hidden.shape:
        raise ArgumentError(f"hidden: got shape {tuple(hidden.shape)}, expected (..., channels), each at least 1")
    channels = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ArgumentError(f"weight: got shape {tuple(weight.shape)}, expected (rows, {channels}), rows at least 1")
    check_shape("weight", weight, (weight.shape[0], channels), "(rows, channels)")
    check_shape("targets", targets, tuple(hidden.shape[:-1]), "hidden's without channels")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"targets: got {targets.dtype}, allowed are int64 and int32")
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ArgumentError(f"vocab_size: got {vocab_size}, allowed are 1 to weight's {weight.shape[0]} rows")
    if reduction not in ("mean", "sum"):
        raise ArgumentError(f'reduction: got {reduction!r}, allowed are "mean" and "sum"')
    if not torch.compiler.is_compiling() and values_are_checked(targets):
        outside = targets[(targets != IGNORED) & ((targets < 0) | (targets >= vocab_size))]
        if outside.numel():
            raise ArgumentError(
                f"targets: got {int(outside[0])}, allowed are 0 to {vocab_size - 1}, and {IGNORED} for none"
            )
    flat = targets.reshape(-1).to(torch.int64)
    save = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, _, _ = library.linear_cross_entropy(
        hidden.reshape(-1, channels).to(activation_dtype(hidden)),
        weight,
        flat,
        vocab_size,
        save,
        backends.requested(backend),
    )
    return total if reduction == "sum" else total / (flat != IGNORED).sum()
