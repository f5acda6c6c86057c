"""Chunks of prompts: captured or not, they are the model's own."""

from __future__ import annotations

import pytest
import torch

from longscan.errors import ArgumentError
from longscan.models import LanguageModel, prefill
from longscan.models.chunks import _kept, copy_states, take_chunk
from tests.models.small import make


def plain(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden, after = model.backbone(tokens, model.initial_state(tokens.shape[0]))
    assert after is not None
    return torch.cat([hidden[:, -1].flatten(), *(tensor.float().flatten() for tensor in after.tensors())])


def chunk(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    before = model.initial_state(tokens.shape[0])
    kept = before.clone()
    hidden, after = take_chunk(model, tokens, before)
    assert all(torch.equal(one, other) for one, other in zip(before.tensors(), kept.tensors(), strict=True))
    return torch.cat([hidden.flatten(), *(tensor.float().flatten() for tensor in after.tensors())])


@torch.no_grad()
def test_on_a_cpu_it_is_the_backbone() -> None:
    model, tokens = make(), torch.randint(0, 13, (2, 9))
    for _ in range(3):
        assert torch.equal(chunk(model, tokens), plain(model, tokens))
    assert model not in _kept


def test_copies_states_of_one_shape_only() -> None:
    model = make()
    state = model.initial_state(2).map(lambda tensor: torch.randn_like(tensor))
    to = model.initial_state(2)
    copy_states(to, state)
    assert all(torch.equal(one, other) for one, other in zip(to.tensors(), state.tensors(), strict=True))
    with pytest.raises(ArgumentError, match="another model or batch size"):
        copy_states(model.initial_state(1), state)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mamba", "complex"])
@torch.no_grad()
def test_a_shape_that_comes_again_is_captured(kind: str) -> None:
    model = make(kind).cuda()
    for length in (9, 30, 9, 9, 30, 9):
        tokens = torch.randint(0, 13, (2, length), device="cuda")
        torch.testing.assert_close(chunk(model, tokens), plain(model, tokens), rtol=1e-4, atol=1e-4)
    assert len(_kept[model]._graphs) == 2
    # Weights that change in place are read anew; others are another model.
    for parameter in model.parameters():
        parameter.mul_(0.9)
    torch.testing.assert_close(chunk(model, tokens), plain(model, tokens), rtol=1e-4, atol=1e-4)
    model.bfloat16()
    for _ in range(3):
        torch.testing.assert_close(chunk(model, tokens), plain(model, tokens), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@torch.no_grad()
def test_a_long_prompt_in_chunks() -> None:
    model = make().cuda()
    prompts = [torch.randint(0, 13, (101,), device="cuda") for _ in range(3)]
    whole, cut = prefill(model, prompts, chunk=1000), prefill(model, prompts, chunk=30)
    torch.testing.assert_close(whole[0], cut[0], rtol=1e-4, atol=1e-4)
    for one, other in zip(whole[1].tensors(), cut[1].tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@torch.no_grad()
def test_a_state_that_grows_is_never_captured() -> None:
    model, tokens = make("mixed").cuda(), torch.randint(0, 13, (2, 9), device="cuda")
    for _ in range(3):
        torch.testing.assert_close(chunk(model, tokens), plain(model, tokens), rtol=1e-4, atol=1e-4)
    assert model not in _kept
