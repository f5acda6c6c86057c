"""Models with int8 weights: how near they stay, that they step and travel through files, and what they refuse."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from longscan.errors import ArgumentError, CheckpointError, ConfigError
from longscan.models import LanguageModel, LanguageModelConfig
from longscan.models.decoding import CompiledStepper, make_stepper
from longscan.nn.int8 import Int8Embedding, Int8Linear
from tests.models.small import KINDS, VOCABULARY, make

TOKENS = torch.tensor([[1, 2, 3, 4, 12, 0, 7], [5, 6, 0, 0, 1, 9, 2]])


def rounded(model: LanguageModel) -> LanguageModel:
    """A float32 model whose weights are what the quantised `model` stands for."""
    plain = LanguageModel(model.config)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith((".values", ".scales"))}
    for name, layer in model.named_modules():
        if isinstance(layer, (Int8Linear, Int8Embedding)):
            own[f"{name}.weight"] = layer.matrix.dense()
    plain.load_state_dict(own)
    return plain.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_computes_with_the_rounded_weights(kind: str) -> None:
    """Whole, with a state, step by step, and as a loss."""
    model = make(kind).eval()
    parameters = model.num_parameters()
    quantized = copy.deepcopy(model).quantize()
    assert quantized.num_parameters() == parameters
    plain = rounded(quantized)
    expected, logits = plain(TOKENS)[0], quantized(TOKENS)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits, model(TOKENS)[0])
    torch.testing.assert_close(quantized.loss(TOKENS, TOKENS), plain.loss(TOKENS, TOKENS), rtol=1e-4, atol=1e-4)
    stepper, state = make_stepper(quantized), quantized.initial_state(2)
    assert isinstance(stepper, CompiledStepper) == (kind == "mamba")
    for t, tokens in enumerate(TOKENS.unbind(1)):
        logits, state = stepper.step(tokens, state)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-4)


def test_every_matrix_is_int8_and_the_rest_float32() -> None:
    model = make().bfloat16().quantize()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert all((dtype == torch.int8) == name.endswith(".values") for name, dtype in dtypes.items())
    assert set(dtypes.values()) == {torch.int8, torch.float32}
    assert not any(type(module) in (nn.Linear, nn.Embedding) for module in model.modules())
    assert model.lm_head.values is model.backbone.embedding.values


def test_the_activations_dtype_changes_and_the_weights_stay() -> None:
    model = make().quantize()
    with torch.no_grad():
        expected = model(TOKENS)[0]
        values = model.lm_head.values.clone()
        half = model.to(torch.bfloat16)(TOKENS)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert torch.equal(model.lm_head.values, values)
    assert model.lm_head.scales.dtype == torch.float32


def test_gradients_pass_through_to_what_is_trained() -> None:
    layer = make().quantize().lm_head
    assert isinstance(layer, Int8Linear)
    x = torch.randn(2, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 16))
    assert layer.values.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_travels_through_files(kind: str, tmp_path: Path) -> None:
    model = make(kind).quantize()
    again = LanguageModel.from_pretrained(model.save_pretrained(tmp_path))
    assert again.quantization == "int8"
    assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])
    assert (again.lm_head.values is again.backbone.embedding.values) == model.config.tie_embeddings
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert not any(parameter.requires_grad for name, parameter in again.named_parameters() if name.endswith("values"))


def test_refuses() -> None:
    with pytest.raises(ArgumentError, match=r'weights must be "int8", got \'int4\''):
        make().quantize("int4")
    with pytest.raises(ArgumentError, match="weights are int8 already"):
        make().quantize().quantize()
    model = make()
    with torch.no_grad():
        model.backbone.embedding.weight[3, 4] = math.nan
    with pytest.raises(ArgumentError, match="not finite"):
        model.quantize()


def test_files_refuse(tmp_path: Path) -> None:
    model = make().quantize()
    for other in ("mamba-ssm", "transformers"):
        with pytest.raises(ConfigError, match=f"format '{other}' has no int8 weights"):
            model.save_pretrained(tmp_path, other)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "quantization": "int3"}))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization: weights must be \"int8\", got 'int3'"):
        LanguageModel.from_pretrained(tmp_path)
    del values["quantization"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"missing: .*unknown: .*\.scales"):
        LanguageModel.from_pretrained(tmp_path)


def test_a_trained_model_s_perplexity_stays() -> None:
    """Within 0.5% of float32, on text it was not trained on."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(statistics.__file__).read_bytes()))
    held_out = text[: 8 * 512 + 1]
    text = text[len(held_out) :]
    model = LanguageModel(LanguageModelConfig(d_model=64, n_layer=2, vocab_size=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        starts = torch.randint(len(text) - 129, (8,)).tolist()
        rows = torch.stack([text[start : start + 129] for start in starts])
        optimizer.zero_grad()
        model.loss(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()

    @torch.no_grad()
    def perplexity() -> float:
        return math.exp(model.loss(held_out[:-1].view(8, 512), held_out[1:].view(8, 512)))

    before = perplexity()
    assert before < 20  # of 256: it has learned
    after = (model.quantize(), perplexity())[1]
    assert after == pytest.approx(before, rel=0.005)
    assert after != before


def test_generation_takes_it() -> None:
    model = make().quantize()
    tokens = model.generate([[1, 2], [3]], 5, temperature=0.0).tokens
    assert all(len(row) == 5 and all(0 <= token < VOCABULARY for token in row) for row in tokens)
