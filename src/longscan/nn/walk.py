"""Recurrences that are walked in PyTorch: a few small kernels a step, launched as CUDA graphs where launching is dear.

A step of a layer takes a GPU less time than its launches take Python. So on a GPU the walk is cut into stretches of one
length, and from the second on a stretch is the replay of a graph that was captured from it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longscan.nn.capture import captured

Tensors = tuple[Tensor, ...]

#: Walks some steps: (sequences, each (steps, ...); carried; constants; *options) to outputs, each (steps, ...), and
#: what is carried on. Pure, and the same kernels for the same shapes.
Stretch = Callable[..., tuple[Tensors, Tensors]]

# Steps of a graph, and graphs that are kept, the last used.
_STEPS = 64
_KEPT = 16


def walk(
    stretch: Stretch,
    sequences: Tensors,
    carried: Tensors,
    constants: Tensors,
    *options: Any,
    steps: int | None = None,
    reverse: bool = False,
) -> tuple[Tensors, Tensors]:
    """Walk sequences in stretches. Nothing is recorded for autograd: call it within an autograd function.

    Args:
        stretch: walks one; a function of a module, told ``options`` (hashable) besides.
        sequences: what each step reads, (length, ...).
        carried: what enters the first stretch.
        constants: what every stretch reads.
        steps: longest stretch; None: as long as is good.
        reverse: from the end; ``stretch`` must do so too.

    Returns:
        What each step wrote, (length, ...), and what is carried out of the last stretch.
    """
    length = len(sequences[0])
    replays = sequences[0].is_cuda and not torch.compiler.is_compiling()
    size = min(steps or length, _STEPS if replays else length)
    starts = range(0, length, size)
    found: list[Tensors] = []
    for start in reversed(starts) if reverse else starts:
        own = tuple(sequence[start : start + size] for sequence in sequences)
        run = _replayed if replays and len(own[0]) == size else _called
        outputs, carried = run(stretch, own, carried, constants, options)
        found.append(outputs)
    if reverse:
        found.reverse()
    return tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)), carried


def _called(stretch: Stretch, *parts: Any) -> tuple[Tensors, Tensors]:
    *tensors, options = parts
    return stretch(*tensors, *options)


class _Graph:
    """A stretch on tensors of these shapes, in memory of its own."""

    def __init__(self, stretch: Stretch, parts: tuple[Tensors, ...], options: tuple[Any, ...]) -> None:
        self._inputs = tuple(tuple(tensor.clone() for tensor in part) for part in parts)
        self._graph = torch.cuda.CUDAGraph()
        with captured(self._graph):
            self._outputs = stretch(*self._inputs, *options)

    def __call__(self, parts: tuple[Tensors, ...]) -> tuple[Tensors, Tensors]:
        for own, given in zip(self._inputs, parts, strict=True):
            for kept, new in zip(own, given, strict=True):
                kept.copy_(new)
        self._graph.replay()
        written, carried = (tuple(tensor.clone() for tensor in part) for part in self._outputs)
        return written, carried


# What was walked before -> its graph, or None while once is all.
_graphs: OrderedDict[Any, _Graph | None] = OrderedDict()
_lock = threading.Lock()


def _replayed(
    stretch: Stretch, sequences: Tensors, carried: Tensors, constants: Tensors, options: tuple[Any, ...]
) -> tuple[Tensors, Tensors]:
    parts = (sequences, carried, constants)
    device = sequences[0].device
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return stretch(*parts, *options)
        shapes = tuple(tuple((tensor.shape, tensor.dtype) for tensor in part) for part in parts)
        key = (stretch, options, shapes, device, torch.cuda.current_stream().cuda_stream)
        # A graph's memory is one: whoever uses it copies in, replays and copies out before the next.
        with _lock:
            if key not in _graphs:
                # The first time as it is: libraries load and kernels compile, which no capture holds.
                _graphs[key] = None
                while len(_graphs) > _KEPT:
                    _graphs.popitem(last=False)
                return stretch(*parts, *options)
            _graphs.move_to_end(key)
            graph = _graphs[key]
            if graph is None:
                graph = _graphs[key] = _Graph(stretch, parts, options)
            return graph(parts)
