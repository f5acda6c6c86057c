"""The head's cross entropy as it is defined: plain PyTorch, some places at a time, on any device.

loss    = log sum_v exp(s_v) - s_y,    s = W h
dloss/ds = softmax(s) - onehot(y),     dh = W^T ds,    dW = sum over places of ds h^T
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from longscan.ops.checks import ACCUMULATION

#: Scores made at a time: they stay in a CPU's caches in part, and cost a GPU little memory beside its work.
SCORES = {"cpu": 1 << 24}
MOST_SCORES = 4096 * 50304


def unsupported(*_: Tensor | None) -> str | None:
    """The reference serves every call."""
    return None


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum of the losses and, with `save`, its gradients: hidden's in its dtype, weight's in its own."""
    return in_pieces(hidden, weight, targets, save, lambda scores, own: _losses(scores, own, vocab_size, save))


def _losses(scores: Tensor, targets: Tensor, vocab_size: int, save: bool) -> tuple[Tensor, Tensor]:
    wide = scores[:, :vocab_size].to(ACCUMULATION[scores.dtype])
    logarithm = torch.logsumexp(wide, dim=-1)
    counts = targets >= 0
    places = targets.clamp(min=0)[:, None]
    loss = torch.where(counts, logarithm - wide.gather(1, places)[:, 0], 0.0).sum()
    if not save:
        return loss, scores
    slope = torch.exp(wide - logarithm[:, None])
    slope.scatter_add_(1, places, slope.new_full((), -1.0).expand(places.shape))
    slope.masked_fill_(~counts[:, None], 0.0)
    scores[:, :vocab_size] = slope.to(scores.dtype)
    scores[:, vocab_size:] = 0.0
    return loss, scores


def in_pieces(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    save: bool,
    losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The products around `losses`, which takes scores and targets to the sum of losses and the scores' gradients."""
    matrix = weight.to(hidden.dtype)
    real = ACCUMULATION[hidden.dtype]
    total = torch.zeros((), dtype=real, device=hidden.device)
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if save else None
    dweight: Tensor | None = None
    for piece in _pieces(hidden, weight.shape[0]):
        own = hidden[piece]
        loss, slope = losses(own @ matrix.t(), targets[piece])
        total += loss
        if dhidden is not None:
            torch.mm(slope, matrix, out=dhidden[piece])
            dweight = _add_product(dweight, slope, own, real)
    return total, dhidden, None if dweight is None else dweight.to(weight.dtype)


def _pieces(hidden: Tensor, rows: int) -> Iterator[slice]:
    places = hidden.shape[0]
    size = max(64, SCORES.get(hidden.device.type, MOST_SCORES) // rows)
    # Pieces of about one size: a short last one would be a slow product.
    count = -(-places // size)
    size = -(-places // count)
    for start in range(0, places, size):
        yield slice(start, min(start + size, places))


def _add_product(total: Tensor | None, slope: Tensor, hidden: Tensor, real: torch.dtype) -> Tensor:
    """total + slope^T hidden, summed in `real`."""
    if hidden.device.type == "cuda" and hidden.dtype != real:
        if total is None:
            return torch.mm(slope.t(), hidden, out_dtype=real)
        return torch.addmm(total, slope.t(), hidden, out_dtype=real)
    product = (slope.t() @ hidden).to(real)
    return product if total is None else total.add_(product)
