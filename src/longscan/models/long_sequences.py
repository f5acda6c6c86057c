"""Training on sequences whose activations no memory holds: chunk by chunk, the state carried."""

from __future__ import annotations

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.models.language_model import LanguageModel
from longscan.nn.state import ModelState

GRADIENTS = ("full", "truncated")


def backward_in_chunks(
    model: LanguageModel, tokens: Tensor, targets: Tensor, *, chunk: int, gradients: str = "full"
) -> Tensor:
    """Add the gradient of a mean loss to ``model``'s parameters, with the activations of one chunk in memory at a time.

    "full": the gradient of :meth:`LanguageModel.loss`, exactly. The sequence is first run without gradients, and the
    state before each chunk kept; then each chunk, the last one first, is run again from its state, and its backward
    pass ends in the gradient of that state, from which the chunk before it goes on. A third more work, and besides a
    chunk's activations a state a chunk.

    "truncated": gradients end at the borders between chunks (truncated back-propagation through time): no more work,
    and one state; what a token owes to chunks before its own is not learned.

    The model is called without wrappers: processes that each have sequences of their own average gradients afterwards.

    Args:
        tokens: (batch, length) integers.
        targets: (batch, length) integers, already shifted; places with -100 do not count.
        chunk: tokens a chunk.
        gradients: one of the two.

    Returns:
        The mean loss over all places that count, in nats, float32, without gradient.

    Raises:
        ArgumentError: shapes do not fit, or an argument is not allowed.
    """
    if chunk < 1:
        raise ArgumentError(f"chunk must be at least 1, got {chunk}")
    if gradients not in GRADIENTS:
        raise ArgumentError(f'gradients must be "full" or "truncated", got {gradients!r}')
    if targets.shape != tokens.shape or tokens.dim() != 2:
        raise ArgumentError(
            f"tokens and targets must both be (batch, length); got {tuple(tokens.shape)} and {tuple(targets.shape)}"
        )
    count = (targets != -100).sum().clamp(min=1)
    pieces = list(zip(tokens.split(chunk, dim=1), targets.split(chunk, dim=1), strict=True))
    state = model.initial_state(tokens.shape[0])
    total = torch.zeros((), device=tokens.device)
    if gradients == "truncated":
        for piece, goal in pieces:
            loss, after = model.loss_and_state(piece, goal, state, reduction="sum")
            (loss / count).backward()
            total += loss.detach()
            assert after is not None
            state = after.detach()
        return total / count
    borders = _borders(model, [piece for piece, _ in pieces], state)
    following: list[Tensor] | None = None
    for piece, goal in reversed(pieces):
        before = borders.pop().map(_leaf)
        loss, after = model.loss_and_state(piece, goal, before, reduction="sum")
        total += loss.detach()
        ends: list[Tensor] = [loss / count]
        pulls: list[Tensor] = [torch.ones_like(loss)]
        if following is not None:
            assert after is not None
            pairs = zip(_differentiable(after), following, strict=True)
            for end, pull in pairs:
                if end.requires_grad:
                    ends.append(end)
                    pulls.append(pull)
        torch.autograd.backward(ends, pulls)
        following = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in _differentiable(before)]
    return total / count


@torch.no_grad()
def _borders(model: LanguageModel, pieces: list[Tensor], state: ModelState) -> list[ModelState]:
    """The state before each chunk."""
    borders = [state]
    for piece in pieces[:-1]:
        _, after = model.backbone(piece, borders[-1])
        assert after is not None
        borders.append(after)
    return borders


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


def _differentiable(state: ModelState) -> list[Tensor]:
    return [tensor for tensor in state.tensors() if tensor.is_floating_point() or tensor.is_complex()]
