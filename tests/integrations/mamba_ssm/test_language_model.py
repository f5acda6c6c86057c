"""MambaLMHeadModel: logits, cache, generation with its callers' arguments, checkpoints of every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longscan import LanguageModel
from longscan.errors import ArgumentError, CheckpointError, ConfigError
from longscan.integrations.mamba_ssm import language_model
from longscan.integrations.mamba_ssm.checkpoints import load_config_hf, load_state_dict_hf
from longscan.integrations.mamba_ssm.generation import InferenceParams, decode, sample
from longscan.integrations.mamba_ssm.language_model import (
    MambaConfig,
    MambaLMHeadModel,
    MixerModel,
    _init_weights,
    create_block,
)
from tests.models.small import make as make_ours

VOCABULARY = 29


def make(dtype: torch.dtype | None = None, **changes: Any) -> MambaLMHeadModel:
    torch.manual_seed(0)
    return MambaLMHeadModel(
        MambaConfig(**{"d_model": 16, "n_layer": 3, "vocab_size": VOCABULARY, **changes}), None, None, dtype
    )


def tokens(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"d_intermediate": 100}, {"tie_embeddings": False, "residual_in_fp32": False, "ssm_cfg": {"d_state": 4}}],
)
def test_logits_are_those_of_our_model(changes: dict[str, Any], tmp_path: Path) -> None:
    model = make(**changes)
    model.save_pretrained(tmp_path)
    ours = LanguageModel.from_pretrained(tmp_path)
    logits = model(tokens()).logits
    assert logits.shape == (2, 6, 32)
    torch.testing.assert_close(logits[..., :VOCABULARY], ours(tokens())[0])
    torch.testing.assert_close(model(tokens(), num_last_tokens=2).logits, logits[:, -2:])


@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize("d_intermediate", [0, 100])
def test_fused_or_not_the_model_is_the_same(rms_norm: bool, d_intermediate: int) -> None:
    changes = {"rms_norm": rms_norm, "d_intermediate": d_intermediate}
    torch.testing.assert_close(
        make(fused_add_norm=True, **changes)(tokens()).logits, make(fused_add_norm=False, **changes)(tokens()).logits
    )


def test_the_cache_carries_the_prompt() -> None:
    model = make()
    whole = model(tokens()).logits
    cache = InferenceParams(6, 2, key_value_memory_dict=model.allocate_inference_cache(2, 6))
    parts = []
    with torch.no_grad():
        for start, end in ((0, 2), (2, 5), (5, 6)):
            parts.append(model(tokens()[:, start:end], inference_params=cache).logits)
            cache.seqlen_offset = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_a_model_starts_as_released_ones_do() -> None:
    model = make(d_model=64, n_layer=4)
    assert abs(model.backbone.embedding.weight.std() - 0.02) < 2e-3
    first = model.backbone.layers[0].mixer
    bound = (1 / 128) ** 0.5 / 4**0.5
    assert bound * 0.95 < first.out_proj.weight.abs().max() <= bound
    assert first.dt_proj.bias.any()
    assert model.lm_head.weight is model.backbone.embedding.weight
    linear = nn.Linear(4, 4)
    _init_weights(linear, n_layer=1)
    assert not linear.bias.any()
    assert isinstance(MixerModel(8, 1, 0, 10)(torch.tensor([[1, 2]])), Tensor)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "got layer 'Mamba2'; longscan has a stand-in for 'Mamba1' only"),
        ({"attn_layer_idx": [0], "layer_idx": 0}, "no stand-in for mamba_ssm's MHA"),
    ],
)
def test_layers_that_are_not_there(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        create_block(8, 0, **options)
    assert create_block(8, 0, ssm_cfg={"layer": "Mamba1"}, layer_idx=2).layer_idx == 2


# Generation


def module_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "compiled_step", lambda model, cache: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, {"ssm_cfg": {"bias": True, "conv_bias": False, "d_conv": 3}}, {"d_intermediate": 8},
     {"rms_norm": False}],
)  # fmt: skip
def test_the_compiled_step_gives_the_modules_scores(
    changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(dtype, **changes)
    taught = tokens(2, 11)
    given: dict[str, Any] = {"teacher_outputs": taught, "output_scores": True, "return_dict_in_generate": True}
    fast = model.generate(tokens(2, 4), 12, **given)
    module_by_module(monkeypatch)
    slow = model.generate(tokens(2, 4), 12, **given)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert len(fast.scores) == 8
    for got, expected in zip(fast.scores, slow.scores, strict=True):
        assert got.dtype == expected.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(fast.sequences[:, 4:11], taught[:, 4:])


def test_what_would_be_passed_over_is_called_itself() -> None:
    """Hooks, and layers that somebody has replaced."""
    model = make()
    calls = []
    handle = model.backbone.layers[1].mixer.register_forward_hook(lambda *_: calls.append(1))
    expected = model.generate(tokens(), 10)
    assert len(calls) == 4
    handle.remove()
    assert torch.equal(model.generate(tokens(), 10), expected)
    assert len(calls) == 4

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubled = Doubled(32, 16, bias=False)
    doubled.weight = model.backbone.layers[0].mixer.out_proj.weight
    model.backbone.layers[0].mixer.out_proj = doubled
    cache = InferenceParams(10, 2)
    with torch.no_grad():
        model(tokens(), inference_params=cache)
    assert model.decoding_step(cache) is None


@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_generation_is_one_forward_after_another(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        module_by_module(monkeypatch)
    model, current = make(), tokens()
    for _ in range(5):
        logits = model(current).logits[:, -1, :VOCABULARY]
        current = torch.cat([current, logits.argmax(-1, keepdim=True)], dim=1)
    out = model.generate(tokens(), 11, vocab_size=VOCABULARY, cg=True, enable_timing=True)
    assert torch.equal(out, current)


def test_lengths_ends_and_streams() -> None:
    model = make()
    assert model.generate(tokens(), 3).shape == (2, 7), "at least one token, as in the original"
    row = tokens(1)
    whole = model.generate(row, 16)[0]
    end = int(whole[9])
    first = 6 + whole[6:].tolist().index(end)
    assert model.generate(row, 16, eos_token_id=end).tolist()[0] == whole[: first + 1].tolist()

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, values: Tensor) -> None:
            self.seen += values.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    out = model.generate(row, 12, streamer=streamer)
    assert streamer.seen == out.flatten().tolist()
    assert streamer.ended


def test_the_form_of_the_output() -> None:
    model = make()
    assert isinstance(model.generate(tokens(), 8), Tensor)
    out = model.generate(tokens(), 8, return_dict_in_generate=True)
    assert out.scores is None
    assert torch.equal(out["sequences"], out.sequences)
    with pytest.raises(KeyError):
        out["logits"]
    scored = decode(tokens(), model, 8, output_scores=True)
    torch.testing.assert_close(scored.scores[0], model(tokens()).logits[:, -1])


def test_a_model_is_told_where_its_tokens_are() -> None:
    """Of a prompt nothing is said; one of somebody else's that has positions needs it afterwards."""
    told: list[Any] = []

    def model(current: Tensor, position_ids: Tensor | None, inference_params: Any, num_last_tokens: int) -> Any:
        told.append(None if position_ids is None else position_ids.tolist())
        return language_model.CausalLMOutput(torch.zeros(2, 1, 4))

    decode(tokens(2, 3), model, 6)
    assert told == [None, [[3], [3]], [[4], [4]]]


