"""The first Transformer: its parts against their formulas, its layers against PyTorch's, the model against GPT-2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError, ConfigError
from longscan.models import Classifier, ClassifierConfig, LanguageModel, LanguageModelConfig
from longscan.models.config import TRANSFORMER
from longscan.models.matching import contestant
from longscan.nn import MLP, AddLayerNorm
from longscan.nn.positions import SinusoidalPositions, places
from tests.models.small import randomise

ATTENTION = {"rotary": False, "bias": True, "n_heads": 4}


@pytest.mark.parametrize("width", [6, 7])
def test_sines(width: int) -> None:
    """Equations of section 3.5, at places far out too; odd widths lack the last cosine."""
    x, at = torch.randn(2, 3, width, dtype=torch.float64), torch.tensor([[0, 1, 70_000], [5, 6, 7]])
    expected = 3 * x
    for place in range(width):
        angles = at.double() / 10_000 ** (2 * (place // 2) / width)
        expected[..., place] += angles.cos() if place % 2 else angles.sin()
    torch.testing.assert_close(SinusoidalPositions(width, scale=3)(x, at), expected)


def test_places() -> None:
    def found(*args: Any) -> list[list[int]]:
        return places(*args).tolist()

    cpu = torch.device("cpu")
    assert found(3, cpu, None, None) == [[0, 1, 2]]
    assert found(3, cpu, torch.tensor([0, 4]), None) == [[0, 1, 2], [4, 5, 6]]
    offsets = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
    assert found(5, cpu, None, offsets) == [[0, 1, 0, 1, 2]]
    assert found(5, cpu, torch.tensor([10, 20, 30, 40]), offsets) == [[10, 11, 30, 31, 32]]


def test_layer_norm_of_a_sum_is_in_float32() -> None:
    norm = AddLayerNorm(6).to(torch.bfloat16)
    randomise(norm)
    x, residual = torch.randn(2, 3, 6).bfloat16(), torch.randn(2, 3, 6)
    normed, total = norm(x, residual)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(total, x.float() + residual)
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed.float(), expected * norm.weight + norm.bias, rtol=0.01, atol=0.01)
    assert torch.equal(norm(x)[1], x.float())


def test_plain_mlp() -> None:
    mlp, x = randomise(MLP(4, 6)), torch.randn(2, 3, 4)
    inner = (x @ mlp.fc1.weight.T + mlp.fc1.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), inner @ mlp.fc2.weight.T + mlp.fc2.bias)


def weights_of(theirs: nn.TransformerEncoder, prenorm: bool) -> dict[str, Tensor]:
    """Of PyTorch's layers under the names of ours, where a post-norm stands at the start of what follows."""
    weights, last = {}, len(theirs.layers) - 1
    for number, layer in enumerate(theirs.layers):
        own = f"layers.{number}."
        first, second = own + "norm.", own + "norm2."
        if not prenorm:
            first, second = second, "norm_f." if number == last else f"layers.{number + 1}.norm."
        given = {
            own + "mixer.in_proj.": layer.self_attn, own + "mixer.out_proj.": layer.self_attn.out_proj,
            own + "mlp.fc1.": layer.linear1, own + "mlp.fc2.": layer.linear2, first: layer.norm1, second: layer.norm2,
        }  # fmt: skip
        for name, module in given.items():
            for part in ("weight", "bias"):
                weights[name + part] = getattr(module, f"in_proj_{part}" if "in_proj" in name else part)
    return weights if not prenorm else {**weights, "norm_f.weight": theirs.norm.weight, "norm_f.bias": theirs.norm.bias}


@pytest.mark.parametrize(
    ("prenorm", "activation"), [(True, "gelu"), (False, "relu")], ids=["pre-norm-gelu", "post-norm-relu"]
)
def test_layers_are_those_of_pytorch(prenorm: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, activation, batch_first=True, norm_first=prenorm)
    norm = nn.LayerNorm(16) if prenorm else None
    theirs = randomise(nn.TransformerEncoder(layer, 3, norm, enable_nested_tensor=False)).double()
    config = LanguageModelConfig(
        16, 3, 11, "attention", ATTENTION, 24, norm="layer", prenorm=prenorm, mlp=activation
    )  # fmt: skip
    ours = LanguageModel(config).double().backbone
    missing, unexpected = ours.load_state_dict(weights_of(theirs, prenorm), strict=False)
    assert (missing, unexpected) == (["embedding.weight"], [])
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    expected = theirs(x, mask=nn.Transformer.generate_square_subsequent_mask(7, dtype=x.dtype), is_causal=True)
    y, _ = ours.mix(x)
    torch.testing.assert_close(y, expected)
    (theirs_grad,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], theirs_grad)


