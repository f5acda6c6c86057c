from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longscan.bench import Settings, throughput
from longscan.bench.models import make_model, make_transformer, random_tokens
from longscan.bench.peers import mamba_ssm
from longscan.mixers.attention import AttentionState
from longscan.models import LanguageModel
from longscan.nn.state import ModelState


def test_both_figures_of_every_batch() -> None:
    shapes = ((2, 64, 50, 1, 6, 4), (2, 64, 50, 3, 6, 4))
    report = throughput.run(Settings(shapes=shapes, repeats=1))
    assert report.failed == []
    assert len(report.groups()) == 4
    points = [row for row in report.rows if row.kind != "floor"]
    assert [(row.contender, row.place) for row in points[:4]] == [
        ("longscan", 1),
        ("transformer++", 1),
        ("longscan", 3),
        ("transformer++", 3),
    ]
    for row in points:
        assert row.value is not None, row.note
        assert row.timing is not None
        assert row.place is not None
        assert row.value == pytest.approx(row.place * 4 / row.timing.median)
        assert (row.bandwidth is None) == (row.of_floor is None) == row.series.startswith("prompt")
    first, whole = (next(row for row in points if row.series.startswith(name)) for name in ("generation", "prompt"))
    assert first.value is not None
    assert whole.value is not None
    assert first.value > whole.value


def test_a_cache_is_read_and_a_state_is_written_too() -> None:
    mamba = make_model(2, 64, 50, torch.float32, "cpu", 0)
    attention = make_transformer(2, 64, 50, torch.float32, "cpu", 0)
    weights = [4 * model.num_parameters() for model in (mamba, attention)]
    # Keys and values of 11 tokens on average, and how many they are.
    assert throughput._moved(mamba, (3, 10, 2)) == 2 * (weights[0] + 2 * mamba.state_bytes(3))
    assert throughput._moved(attention, (3, 10, 2)) == 2 * (weights[1] + 3 * (11 * 2 * 64 * 4 + 8))


def test_wrong_scores_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "relative_error", lambda output, truth: 0.5)
    report = throughput.run(Settings(shapes=((1, 64, 50, 1, 3, 2),), peers=(), repeats=1))
    assert len(report.failed) == 2
    assert "differs from the definition's" in report.failed[0].note


def test_no_room_at_one_batch_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = throughput.OurGenerator.prefill

    def limited(self: throughput.OurGenerator, tokens: Tensor) -> Tensor:
        if tokens.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, tokens)

    monkeypatch.setattr(throughput.OurGenerator, "prefill", limited)
    shapes = ((1, 64, 50, 1, 3, 2), (1, 64, 50, 4, 3, 2))
    report = throughput.run(Settings(shapes=shapes, peers=(), repeats=1))
    assert [row.note for row in report.rows if row.kind == "ours"] == ["", "out of memory", "", "out of memory"]


@pytest.mark.parametrize("make", [make_model, make_transformer])
def test_prompts_in_parts_are_prompts_at_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model: LanguageModel = make(2, 64, 50, torch.float32, "cpu", 0)
    tokens = random_tokens(5 * 9, 50, seed=1).view(5, 9)
    monkeypatch.setattr(throughput, "_PREFILL", 14)  # two sequences of seven tokens
    generator = throughput.OurGenerator(model, 5, 9)
    with torch.no_grad():
        found = [generator.prefill(tokens[:, :7]), *(generator.step(tokens[:, t]).clone() for t in (7, 8))]
        truth = model(tokens)[0]
        again = generator.prefill(tokens[:, :7])
    for place, logits in enumerate(found):
        torch.testing.assert_close(logits, truth[:, 6 + place], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, found[0])
    assert isinstance(generator._state, ModelState)
    for state in generator._state.layers:
        if isinstance(state, AttentionState):
            assert (state.keys.shape[2], state.used) == (9, 7)


# mamba-ssm runs on GPUs only. This stands in for what its Decoder calls, with its signatures and its habits: states of
# fixed places, written in place, and tensors made in inference mode.
@dataclasses.dataclass
class InferenceParams:
    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    key_value_memory_dict: dict[int, Any] = dataclasses.field(default_factory=dict)

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0


class Peer(nn.Module):
    """Scores that tell the sum of the tokens so far, and how many they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, tokens: Tensor, inference_params: InferenceParams, num_last_tokens: int, **_: Any) -> Any:
        total, count = inference_params.key_value_memory_dict[0]
        if inference_params.seqlen_offset == 0:  # a prompt does not look at what was there
            total.zero_()
            count.zero_()
        total += tokens.sum(1, keepdim=True)
        count += tokens.shape[1]
        return types.SimpleNamespace(logits=torch.cat([total, count], 1)[:, None] * self.weight)


@torch.inference_mode()
def update_graph_cache(model: nn.Module, cache: None, batch: int, seqlen_og: int, max_seqlen: int) -> Any:
    params = InferenceParams(max_seqlen, batch, seqlen_og, {0: (torch.ones(batch, 1), torch.ones(batch, 1))})
    held = torch.zeros(batch, 1, dtype=torch.long)

    def run(tokens: Tensor, positions: Tensor, offset: int) -> Tensor:
        held.copy_(tokens)
        params.seqlen_offset, before = 1, params.seqlen_offset  # what was captured is a step
        logits = model(held, inference_params=params, num_last_tokens=1).logits.clone()
        params.seqlen_offset = before
        return logits

    params.seqlen_offset = 0
    return types.SimpleNamespace(inference_params=params, run=run)


def test_decoder_of_mamba_ssm_takes_prompts_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("mamba_ssm.utils.generation")
    module.InferenceParams, module.update_graph_cache = InferenceParams, update_graph_cache  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mamba_ssm.utils.generation", module)
    decoder = mamba_ssm.Decoder(Peer(), 3, 8)
    tokens = torch.arange(15).view(3, 5)
    with torch.no_grad():
        for _ in range(2):
            decoder.reset()
            for column in tokens.unbind(1):
                logits = decoder.step(column)
            assert throughput.relative_error(logits, torch.stack([tokens.sum(1), torch.full((3,), 5)], 1)) == 0
            # In parts of two sequences, then on from there.
            logits = decoder.prefill(tokens[:, :3], rows=2)
            assert logits[:, 1].tolist() == [3, 3, 3]
            logits = decoder.step(tokens[:, 3])
            assert logits[:, 0].tolist() == tokens[:, :4].sum(1).tolist()
            assert logits.argmax(-1).shape == (3,)
