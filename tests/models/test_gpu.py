"""The model on a GPU gives the numbers it gives on the CPU: loss, gradients, packed rows, generation, autocast."""

from __future__ import annotations

import pytest
import torch

from tests.models.small import KINDS, VOCABULARY, make

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("kind", KINDS)]


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def test_loss_and_gradients(kind: str) -> None:
    x = tokens(3, 33)
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        model = make(kind).to(device)
        loss = model.loss(x[:, :-1].to(device), x[:, 1:].to(device))
        loss.backward()
        losses.append(loss.detach().cpu())
        gradients.append([parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 0.01 * one.norm() + 1e-4


def test_packed_rows_and_states(kind: str) -> None:
    model, x = make(kind).cuda(), tokens(1, 20).cuda()
    offsets = torch.tensor([0, 7, 7, 20], device="cuda")
    packed, state = model(x, model.initial_state(3), cu_seqlens=offsets)
    torch.testing.assert_close(packed[:, :7], model(x[:, :7])[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(packed[:, 7:], model(x[:, 7:])[0], rtol=1e-2, atol=1e-2)
    assert all(tensor.is_cuda for tensor in state.tensors())


def test_generation_is_that_of_the_cpu(kind: str) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    expected = make(kind).generate(prompts, 8, temperature=0)
    model = make(kind).cuda()
    out = model.generate(prompts, 8, temperature=0, repetition_penalty=1.0)
    assert out.tokens == expected.tokens
    more = model.generate(out.pending, 4, seed=0, top_p=0.9, repetition_penalty=1.2, state=out.state)
    assert [len(row) for row in more.tokens] == [4, 4, 4]


def test_autocast_and_bfloat16_weights(kind: str) -> None:
    x = tokens(2, 16)
    expected = make(kind)(x)[0]
    model = make(kind).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        logits, _ = model(x.cuda())
        model.loss(x.cuda(), x.cuda()).backward()
    torch.testing.assert_close(logits.float().cpu(), expected, rtol=0.1, atol=0.3)
    logits, _ = model.to(torch.bfloat16)(x.cuda())
    torch.testing.assert_close(logits.float().cpu(), expected, rtol=0.1, atol=0.3)


@pytest.mark.compile
def test_compiled(kind: str) -> None:
    model, x = make(kind).cuda(), tokens(2, 16).cuda()
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True)(x)[0].square().mean()
    loss.backward()
    torch.testing.assert_close(loss, model(x)[0].square().mean(), rtol=1e-2, atol=1e-2)
