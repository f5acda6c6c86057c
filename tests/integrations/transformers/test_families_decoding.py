"""A token of every family goes through compiled calls on the CPU, with the outputs of Transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from longscan.integrations.transformers import enable, models
from tests.integrations.transformers.theirs import FAMILIES, call, make, tokens

pytest.importorskip("transformers")

EXACT = {"rtol": 1e-4, "atol": 1e-5}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per token that asked for the compiled step: whether it served."""
    found: list[bool] = []
    original = models._compiled_step

    def counted(*args: Any) -> Any:
        logits = original(*args)
        found.append(logits is not None)
        return logits

    monkeypatch.setattr(models, "_compiled_step", counted)
    return found


@FAMILY
@torch.no_grad()
def test_tokens_and_caches(family: str, compiled: list[bool]) -> None:
    """Through the compiled step, back to Transformers' own code with the cache that it left, and on."""
    model, ids = make(family), tokens(3, 9)
    _, cache = call(model, ids[:, :4])
    theirs = [call(model, ids[:, i : i + 1], cache)[0] for i in range(4, 9)]
    ours = []
    with enable():
        _, cache = call(model, ids[:, :4])
        ours += [call(model, ids[:, i : i + 1], cache)[0] for i in (4, 5)]
    assert compiled == [True, True]
    ours.append(call(model, ids[:, 6:7], cache)[0])
    with enable():
        ours += [call(model, ids[:, i : i + 1], cache)[0] for i in (7, 8)]
    assert compiled == [True] * 4
    assert all(one.dtype == other.dtype for one, other in zip(ours, theirs, strict=True))
    torch.testing.assert_close(ours, theirs, **EXACT)


@FAMILY
def test_generation(family: str, compiled: list[bool]) -> None:
    model, ids = make(family), tokens(2, 5)
    for options in ({"max_new_tokens": 6}, {"max_new_tokens": 5, "num_beams": 3}):
        theirs = model.generate(ids, do_sample=False, **options)
        with enable():
            assert torch.equal(model.generate(ids, do_sample=False, **options), theirs)
    assert compiled == [True] * 9


@FAMILY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts(family: str, side: str, compiled: list[bool]) -> None:
    """A row goes on as it would alone; what attention has kept of the padding is masked."""
    model, ids = make(family), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    alone = ids[1:, 3:] if side == "left" else ids[1:, :4]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = [model.generate(row, **options)[0, -5:] for row in (ids[:1], alone)]
    with enable():
        got = model.generate(ids * mask, attention_mask=mask, **options)[:, -5:]
    assert compiled == [True] * 4
    assert torch.equal(got, torch.stack(expected))


@FAMILY
@torch.no_grad()
def test_half_precision(family: str, compiled: list[bool]) -> None:
    """No further from float32 than Transformers itself."""
    model, ids = make(family), tokens(2, 6)
    truth = model(ids, use_cache=False).logits[:, -1]
    half = copy.deepcopy(model).bfloat16()
    _, cache = call(half, ids[:, :5])
    theirs = call(half, ids[:, 5:], cache)[0]
    with enable():
        _, cache = call(half, ids[:, :5])
        ours = call(half, ids[:, 5:], cache)[0]
    assert compiled == [True]
    assert ours.dtype == theirs.dtype
    distances = [float((logits[:, -1].float() - truth).norm() / truth.norm()) for logits in (ours, theirs)]
    assert distances[0] < max(1.5 * distances[1], 0.02)


def _places(model: Any) -> list[str]:
    """Modules of every kind that a token passes, by name: one of each class and place in its layer."""
    found: dict[tuple[str, str], str] = {}
    for name, module in model.named_modules():
        if name and type(module).__name__ not in ("ModuleList", "SiLU", "SiLUActivation", "GELUActivation"):
            found.setdefault((type(module).__name__, name.rpartition(".")[2]), name)
    return list(found.values())


@FAMILY
@torch.no_grad()
def test_hooks_are_called(family: str) -> None:
    """Wherever one hangs, its module is called as often as by Transformers itself, and not read past."""
    model, ids = make(family), tokens(1, 5)
    _, prompt = call(model, ids[:, :4])
    calls: list[str] = []

    def hooked(place: str) -> int:
        calls.clear()
        handle = model.get_submodule(place).register_forward_hook(lambda *_: calls.append(place))
        call(model, ids[:, 4:], copy.deepcopy(prompt))
        handle.remove()
        return len(calls)

    for place in _places(model):
        theirs = hooked(place)
        if place.endswith("conv1d"):
            # Its weights alone are read.
            continue
        with enable((family,)):
            assert hooked(place) >= theirs, place


@FAMILY
@torch.no_grad()
def test_weights_that_change_are_seen(family: str, compiled: list[bool]) -> None:
    """Every parameter, in place and behind the counter of changes."""
    model, ids = make(family), tokens(2, 6)
    _, prompt = call(model, ids[:, :5])
    with enable():
        before = call(model, ids[:, 5:], copy.deepcopy(prompt))[0]
        changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in changed:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        ours = call(model, ids[:, 5:], copy.deepcopy(prompt))[0]
    theirs = call(model, ids[:, 5:], copy.deepcopy(prompt))[0]
    assert compiled == [True, True]
    assert (ours - before).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("family", ["jamba", "zamba"])
@torch.no_grad()
def test_what_hybrids_leave_to_the_general_road(family: str, compiled: list[bool]) -> None:
    from transformers import StaticCache

    model, ids = make(family), tokens(1, 5)
    with enable():
        _, cache = call(model, ids[:, :4])
        model.train()
        call(model, ids[:, 4:], copy.deepcopy(cache))
        model.eval()
        with pytest.raises(IndexError):
            call(model, torch.tensor([[99]]), cache)
        static = StaticCache(config=model.config, max_cache_len=16)
        call(model, ids[:, :4], static)
        torch.testing.assert_close(
            call(model, ids[:, 4:], static)[0], call(model, ids[:, 4:], copy.deepcopy(cache))[0], **EXACT
        )
    assert compiled[0] is False
    assert compiled[-1] is True
