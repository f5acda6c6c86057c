"""The compiled step and the modules give the same numbers, and the right one of them is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longscan.models import prefill
from longscan.models.decoding import CompiledStepper, ModuleStepper, make_stepper
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


def test_the_choice() -> None:
    assert isinstance(make_stepper(make()), CompiledStepper)
    for model in (make("complex"), make("mixed"), make(d_intermediate=8), make().double()):
        assert isinstance(make_stepper(model), ModuleStepper)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(make_stepper(make()), ModuleStepper)
