"""The functions and the module in one graph each, under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longscan.integrations.mamba_ssm.conv import causal_conv1d_fn, causal_conv1d_update
from longscan.integrations.mamba_ssm.module import Mamba
from longscan.integrations.mamba_ssm.scan import mamba_inner_fn, selective_scan_fn
from longscan.integrations.mamba_ssm.step import selective_state_update
from tests.integrations.mamba_ssm.test_scan import arguments, inner_arguments

pytestmark = pytest.mark.compile


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_sequences() -> None:
    given = arguments()
    assert torch.equal(compiled(selective_scan_fn)(*given), selective_scan_fn(*given))
    x, weight = given[0], torch.randn(6, 4)
    assert torch.equal(compiled(causal_conv1d_fn)(x, weight), causal_conv1d_fn(x, weight))
    block = inner_arguments()
    torch.testing.assert_close(compiled(mamba_inner_fn)(**block), mamba_inner_fn(**block))


def test_training_the_module() -> None:
    mixer, x = Mamba(8), torch.randn(2, 9, 8)
    weights = torch.randn(2, 9, 8)
    parameters = list(mixer.parameters())
    found = torch.autograd.grad((compiled(mixer)(x) * weights).sum(), parameters)
    for got, expected in zip(found, torch.autograd.grad((mixer(x) * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_steps_in_place() -> None:
    u, delta, A, B, C, *_ = arguments()
    step = (u[..., 0], delta[..., 0], A, B[..., 0], C[..., 0])
    state, weight = torch.randn(2, 6, 3), torch.randn(6, 4)
    same = state.clone()
    assert torch.equal(compiled(selective_state_update)(state, *step), selective_state_update(same, *step))
    assert torch.equal(state, same)
    kept = torch.randn(2, 6, 4)
    same = kept.clone()
    got = compiled(causal_conv1d_update)(u[..., 0], kept, weight, None, "silu")
    assert torch.equal(got, causal_conv1d_update(u[..., 0], same, weight, None, "silu"))
    assert torch.equal(kept, same)
