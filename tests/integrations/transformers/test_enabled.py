"""Transformers' models give the same on our operators as on their own: logits, losses, gradients, generated tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from longscan.integrations.transformers import enable
from tests.integrations.transformers.theirs import FAMILIES, cache_name, call, make, tokens

pytest.importorskip("transformers")

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def _train(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients}


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family: str) -> None:
    model, ids = make(family), tokens(2, 9)
    plain = _train(model, input_ids=ids, labels=ids)
    with enable():
        ours = _train(model, input_ids=ids, labels=ids)
    torch.testing.assert_close(ours, plain, **EXACT)
    assert len(ours) > 10


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bias": True, "use_conv_bias": False},
        {"conv_kernel": 2, "expand": 3, "time_step_rank": 5},
        {"residual_in_fp32": False, "tie_word_embeddings": False},
        {"hidden_act": "gelu"},
    ],
    ids=["biases", "sizes", "untied", "other activation"],
)
def test_options(changes: dict[str, Any]) -> None:
    model, ids = make("mamba", **changes), tokens(2, 7)
    plain = _train(model, input_ids=ids, labels=ids)
    generated = model.eval().generate(ids, max_new_tokens=4, do_sample=False)
    with enable():
        torch.testing.assert_close(_train(model, input_ids=ids, labels=ids), plain, **EXACT)
        assert torch.equal(model.eval().generate(ids, max_new_tokens=4, do_sample=False), generated)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.8}, {"use_cache": False}],
    ids=["greedy", "beams", "sampling", "no cache"],
)
def test_generation(family: str, options: dict[str, Any]) -> None:
    model, ids = make(family), tokens(2, 5)

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        found: torch.Tensor = model.generate(ids, max_new_tokens=5, **{"do_sample": False, **options})
        return found

    plain = run()
    with enable():
        assert torch.equal(run(), plain)


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_a_static_cache(family: str) -> None:
    model, ids = make(family), tokens(2, 5)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(ids, **options)
    with enable():
        assert torch.equal(model.generate(ids, **options), plain)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padding(family: str) -> None:
    """What they get right stays as it is; Zamba and Jamba see padding in their attention too."""
    model, ids = make(family), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    plain, _ = call(model, ids, attention_mask=mask)
    with enable():
        ours, _ = call(model, ids, attention_mask=mask)
    torch.testing.assert_close(ours[0], plain[0], **EXACT)
    torch.testing.assert_close(ours[1, 3:], plain[1, 3:], **EXACT)


@torch.no_grad()
def test_a_cache_goes_from_one_to_the_other() -> None:
    """Its tensors keep their shapes, their dtypes and their meaning, also those that no one needs."""
    model, ids = make("mamba"), tokens(2, 9)
    _, plain = call(model, ids[:, :5])
    with enable():
        _, ours = call(model, ids[:, :5])
        for mine, theirs in zip(ours.layers, plain.layers, strict=True):
            torch.testing.assert_close(mine.conv_states[0], theirs.conv_states[0], **EXACT)
            torch.testing.assert_close(mine.recurrent_states[0], theirs.recurrent_states[0], **EXACT)
    for place in range(5, 9):
        one = ids[:, place : place + 1]
        # Each is continued by the other.
        with enable():
            first, plain = call(model, one, plain)
        second, ours = call(model, one, ours)
        torch.testing.assert_close(first, second, **EXACT)
    for mine, theirs in zip(ours.layers, plain.layers, strict=True):
        torch.testing.assert_close(mine.conv_states[0], theirs.conv_states[0], **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_half_precision(family: str) -> None:
    """As near to the exact model as their own code is."""
    model, ids = make(family), tokens(2, 12)
    exact, _ = call(model, ids)
    model.to(torch.bfloat16)
    plain, _ = call(model, ids)
    with enable():
        ours, _ = call(model, ids)
    assert ours.dtype == plain.dtype
    assert (ours - exact).norm() <= 1.5 * (plain - exact).norm()


@torch.no_grad()
def test_autocast() -> None:
    model, ids = make("mamba"), tokens(2, 6)
    with enable():
        exact, _ = call(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            half, _ = call(model, ids)
    assert 0 < (half - exact).norm() < 0.05 * exact.norm()


def test_gradient_checkpointing() -> None:
    model, ids = make("mamba"), tokens(2, 6)
    with enable():
        plain = _train(model, input_ids=ids, labels=ids)
        model.gradient_checkpointing_enable()
        torch.testing.assert_close(_train(model, input_ids=ids, labels=ids), plain, **EXACT)


def test_gradients_through_a_cache() -> None:
    """The cache is overwritten in place, but what a backward pass needs is not."""
    model, ids = make("mamba"), tokens(1, 6)
    with enable():
        whole, _ = call(model, ids)
        whole.square().sum().backward()
        expected = model.backbone.layers[0].mixer.A_log.grad.clone()
        model.zero_grad()
        first, cache = call(model, ids[:, :3])
        second, cache = call(model, ids[:, 3:4], cache)
        third, _ = call(model, ids[:, 4:], cache)
        torch.cat([first, second, third], 1).square().sum().backward()
    torch.testing.assert_close(model.backbone.layers[0].mixer.A_log.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.compile
@torch.no_grad()
def test_compiles_whole() -> None:
    """A pass and a token, each in one graph."""
    model, ids = make("mamba", num_hidden_layers=1), tokens(2, 6)
    with enable():
        plain, cache = call(model, ids[:, :5])
        last, _ = call(model, ids[:, 5:], copy.deepcopy(cache))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids[:, :5], use_cache=False).logits, plain, **EXACT)
        found = compiled(ids[:, 5:], **{cache_name(model): cache}, use_cache=True).logits
    torch.testing.assert_close(found, last, **EXACT)