def test_it_is_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=29, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    theirs = randomise(transformers.GPT2LMHeadModel(config))
    given = theirs.state_dict()
    weights = {
        "backbone.embedding.weight": given["transformer.wte.weight"],
        "backbone.positions.weight": given["transformer.wpe.weight"],
        "lm_head.weight": given["lm_head.weight"],
    }
    names = {
        "norm": "ln_1", "mixer.in_proj": "attn.c_attn", "mixer.out_proj": "attn.c_proj", "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    pairs = {f"layers.{i}.{own}": f"h.{i}.{old}" for i in range(2) for own, old in names.items()} | {"norm_f": "ln_f"}
    for own, old in pairs.items():
        for part in ("weight", "bias"):
            # Theirs are (inputs, outputs).
            weights[f"backbone.{own}.{part}"] = given[f"transformer.{old}.{part}"].t()
    ours = LanguageModel(
        LanguageModelConfig.preset(
            "transformer-125m", d_model=32, n_layer=2, vocab_size=29, mixer_options=ATTENTION, d_intermediate=128,
            max_positions=40, pad_vocab_size_multiple=1,
        )
    )  # fmt: skip
    ours.load_state_dict(weights)
    tokens = torch.randint(29, (2, 19))
    expected = theirs(tokens).logits
    logits, _ = ours(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    logits.square().mean().backward()
    expected.square().mean().backward()
    for own, old in (("embedding", "wte"), ("positions", "wpe")):
        torch.testing.assert_close(
            ours.backbone.get_parameter(f"{own}.weight").grad,
            theirs.transformer.get_parameter(f"{old}.weight").grad,
            rtol=1e-3,
            atol=1e-4,
        )
    options = {"attention_mask": torch.ones_like(tokens[:1]), "pad_token_id": 0, "eos_token_id": None}
    generated = theirs.generate(tokens[:1], max_new_tokens=8, do_sample=False, **options)
    assert ours.generate(tokens[0].tolist(), 8, temperature=0).tokens[0] == generated[0, 19:].tolist()


def test_sines_are_added_to_scaled_embeddings() -> None:
    model = LanguageModel(LanguageModelConfig(12, 1, 11, **TRANSFORMER)).double()
    seen: list[Tensor] = []
    model.backbone.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    tokens = torch.randint(11, (2, 5))
    model(tokens)
    angles = torch.arange(5.0).double()[:, None] / 10_000 ** (torch.arange(0, 12, 2) / 12)
    sines = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
    torch.testing.assert_close(seen[0], model.backbone.embedding(tokens) * math.sqrt(12) + sines)


def test_positions_end() -> None:
    config = LanguageModelConfig(8, 1, 11, positions="learned", max_positions=5)
    model, tokens = LanguageModel(config), torch.randint(11, (2, 5))
    _, state = model(tokens, model.initial_state(2))
    assert state.positions.tolist() == [5, 5]
    for late in (lambda: model.step(tokens[:, 0], state), lambda: model(torch.cat((tokens, tokens), dim=1))):
        with pytest.raises(ArgumentError, match="the model has 5 learned positions, and this token is number"):
            late()
    with pytest.raises(ArgumentError, match="of a model with other positions"):
        LanguageModel(LanguageModelConfig(8, 1, 11))(tokens, state)


def test_state_bytes_count_the_positions() -> None:
    model = LanguageModel(LanguageModelConfig(8, 1, 11, positions="sinusoidal"))
    assert model.initial_state(3).nbytes == model.state_bytes(3)
    assert model.state_bytes(3) - model.backbone.layers[0].mixer.state_bytes(3) == 24


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_a_classifier_tells_places_apart(positions: str) -> None:
    """The mean of attention's outputs over time is blind to order without them."""
    inputs = torch.randn(1, 6, 3)
    torch.manual_seed(0)

    def scores(chosen: str, longest: int) -> tuple[Tensor, Tensor]:
        config = ClassifierConfig(
            8, 1, 4, d_input=3, mixer="attention", mixer_options={"rotary": False}, d_intermediate=16, mlp="gelu",
            direction="sum", positions=chosen, max_positions=longest,
        )  # fmt: skip
        model = Classifier(config)
        padded = torch.cat((inputs, torch.full((1, 2, 3), torch.nan)), dim=1)
        torch.testing.assert_close(model(padded, lengths=torch.tensor([6])), model(inputs))
        return model(inputs), model(inputs.roll(1, 1))

    given, rolled = scores(positions, 8 if positions == "learned" else 0)
    assert not torch.allclose(given, rolled, atol=1e-3)
    with pytest.raises(ConfigError, match="max_positions"):
        ClassifierConfig(d_input=3, positions="sinusoidal", max_positions=8)


def test_names_of_architectures() -> None:
    shape = LanguageModelConfig(32, 2, 11, block="mamba", block_options={"expand": 1})
    first, second = contestant("transformer", shape), contestant("transformer++", shape)
    assert (first.d_intermediate, second.d_intermediate) == (128, 85)
    assert (first.norm, first.mlp, first.positions, first.block) == ("layer", "gelu_tanh", "sinusoidal", "plain")
    assert (second.norm, second.mlp, second.positions, second.mixer) == ("rms", "gated", "none", "attention")
    assert contestant("transformer", LanguageModelConfig(32, d_intermediate=40)).d_intermediate == 40
