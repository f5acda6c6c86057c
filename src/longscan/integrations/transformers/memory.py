"""The states of Mamba layers in a cache of Transformers, as a compiled step takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Memory:
    """A cache's tensors for some of its layers.

    The convolution's inputs lie in the cache as (batch, channels, width), one more than it needs; the step wants
    (batch, width - 1, channels) of its own, so they are copied there and back.
    """

    def __init__(self, layers: Sequence[int], convs: list[Tensor], ssms: list[Tensor]) -> None:
        self._layers, self._convs, self._ssms = layers, convs, ssms
        self._tails = [conv[:, :, 1:].transpose(1, 2) for conv in convs]
        self._edges = [(conv[:, :, 0], conv[:, :, 1]) for conv in convs]
        self._windows = [torch.empty(tail.shape, dtype=tail.dtype) for tail in self._tails]
        # The channels of several heads side by side.
        states = [ssm.view(ssm.shape[0], -1, ssm.shape[-1]) for ssm in ssms]
        #: (conv_state, ssm_state) of each layer; the former are valid between `load` and `store`.
        self.states = list(zip(self._windows, states, strict=True))

    @staticmethod
    def of(cache: Any, layers: Sequence[int]) -> Memory | None:
        """None for a cache that is fresh, elsewhere, or keeps what a step would drop."""
        convs, states = [], []
        kept = getattr(cache, "layers", ())
        if len(kept) <= max(layers, default=-1):
            return None
        for layer in (kept[i] for i in layers):
            previous = getattr(layer, "has_previous_state", None)
            if getattr(layer, "record_past", True) or not previous or not all(previous.values()):
                return None
            conv, state = layer.conv_states[0], layer.recurrent_states[0]
            if len(layer.conv_states) != 1 or conv is None or state is None or conv.shape[-1] < 2:
                return None
            if conv.requires_grad or state.requires_grad or conv.device.type != "cpu" or not state.is_contiguous():
                return None
            convs.append(conv)
            states.append(state)
        return Memory(layers, convs, states)

    def holds(self, cache: Any) -> bool:
        """Whether these still are the cache's tensors (a beam search replaces them, a reset empties them)."""
        return len(cache.layers) > max(self._layers, default=-1) and all(
            layer.conv_states[0] is conv
            and layer.recurrent_states[0] is ssm
            and layer.has_previous_state[0]
            and not layer.record_past
            for layer, conv, ssm in zip((cache.layers[i] for i in self._layers), self._convs, self._ssms, strict=True)
        )

    def load(self) -> None:
        """The convolutions' inputs from the cache."""
        for window, tail in zip(self._windows, self._tails, strict=True):
            window.copy_(tail)

    def store(self) -> None:
        """And back into it, with the one that came."""
        for (first, second), tail, window in zip(self._edges, self._tails, self._windows, strict=True):
            first.copy_(second)
            tail.copy_(window)