def test_repeated_tokens_are_penalised() -> None:
    def model(current: Tensor, position_ids: Tensor | None, inference_params: Any, num_last_tokens: int) -> Any:
        scores = torch.tensor([3.0, 2.5, -1.0, -1.2]).expand(1, 1, 4)
        return language_model.CausalLMOutput(scores)

    prompt = torch.tensor([[2]])
    assert decode(prompt, model, 5).sequences.tolist() == [[2, 0, 0, 0, 0]]
    # 3 becomes 1.5, then 2.5 becomes 1.25, then what was seen is compared with -1.2.
    assert decode(prompt, model, 4, repetition_penalty=2.0).sequences.tolist() == [[2, 0, 1, 0]]
    assert decode(prompt, model, 3, vocab_size=1).sequences.tolist() == [[2, 0, 0]]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 0}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9, "top_p": 0.6}, [0, 1]),
        ({"top_k": 0, "top_p": 0.4}, [0]),
        ({"top_k": 0, "top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 0, "min_p": 0.3}, [0, 1, 2]),
        ({"top_k": 0, "min_p": 0.3, "temperature": 0.5}, [0, 1, 2]),
        ({"top_k": 1, "temperature": 9.0}, [0]),
    ],
)
def test_sampling_follows_its_distribution(options: dict[str, Any], kept: list[int]) -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.25, 0.2, 0.05])
    counts = sample(probabilities.log().expand(4000, 4), **options).bincount(minlength=4) / 4000
    expected = torch.zeros(4)
    expected[kept] = probabilities[kept] ** (1 / options.get("temperature", 1.0))
    torch.testing.assert_close(counts, expected / expected.sum(), rtol=0, atol=0.04)


def test_a_top_p_above_one() -> None:
    with pytest.raises(ArgumentError, match="top_p"):
        sample(torch.zeros(1, 4), top_k=0, top_p=1.5)


# Checkpoints


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    model = make(d_intermediate=100, ssm_cfg={"d_state": 4})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ssm_cfg"] == {"d_state": 4}
    again = MambaLMHeadModel.from_pretrained(tmp_path, initializer_cfg={"initializer_range": 0.1})
    assert again.config == model.config
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    half = MambaLMHeadModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert half.lm_head.weight is half.backbone.embedding.weight
    assert half.lm_head.weight.dtype == torch.bfloat16
    # What stays float32 there is not rounded on its way.
    assert torch.equal(half.backbone.layers[0].mixer.A_log, model.backbone.layers[0].mixer.A_log)
    assert {t.dtype for t in load_state_dict_hf(tmp_path, dtype=torch.float16).values()} == {torch.float16}


@pytest.mark.parametrize("kind", ["longscan", "mamba-ssm", "transformers"])
def test_models_of_every_format(kind: str, tmp_path: Path) -> None:
    ours = make_ours()
    ours.save_pretrained(tmp_path, format=kind)
    model = MambaLMHeadModel.from_pretrained(tmp_path)
    row = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(model(row).logits[..., : ours.config.vocab_size], ours(row)[0])
    assert load_config_hf(tmp_path)["d_model"] == ours.config.d_model


def test_models_that_it_cannot_be(tmp_path: Path) -> None:
    make_ours(mixer="s4d").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Mamba layers only"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        MambaLMHeadModel.from_pretrained(tmp_path / "nowhere")
