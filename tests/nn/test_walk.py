"""A walk in stretches is the whole walk; on a GPU its graphs are what they were captured from."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.mixers import LMU, HiPPO
from longscan.nn import walk as module
from longscan.nn.walk import Tensors, walk


def decays(sequences: Tensors, carried: Tensors, constants: Tensors, back: bool = False) -> tuple[Tensors, Tensors]:
    (x,), (h,), (a,) = sequences, carried, constants
    steps = []
    for t in reversed(range(len(x))) if back else range(len(x)):
        h = a * h + x[t]
        steps.append(h)
    return (torch.stack(steps[::-1] if back else steps),), (h,)


def expected(x: Tensor, h: Tensor, a: Tensor) -> Tensor:
    past = torch.arange(len(x), device=x.device)
    ages = past[:, None] - past
    weights = torch.where(ages >= 0, a ** ages.clamp(min=0), 0)
    return weights @ x + a ** (past[:, None] + 1) * h


@pytest.mark.parametrize("steps", [None, 1, 4, 11, 20])
def test_stretches_are_the_whole(steps: int | None) -> None:
    x, h, a = torch.randn(11, 3).double(), torch.randn(3).double(), torch.tensor(0.9).double()
    (found,), (last,) = walk(decays, (x,), (h,), (a,), steps=steps)
    torch.testing.assert_close(found, expected(x, h, a))
    torch.testing.assert_close(last, found[-1])
    (found,), (last,) = walk(decays, (x,), (h,), (a,), True, steps=steps, reverse=True)
    torch.testing.assert_close(found, expected(x.flip(0), h, a).flip(0))
    torch.testing.assert_close(last, found[0])


class Replayed(module._Graph):
    """As a graph is: what it wrote lies in one place, and replaying reads what its inputs hold by then."""

    def __init__(self, stretch: module.Stretch, parts: tuple[Tensors, ...], options: tuple[Any, ...]) -> None:
        self._inputs = tuple(tuple(tensor.clone() for tensor in part) for part in parts)
        self._outputs = stretch(*self._inputs, *options)
        self._graph = self  # type: ignore[assignment]
        self._again = partial(stretch, *self._inputs, *options)

    def replay(self) -> None:
        for kept, new in zip(self._outputs, self._again(), strict=True):
            for one, other in zip(kept, new, strict=True):
                one.copy_(other)


def test_what_a_graph_is_given_and_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs by what they were captured from, and stretches that go through one memory."""
    monkeypatch.setattr(module, "_Graph", Replayed)
    monkeypatch.setattr(module, "_graphs", OrderedDict())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    a = torch.tensor(0.9).double()
    for seed in range(2):
        torch.manual_seed(seed)
        x, h = torch.randn(12, 3).double(), torch.randn(3).double()
        found, carried = [], (h,)
        for piece in x.split(4):
            (own,), carried = module._replayed(decays, (piece,), carried, (a,), ())
            found.append(own)
        torch.testing.assert_close(torch.cat(found), expected(x, h, a))
        assert [type(graph) for graph in module._graphs.values()] == [Replayed]
    # Backwards is another graph, and the last used are kept.
    module._replayed(decays, (x,), (h,), (a,), (True,))
    assert len(module._graphs) == 2
    for length in range(1, 2 * module._KEPT):
        module._replayed(decays, (torch.randn(length, 3).double(),), (h,), (a,), ())
    assert len(module._graphs) == module._KEPT


@pytest.mark.gpu
def test_graphs_are_what_they_were_captured_from() -> None:
    """The first stretch as it is, the others by a graph, and a second walk by that graph alone, on its own numbers."""
    module._graphs.clear()
    a = torch.tensor(0.99, device="cuda")
    for seed in range(2):
        torch.manual_seed(seed)
        x, h = torch.randn(4 * module._STEPS + 5, 3, device="cuda"), torch.randn(3, device="cuda")
        (found,), (last,) = walk(decays, (x,), (h,), (a,))
        torch.testing.assert_close(found, expected(x, h, a), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, found[-1])
        (graph,) = module._graphs.values()
        assert graph is not None
    for size in range(2, 2 + module._KEPT):
        walk(decays, (x[:, :1].expand(-1, size),), (h[:1].expand(size),), (a,))
    assert len(module._graphs) == module._KEPT


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [LMU, HiPPO])
def test_a_walk_within_a_captured_step(mixer: type[LMU | HiPPO]) -> None:
    torch.manual_seed(0)
    layer, x = mixer(8, order=4).cuda(), torch.randn(2, 3 * module._STEPS, 8, device="cuda")
    expected, _ = layer(x)
    expected.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()

    def step() -> Tensor:
        layer.zero_grad(set_to_none=True)
        y, _ = layer(x)
        y.square().mean().backward()
        return y.detach()

    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        y = step()
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
