"""A walk in stretches is the whole walk; on a GPU its graphs are what they were captured from."""

from __future__ import annotations

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
