"""A token of MambaForCausalLM is one compiled call on the CPU, and sees what changes between two tokens."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from longscan.integrations.transformers import enable
from longscan.integrations.transformers.watch import Watch
from longscan.ops.mamba_step import MambaDecoder
from tests.integrations.transformers.theirs import call, make, tokens

pytest.importorskip("transformers")

EXACT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per compiled call: its batch."""
    found: list[int] = []
    step = MambaDecoder.step

    def counted(self: MambaDecoder, tokens: torch.Tensor, states: Any) -> torch.Tensor:
        found.append(len(tokens))
        return step(self, tokens, states)

    monkeypatch.setattr(MambaDecoder, "step", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "use_bias": True, "conv_kernel": 2}])
def test_every_token_but_the_prompt_is_a_compiled_call(dtype: torch.dtype, changes: Any, steps: list[int]) -> None:
    model, ids = make("mamba", **changes), tokens(2, 5)
    model.to(dtype)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert steps == []
    with enable():
        ours = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert steps == [2] * 5
    if dtype == torch.float32:
        assert torch.equal(ours, plain)


def test_beams_are_reordered(steps: list[int]) -> None:
    model, ids = make("mamba"), tokens(2, 4)
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 3, "do_sample": False}
    plain = model.generate(ids, **options)
    with enable():
        assert torch.equal(model.generate(ids, **options), plain)
    assert steps == [8] * 7


def _in_place(model: Any) -> None:
    model.backbone.layers[0].mixer.A_log.add_(0.5)
    model.backbone.layers[1].mixer.in_proj.weight.mul_(1.5)


def _behind_the_counter(model: Any) -> None:
    """What is written through `.data` leaves a parameter's count of changes as it was."""
    model.backbone.layers[1].mixer.D.data.copy_(torch.full_like(model.backbone.layers[1].mixer.D, 3.0))
    model.backbone.norm_f.weight.data.mul_(2)


def _other_memory(model: Any) -> None:
    for name in ("in_proj", "out_proj"):
        layer = getattr(model.backbone.layers[0].mixer, name)
        layer.weight.data = 1.5 * layer.weight.data


def _new_parameter(model: Any) -> None:
    model.backbone.layers[2].mixer.dt_proj.bias = nn.Parameter(model.backbone.layers[2].mixer.dt_proj.bias + 1)


def _training_step(model: Any) -> None:
    with torch.enable_grad():
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        model(tokens(2, 5), labels=tokens(2, 5), use_cache=False).loss.backward()
        optimiser.step()


def _hook(model: Any) -> None:
    model.backbone.layers[0].mixer.x_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def _other_layer(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    mixer = model.backbone.layers[0].mixer
    mixer.out_proj.__class__ = Doubled


def _own_forward(model: Any) -> None:
    norm = model.backbone.layers[1].norm
    norm.forward = lambda x: 3 * type(norm).forward(norm, x)


CHANGES = [
    _in_place, _behind_the_counter, _other_memory, _new_parameter, _training_step, _hook, _other_layer, _own_forward,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@torch.no_grad()
def test_changes_between_two_tokens_are_seen(change: Callable[[Any], None], steps: list[int]) -> None:
    """The cache goes on; what is changed back is seen too."""
    model, ids = make("mamba"), tokens(2, 6)
    _, prompt = call(model, ids[:, :3])
    changed = copy.deepcopy(model)
    change(changed)
    caches = [copy.deepcopy(prompt) for _ in range(2)]
    plain = [call(model, ids[:, 3:4], caches[0])[0], call(changed, ids[:, 4:5], caches[0])[0]]
    assert (call(model, ids[:, 4:5], copy.deepcopy(caches[0]))[0] - plain[1]).abs().max() > 1e-3
    with enable():
        first, _ = call(model, ids[:, 3:4], caches[1])
        assert steps == [2]
        change(model)
        second, _ = call(model, ids[:, 4:5], caches[1])
    torch.testing.assert_close([first, second], plain, **EXACT)


@torch.no_grad()
def test_what_it_leaves_to_the_general_road(steps: list[int]) -> None:
    model, ids = make("mamba"), tokens(1, 4)
    with enable():
        _, cache = call(model, ids)
        one = ids[:, :1]

        def again(model: Any = model, **options: Any) -> Any:
            return call(model, one, copy.deepcopy(cache), **options)

        logits, _ = again()
        assert len(steps) == 1
        for options in ({"output_hidden_states": True}, {"labels": one}, {"return_dict": True, "logits_to_keep": 2}):
            torch.testing.assert_close(again(**options)[0], logits, **EXACT)
        with torch.enable_grad():
            torch.testing.assert_close(again()[0], logits, **EXACT)
        with torch.autocast("cpu", torch.bfloat16):
            again()
        torch.testing.assert_close(again(attention_mask=torch.ones(1, 5))[0], logits, **EXACT)
        assert len(steps) == 2
        other = make("mamba", hidden_act="gelu")
        _, cache = call(other, ids)
        again(other)
        wide = copy.deepcopy(model).double()
        _, cache = call(wide, ids)
        torch.testing.assert_close(again(wide)[0].float(), logits, **EXACT)
    assert len(steps) == 2


@torch.no_grad()
def test_a_token_out_of_range_is_an_error_and_the_cache_stays(steps: list[int]) -> None:
    model, ids = make("mamba"), tokens(1, 4)
    with enable():
        _, cache = call(model, ids)
        with pytest.raises(IndexError):
            call(model, torch.tensor([[99]]), cache)
        torch.testing.assert_close(
            call(model, ids[:, :1], cache)[0], call(model, torch.cat([ids, ids[:, :1]], 1))[0][:, -1:]
        )


@torch.no_grad()
def test_models_and_caches_are_not_kept_alive() -> None:
    model, ids = make("mamba"), tokens(1, 4)
    with enable():
        _, cache = call(model, ids)
        call(model, ids[:, :1], cache)
    gone = [weakref.ref(model), weakref.ref(model.backbone.layers[0].mixer.A_log), weakref.ref(cache)]
    del model, cache
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_a_watch_without_contents_sees_adapters_all_the_same() -> None:
    model = make("mamba")
    watch = Watch(model, contents=False)
    model.backbone.norm_f.weight.data.mul_(2)
    assert watch.holds()
    handle = model.backbone.norm_f.register_forward_pre_hook(lambda module, inputs: None)
    assert not watch.holds()
    handle.remove()
    assert watch.holds()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    assert not watch.holds()
    handle.remove()
    assert watch.holds()
