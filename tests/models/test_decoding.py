"""The compiled step and the modules give the same numbers, and the right one of them is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longscan.errors import ArgumentError
from longscan.models import prefill
from longscan.models.decoding import CompiledStepper, GraphStepper, ModuleStepper, make_stepper
from tests.models.small import make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"d_conv": 1, "conv_bias": False, "bias": True, "d_state": 3}])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_same_numbers(dtype: torch.dtype, options: dict[str, Any], tied: bool) -> None:
    model = make(mixer_options=options, tie_embeddings=tied).to(dtype)
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    states = [prefill(model, prompts)[1] for _ in range(2)]
    steppers = [CompiledStepper(model), ModuleStepper(model)]
    for token in range(5):
        logits = []
        for place, stepper in enumerate(steppers):
            scores, states[place] = stepper.step(torch.tensor([token, 2 * token]), states[place])
            logits.append(scores.float())
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        assert logits[0].shape == (2, 13)
        torch.testing.assert_close(logits[0], logits[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "changes", [{"d_intermediate": 24}, {"mixer_options": {"selection_norm_eps": 1e-2}}], ids=["mlps", "inner-norms"]
)
@torch.no_grad()
def test_mlps_and_inner_norms(changes: dict[str, Any], int8: bool) -> None:
    model = make(**changes)
    if int8:
        model.quantize()
    states = [prefill(model, [torch.tensor([1, 2, 3]), torch.tensor([4])])[1] for _ in range(2)]
    for token in range(4):
        tokens = torch.tensor([token, 2 * token])
        logits, states[0] = CompiledStepper(model).step(tokens, states[0])
        expected, states[1] = ModuleStepper(model).step(tokens, states[1])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_choice() -> None:
    assert isinstance(make_stepper(make()), CompiledStepper)
    assert isinstance(make_stepper(make(), short_states=True), CompiledStepper)
    for model in (make(d_intermediate=8), make(mixer_options={"selection_norm_eps": 1e-6})):
        assert isinstance(make_stepper(model), CompiledStepper)
    for model in (make("complex"), make("mixed"), make().double()):
        assert isinstance(make_stepper(model), ModuleStepper)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(make_stepper(make()), ModuleStepper)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("kind", ["mamba", "complex", "s4d"])
@torch.no_grad()
def test_a_captured_step_is_the_step(kind: str, batch: int) -> None:
    model = make("mamba", mixer="s4d", mixer_options={"d_state": 4}) if kind == "s4d" else make(kind)
    model = model.cuda()
    stepper, plain = make_stepper(model), ModuleStepper(model)
    assert isinstance(stepper, GraphStepper)
    prompts = [torch.randint(0, 13, (row + 1,), device="cuda") for row in range(batch)]
    states = [prefill(model, prompts)[1] for _ in range(2)]
    for token in range(6):
        if token == 3 and batch > 1:  # rows end
            states = [state.select(range(1, state.batch)) for state in states]
        tokens = torch.arange(states[0].batch, device="cuda") + token
        logits, states[0] = stepper.step(tokens, states[0])
        expected, states[1] = plain.step(tokens, states[1])
        torch.testing.assert_close(logits.float(), expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@torch.no_grad()
def test_states_may_be_short() -> None:
    model = make().cuda().bfloat16()
    stepper, plain = make_stepper(model, short_states=True), ModuleStepper(model)
    prompts = [torch.randint(0, 13, (row + 1,), device="cuda") for row in range(9)]
    states = [prefill(model, prompts)[1] for _ in range(2)]
    for token in range(6):
        if token == 3:  # rows end
            states = [state.select(range(3)) for state in states]
        tokens = torch.arange(states[0].batch, device="cuda") + token
        logits, states[0] = stepper.step(tokens, states[0])
        expected, states[1] = plain.step(tokens, states[1])
        torch.testing.assert_close(logits.float(), expected.float(), rtol=0.1, atol=0.1)
        assert {tensor.dtype for tensor in states[0].tensors()} == {torch.bfloat16}


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_step_refuses_a_state_that_is_gone() -> None:
    model = make().cuda()
    stepper, tokens = make_stepper(model), torch.tensor([1], device="cuda")
    _, first = stepper.step(tokens, model.initial_state(1))
    stepper.step(tokens, model.initial_state(1))
    with pytest.raises(ArgumentError, match="has been overwritten"):
        stepper.step(tokens, first)


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_step_of_a_model_without_a_convolution_s_state() -> None:
    model = make(mixer_options={"d_conv": 1}).cuda()
    stepper, tokens = make_stepper(model), torch.tensor([1], device="cuda")
    for _ in range(2):
        logits, _ = stepper.step(tokens, model.initial_state(1))
    expected, _ = ModuleStepper(model).step(tokens, model.initial_state(1))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_graphs_are_for_states_that_do_not_grow() -> None:
    assert isinstance(make_stepper(make("mixed").cuda()), ModuleStepper)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mamba", "complex"])
def test_generation_on_a_gpu_is_that_on_the_cpu(kind: str) -> None:
    model = make(kind)
    prompts, options = [[1, 2, 3], [4], [5, 6]], {"temperature": 0.0, "stop_tokens": [7]}
    expected = model.generate(prompts, 12, **options)
    out = model.cuda().generate(prompts, 12, **options)
    assert out.tokens == expected.tokens
    assert out.reasons == expected.reasons
