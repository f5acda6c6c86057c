"""Chunks of a prompt through a model, captured as a CUDA graph where the same shape comes again."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.nn.capture import captured
from longscan.nn.state import ModelState
from longscan.ops import backends

if TYPE_CHECKING:
    from longscan.models.language_model import LanguageModel

# A larger chunk keeps a GPU busy without a graph, and a graph would keep its memory.
_MOST_TOKENS = 16384

# Graphs that a model keeps, and shapes whose first sight is remembered.
_GRAPHS, _SEEN = 4, 64

#: What identifies a graph: the batch, the chunk's length, the backend, and where the weights lie and in what dtype.
_Key = tuple[int, int, str, int]


def take_chunk(model: LanguageModel, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    """A chunk of several prompts, all of one length.

    On a GPU small chunks are bound by launches: the second time that a shape comes it is captured, and from then on it
    is one launch. Weights may change in place meanwhile.

    Args:
        model: a language model; no gradients.
        tokens: (rows, length).
        state: before the chunk; left as it is.

    Returns:
        Hidden vectors after the last token (rows, d_model), and the state after the chunk.
    """
    if _may_capture(model, tokens):
        graphs = _kept.get(model)
        if graphs is None:
            graphs = _kept[model] = _Graphs()
        graph = graphs.find(model, tokens, state)
        if graph is not None:
            return graph.run(tokens, state)
    hidden, after = model.backbone(tokens, state)
    assert after is not None
    return hidden[:, -1], after


def _may_capture(model: LanguageModel, tokens: Tensor) -> bool:
    return (
        tokens.device.type == "cuda"
        and tokens.numel() <= _MOST_TOKENS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and model.backbone.capturable
        and model.state_bytes(1, 1) == model.state_bytes(1, 2)
    )


class _Graphs:
    def __init__(self) -> None:
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()

    def find(self, model: LanguageModel, tokens: Tensor, state: ModelState) -> _Graph | None:
        """The graph of this shape, made where the shape was seen before; None at its first sight."""
        weights = hash(tuple((p.data_ptr(), p.dtype) for p in model.parameters()))
        key = (tokens.shape[0], tokens.shape[1], backends.requested(None), weights)
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            return graph
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
            return None
        if len(self._graphs) >= _GRAPHS:
            self._graphs.popitem(last=False)
        graph = self._graphs[key] = _Graph(model, tokens, state)
        return graph


_kept: weakref.WeakKeyDictionary[LanguageModel, _Graphs] = weakref.WeakKeyDictionary()


class _Graph:
    def __init__(self, model: LanguageModel, tokens: Tensor, state: ModelState) -> None:
        self._tokens, self._state = tokens.clone(), state.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(tokens.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                model.backbone(self._tokens, self._state)
            torch.cuda.current_stream().wait_stream(side)
            with captured(self._graph):
                hidden, after = model.backbone(self._tokens, self._state)
                self._last = hidden[:, -1].contiguous()
        assert after is not None
        self._after: ModelState = after

    def run(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        self._tokens.copy_(tokens)
        copy_states(self._state, state)
        self._graph.replay()
        # The graph's own memory is overwritten when it runs again.
        after = self._after.map(torch.empty_like)
        copy_states(after, self._after)
        return self._last.clone(), after


def copy_states(to: ModelState, source: ModelState) -> None:
    """Copy all tensors of one state into another of the same shape, in few launches.

    Raises:
        ArgumentError: the states are of different models or batch sizes.
    """
    copy_tensors(to.tensors(), source.tensors())


def copy_tensors(destinations: list[Tensor], sources: list[Tensor]) -> None:
    """:func:`copy_states` of the states' tensors."""
    if [tensor.shape for tensor in destinations] != [tensor.shape for tensor in sources]:
        raise ArgumentError("state is of another model or batch size than the one it is copied to")
    # One launch takes many tensors of one dtype.
    for dtype in {tensor.dtype for tensor in destinations}:
        pairs = [pair for pair in zip(destinations, sources, strict=True) if pair[0].dtype == dtype]
        torch._foreach_copy_([kept for kept, _ in pairs], [new for _, new in pairs])
