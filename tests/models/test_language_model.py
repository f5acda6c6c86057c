"""The language model: names, start, views of one model, loss, errors."""

from __future__ import annotations

import math
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import longscan
from longscan.errors import ArgumentError
from longscan.models import LanguageModel, LanguageModelConfig
from tests.models.small import KINDS, VOCABULARY, make

all_kinds = pytest.mark.parametrize("kind", KINDS)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def test_names_are_those_of_the_released_models() -> None:
    block = [
        "norm.weight",
        *(
            f"mixer.{name}"
            for name in ("A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight")
        ),
        *(f"mixer.{name}" for name in ("dt_proj.weight", "dt_proj.bias", "out_proj.weight")),
    ]
    names = ["embedding.weight", *(f"layers.{layer}.{name}" for layer in range(3) for name in block), "norm_f.weight"]
    assert list(make().state_dict()) == [*(f"backbone.{name}" for name in names), "lm_head.weight"]


def test_start() -> None:
    torch.manual_seed(0)
    config = LanguageModelConfig(d_model=64, n_layer=8, vocab_size=1000, mixer_options={"bias": True})
    model = LanguageModel(config)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    mixer = model.backbone.blocks[0].mixer
    # kaiming_uniform with a = sqrt(5) is uniform within fan_in^-1/2.
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(128**-0.5 / math.sqrt(8), rel=0.01)
    assert (mixer.in_proj.bias == 0).all()
    assert (mixer.dt_proj.bias != 0).all()
    loss = model.loss(torch.randint(1000, (2, 9)), torch.randint(1000, (2, 9)))
    assert loss.item() == pytest.approx(math.log(1000), rel=0.05)


@all_kinds
def test_views_of_one_model(kind: str) -> None:
    model, x = make(kind).double(), tokens(2, 9)
    whole, nothing = model(x)
    assert nothing is None
    assert whole.shape == (2, 9, VOCABULARY)
    first, state = model(x[:, :4], model.initial_state(2))
    second, _ = model(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    last, _ = model(x, last_only=True)
    torch.testing.assert_close(last, whole[:, -1])
    state, steps = model.initial_state(2), []
    for t in range(9):
        logits, state = model.step(x[:, t], state)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, dim=1), whole)
    offsets = torch.tensor([0, 9, 14])
    packed, _ = model(torch.cat([x[0], x[1, :5]])[None], cu_seqlens=offsets)
    torch.testing.assert_close(packed[0], torch.cat([whole[0], whole[1, :5]]))
    last, state = model(torch.cat([x[0], x[1, :5]])[None], model.initial_state(2), cu_seqlens=offsets, last_only=True)
    torch.testing.assert_close(last, torch.stack([whole[0, -1], whole[1, 4]]))
    assert state.batch == 2


@all_kinds
def test_loss(kind: str) -> None:
    model, x = make(kind), tokens(2, 9)
    inputs, targets = x[:, :-1], x[:, 1:].clone()
    targets[0, 3] = -100
    logits, _ = model(inputs)
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(model.loss(inputs, targets), each.sum() / 15)
    torch.testing.assert_close(model.loss(inputs, targets, reduction="none"), each)
    model.loss(inputs, targets).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_padding_rows_are_never_output() -> None:
    model = make()
    assert model.backbone.embedding.weight.shape[0] == 16
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = 1e4
    assert model(tokens(1, 3))[0].shape[-1] == VOCABULARY
    assert model.loss(tokens(1, 3), tokens(1, 3)) < 100


def test_residual_stream_is_float32() -> None:
    model = make().to(torch.bfloat16)
    seen = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[1].dtype))
    logits, _ = model(tokens(1, 3))
    assert logits.dtype == torch.bfloat16
    assert seen == [torch.float32] * 3
    low = make(residual_in_fp32=False).to(torch.bfloat16)
    low.backbone.blocks[0].register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[1].dtype))
    low(tokens(1, 3))
    assert seen[-1] == torch.bfloat16


@all_kinds
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16(kind: str, how: str) -> None:
    model, x = make(kind), tokens(2, 9)
    expected, _ = model(x)
    if how == "weights":
        logits, _ = model.to(torch.bfloat16)(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = model(x)
            model.loss(x, x).backward()
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.25)


def test_what_goes_wrong_is_said() -> None:
    model, state = make(), make().initial_state(2)
    with pytest.raises(ArgumentError, match=r"0 \.\. 12, the vocabulary; got 13"):
        model(torch.tensor([[1, 13]]))
    with pytest.raises(ArgumentError, match="got -1"):
        model(torch.tensor([[1, -1]]))
    with pytest.raises(ArgumentError, match=r"int64 or int32, got torch\.float32"):
        model(torch.ones(1, 2))
    with pytest.raises(ArgumentError, match="at least 1"):
        model(torch.ones(0, 2, dtype=torch.int64))
    with pytest.raises(ArgumentError, match=r"\(batch, length\)"):
        model(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="2 sequences, the input has 1"):
        model(tokens(1, 2), state)
    with pytest.raises(ArgumentError, match="3 layers, the model 2"):
        make(n_layer=2)(tokens(2, 2), state)
    with pytest.raises(ArgumentError, match="ModelState"):
        model(tokens(2, 2), state.layers[0])
    with pytest.raises(ArgumentError, match="MambaState"):
        model(tokens(2, 2), make("mixed").initial_state(2))
    with pytest.raises(ArgumentError, match="shape of tokens"):
        model.loss(tokens(2, 3), tokens(2, 2))
    with pytest.raises(ArgumentError, match="reduction"):
        model.loss(tokens(2, 3), tokens(2, 3), reduction="median")
    with pytest.raises(ArgumentError, match="from_config"):
        LanguageModel("mamba-130m")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="batch"):
        model.initial_state(0)


@all_kinds
def test_state_bytes(kind: str) -> None:
    model = make(kind)
    _, state = model(tokens(2, 5), model.initial_state(2))
    assert state.nbytes == model.state_bytes(2, 5)


@pytest.mark.compile
@all_kinds
def test_compiles_and_exports(kind: str) -> None:
    model, x = make(kind), tokens(2, 6)
    expected, _ = model(x)
    torch._dynamo.reset()
    compiled, _ = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
    exported = torch.export.export(model, (x, model.initial_state(2)))
    logits, state = exported.module()(x, model.initial_state(2))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(state.layers) == 3


def test_from_config() -> None:
    assert LanguageModel.from_config({"d_model": 8, "n_layer": 1}).config.d_model == 8
    with torch.device("meta"):
        assert LanguageModel.from_config("mamba-130m").config.n_layer == 24


def test_the_package_exports_lazily() -> None:
    for name in longscan.__all__:
        assert getattr(longscan, name) is not None
    assert set(longscan.__all__) < set(dir(longscan))
    for name in set(dir(longscan)) - set(longscan.__all__):
        assert isinstance(getattr(longscan, name), types.ModuleType), name
    with pytest.raises(AttributeError, match="Mambo"):
        longscan.Mambo  # noqa: B018
    program = "import sys, torch, longscan; print([m for m in sys.modules if m.startswith('longscan.')])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
