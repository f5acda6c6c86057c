"""Every mixer on a GPU gives what it gives on the CPU: whole, cut, token by token, packed, and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.mixers.systems import D_MODEL, VARIANTS, make

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("variant", VARIANTS)]


def inputs(length: int) -> torch.Tensor:
    return torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(0))


def test_it_is_what_it_is_on_the_cpu(variant: str) -> None:
    exact, mixer = make(variant), make(variant, dtype=torch.float32).cuda()
    mixer.load_state_dict(exact.state_dict())
    x = inputs(70)
    wide, given = x.double().requires_grad_(), x.cuda().requires_grad_()
    expected, y = exact(wide)[0], mixer(given)[0]
    torch.testing.assert_close(y.cpu().double(), expected, rtol=5e-3, atol=5e-3)
    expected.square().mean().backward()
    y.square().mean().backward()
    torch.testing.assert_close(given.grad.cpu().double(), wide.grad, rtol=5e-2, atol=1e-3)
    for name, parameter in exact.named_parameters():
        found = mixer.get_parameter(name).grad.cpu().double()
        assert (found - parameter.grad).abs().max() <= 2e-2 * parameter.grad.abs().max() + 1e-3, name


@torch.no_grad()
def test_cut_stepped_and_packed(variant: str) -> None:
    mixer = make(variant, dtype=torch.float32).cuda()
    x = inputs(12).cuda()
    whole, _ = mixer(x)
    start, state = mixer(x[:, :5], mixer.initial_state(2))
    outputs = [start]
    for t in range(5, 12):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=5e-3, atol=5e-3)
    offsets = torch.tensor([0, 4, 5, 12], device="cuda")
    packed, _ = mixer(x[:1], cu_seqlens=offsets)
    alone = [mixer(x[:1, start:end])[0] for start, end in itertools.pairwise(offsets.tolist())]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=5e-3, atol=5e-3)
    half = mixer.bfloat16()
    torch.testing.assert_close(half(x.bfloat16())[0].float(), whole, rtol=0.1, atol=0.1)
