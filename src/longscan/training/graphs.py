"""Forward and backward of a loss captured as a CUDA graph: a step of a small model is bound by launches no more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from longscan.nn.capture import captured
from longscan.nn.state import ModelState

#: Tokens, targets and the state before to the loss whose gradient is taken, and the state after.
Loss = Callable[[Tensor, Tensor, ModelState | None], tuple[Tensor, ModelState | None]]


class CapturedPass:
    """One micro-batch, forward and backward, of shapes that stay.

    Args:
        loss: of one micro-batch; nothing in it may wait for the GPU.
        parameters: that have gradients.
        tokens, targets: a micro-batch like those to come.
        state: that is carried from batch to batch, or None.
        adds: whether gradients are added to those that are there, for several micro-batches a step; else they are
            overwritten.

    Raises:
        RuntimeError: something in the loss cannot be captured.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: list[nn.Parameter],
        tokens: Tensor,
        targets: Tensor,
        state: ModelState | None,
        *,
        adds: bool,
    ) -> None:
        self._parameters = parameters
        self._tokens, self._targets = tokens.clone(), targets.clone()
        self._state = None if state is None else state.clone()
        self._adds = adds
        self._forget()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets libraries allocate what they keep
            for _ in range(2):
                loss(self._tokens, self._targets, self._state)[0].backward()
        torch.cuda.current_stream().wait_stream(side)
        self._forget()
        self._graph = torch.cuda.CUDAGraph()
        with captured(self._graph):
            value, after = loss(self._tokens, self._targets, self._state)
            value.backward()
            self._loss = value.detach()
            if self._state is not None and after is not None:
                for kept, new in zip(self._state.tensors(), after.tensors(), strict=True):
                    kept.copy_(new.detach())
        self._gradients = [parameter.grad for parameter in parameters]

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter) if self._adds else None

    def begin(self) -> None:
        """Before the first micro-batch of a step."""
        if self._adds:
            torch._foreach_zero_([gradient for gradient in self._gradients if gradient is not None])
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def run(self, tokens: Tensor, targets: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState | None]:
        """The loss, and the state after; both lie in the graph's own memory until the next call."""
        self._tokens.copy_(tokens)
        self._targets.copy_(targets)
        if self._state is not None and state is not None and state is not self._state:
            for kept, new in zip(self._state.tensors(), state.tensors(), strict=True):
                kept.copy_(new)
        self._graph.replay()
        return self._loss, self._state
