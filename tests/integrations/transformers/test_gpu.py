"""Transformers' models and ours, on a GPU: as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

from longscan.integrations.transformers import enable
from tests.integrations.transformers.theirs import FAMILIES, call, make, tokens
from tests.models import small

pytest.importorskip("transformers")
hf = pytest.importorskip("longscan.integrations.transformers")
pytestmark = pytest.mark.gpu

CLOSE = {"rtol": 2e-3, "atol": 2e-3}


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family: str) -> None:
    model, ids = make(family), tokens(2, 70)
    twin = copy.deepcopy(model).cuda()
    with enable():
        expected = model(ids, labels=ids, use_cache=False).loss
        loss = twin(ids.cuda(), labels=ids.cuda(), use_cache=False).loss
    expected.backward(), loss.backward()
    torch.testing.assert_close(loss.cpu(), expected, **CLOSE)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad.cpu(), theirs.grad, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prompts_chunks_and_padding(family: str) -> None:
    model, ids = make(family).cuda(), tokens(2, 40).cuda()
    plain, _ = call(model, ids)
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    with enable():
        whole, _ = call(model, ids)
        first, cache = call(model, ids[:, :17])
        second, cache = call(model, ids[:, 17:39], cache)
        last, _ = call(model, ids[:, 39:], cache)
        padded, _ = call(model, ids, attention_mask=mask)
        short, _ = call(model, ids[1:, :25])
    torch.testing.assert_close(whole, plain, **CLOSE)
    torch.testing.assert_close(torch.cat([first, second, last], 1), plain, **CLOSE)
    torch.testing.assert_close(padded[0], plain[0], **CLOSE)
    torch.testing.assert_close(padded[1:, :25], short, **CLOSE)
    torch.testing.assert_close(padded[1, -1], short[0, -1], **CLOSE)


@pytest.mark.parametrize("kind", small.KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_our_generation(kind: str, side: str) -> None:
    model = small.make(kind).eval()
    theirs = hf.LongscanForCausalLM.from_longscan(model).cuda()
    row, mask = ([0, 0, 6, 7], [0, 0, 1, 1]) if side == "left" else ([6, 7, 0, 0], [1, 1, 0, 0])
    ids, masks = torch.tensor([[1, 2, 3, 4], row]).cuda(), torch.tensor([[1] * 4, mask]).cuda()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = theirs.generate(ids, attention_mask=masks, **options)[:, 4:].tolist()
    assert found == theirs.to_longscan().generate([[1, 2, 3, 4], [6, 7]], 6, temperature=0).tokens
