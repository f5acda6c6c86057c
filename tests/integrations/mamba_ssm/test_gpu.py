"""The same numbers on a GPU as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.integrations.mamba_ssm.conv import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from longscan.integrations.mamba_ssm.language_model import MambaConfig, MambaLMHeadModel
from longscan.integrations.mamba_ssm.scan import mamba_inner_fn, selective_scan_fn
from longscan.integrations.mamba_ssm.step import selective_state_update
from longscan.models.decoding import Graphs
from tests.integrations.mamba_ssm import formulas
from tests.integrations.mamba_ssm.test_scan import arguments, inner_arguments

pytestmark = pytest.mark.gpu


def there(value: Any) -> Any:
    return value.detach().cuda().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def compare(function: Any, given: list[Any]) -> None:
    """Output and the gradients of all inputs."""
    here = formulas.leaves(given)
    away = [there(value) for value in here]
    expected, got = function(*here), function(*away)
    formulas.close(got.cpu(), expected, 1e-3)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (got * weights.cuda()).sum().backward()
    for one, other in zip(away, here, strict=True):
        if isinstance(other, Tensor):
            formulas.close(one.grad.cpu(), other.grad, 1e-3)


@pytest.mark.parametrize("is_complex", [False, True])
def test_scans(is_complex: bool) -> None:
    compare(lambda *tensors: selective_scan_fn(*tensors, delta_softplus=True), arguments(2, 2, is_complex))
    block = inner_arguments(is_complex)
    compare(lambda *tensors: mamba_inner_fn(**dict(zip(block, tensors, strict=True))), list(block.values()))


def test_convolutions() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 6).transpose(1, 2), torch.randn(6, 4)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [-1] * 2 + [3] * 7], dtype=torch.int32)
    compare(lambda x, weight: causal_conv1d_fn(x, weight, activation="silu"), [x, weight])
    compare(lambda x, weight: causal_conv1d_fn(x, weight, seq_idx=seq_idx.to(x.device)), [x, weight])
    offsets = torch.tensor([0, 2, 9], dtype=torch.int32)
    states = causal_conv1d_varlen_states(x[0].T.cuda(), offsets.cuda(), 3)
    assert torch.equal(states.cpu(), causal_conv1d_varlen_states(x[0].T, offsets, 3))


@torch.no_grad()
def test_steps() -> None:
    u, delta, A, B, C, D, z, bias = arguments()
    step = (u[..., 0], delta[..., 0], A, B[..., 0], C[..., 0], D, z[..., 0], bias, True)
    state, kept, weight = torch.randn(5, 6, 3), torch.randn(5, 6, 4), torch.randn(6, 4)
    indices = torch.tensor([3, -1], dtype=torch.int32)
    away = [there(tensor) for tensor in (state, kept)]
    formulas.close(
        selective_state_update(away[0], *map(there, step), state_batch_indices=indices.cuda()).cpu(),
        selective_state_update(state, *step, state_batch_indices=indices),
    )
    formulas.close(
        causal_conv1d_update(there(u[..., 0]), away[1], weight.cuda(), None, "silu", None, indices.cuda()).cpu(),
        causal_conv1d_update(u[..., 0], kept, weight, None, "silu", None, indices),
    )
    for one, other in zip(away, (state, kept), strict=True):
        formulas.close(one.cpu(), other)


@pytest.mark.parametrize("batch", [2, 7])
def test_generation(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens after the prompt are replays of a graph of the compiled step."""
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=32, n_layer=2, vocab_size=40))
    tokens = torch.randint(0, 40, (batch, 7))
    expected = model.generate(tokens, 15)
    steps, step = [], Graphs.step

    def counted(self: Graphs, *args: Any) -> Any:
        steps.append(len(args[0]))
        return step(self, *args)

    monkeypatch.setattr(Graphs, "step", counted)
    assert torch.equal(model.cuda().generate(tokens.cuda(), 15, cg=True).cpu(), expected)
    assert steps == [batch] * 7
