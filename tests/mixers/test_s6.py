"""S6 against its equations, whichever of its parts depend on the input."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.mixers import S6
from longscan.mixers.s6 import SELECTIVE

SUBSETS = [parts for count in range(4) for parts in itertools.combinations(SELECTIVE, count)]


def written_out(mixer: S6, x: Tensor) -> Tensor:
    """The module docstring's equations, one time step after another."""
    rows = [] if mixer.x_proj is None else list(mixer.x_proj.weight)

    def made_of_input(part: str, count: int) -> Tensor:
        own = [rows.pop(0) for _ in range(count)]
        return torch.stack([x @ row for row in own], dim=-1)

    steps = torch.zeros_like(x) + (mixer.dt_bias if mixer.dt_proj is None else mixer.dt_proj.bias)
    if "dt" in mixer.selective:
        steps = steps + made_of_input("dt", mixer.dt_rank) @ mixer.dt_proj.weight.T
    dt = F.softplus(steps)
    B = made_of_input("B", mixer.d_state)[:, :, None] if "B" in mixer.selective else mixer.B.expand(*x.shape, -1)
    C = made_of_input("C", mixer.d_state)[:, :, None] if "C" in mixer.selective else mixer.C.expand(*x.shape, -1)
    h, outputs = torch.zeros(x.shape[0], *mixer.A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * mixer.A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t]
        outputs.append((C[:, t] * h).sum(-1) + mixer.D * x[:, t])
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("selective", SUBSETS, ids=lambda parts: "+".join(parts) or "nothing")
def test_it_is_its_equations(selective: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    mixer = S6(6, d_state=4, dt_rank=2, selective=selective).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], written_out(mixer, x), rtol=1e-9, atol=1e-10)
    mixer(x)[0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in mixer.parameters())


def test_with_nothing_selective_the_output_is_a_convolution_of_the_input() -> None:
    torch.manual_seed(0)
    mixer = S6(3, d_state=4, selective=()).double()
    impulse = torch.zeros(1, 9, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    kernel = mixer(impulse)[0][0]
    x = torch.randn(1, 9, 3, dtype=torch.float64)
    convolved = torch.stack([(kernel[: t + 1].flip(0) * x[0, : t + 1]).sum(0) for t in range(9)])
    torch.testing.assert_close(mixer(x)[0][0], convolved, rtol=1e-9, atol=1e-10)


def test_fixed_parts_are_parameters_as_in_s4d() -> None:
    mixer = S6(5, d_state=3, dt_rank=2, selective=["C"]).bfloat16()
    kept = {name: tuple(parameter.shape) for name, parameter in mixer.named_parameters()}
    assert kept == {"A_log": (5, 3), "D": (5,), "B": (5, 3), "dt_bias": (5,), "x_proj.weight": (3, 5)}
    assert {p.dtype for name, p in mixer.named_parameters() if name != "x_proj.weight"} == {torch.float32}
    assert all(getattr(p, "_no_weight_decay", name == "x_proj.weight") for name, p in mixer.named_parameters())
    x = torch.randn(2, 4, 5, dtype=torch.bfloat16)
    assert mixer(x)[0].dtype == torch.bfloat16


def test_a_part_that_does_not_exist() -> None:
    with pytest.raises(ArgumentError, match="selective takes parts of dt, B, C; got 'A'"):
        S6(4, selective=("dt", "A"))
