"""Chunks of a sequence give the gradient of the whole, in the memory of one chunk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longscan.bench.kept import Kept
from longscan.errors import ArgumentError
from longscan.models import LanguageModel, backward_in_chunks
from tests.models.small import KINDS, VOCABULARY, make


def data(length: int = 23) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :9] = -100
    return tokens[:, :-1], targets


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_full_gradients_are_those_of_the_whole(kind: str) -> None:
    model = make(kind).double()
    tokens, targets = data()
    expected = model.loss(tokens, targets)
    expected.backward()
    whole = gradients(model)
    model.zero_grad()
    loss = backward_in_chunks(model, tokens, targets, chunk=5)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(gradients(model), whole, rtol=1e-8, atol=1e-10)


def test_truncated_gradients_end_at_borders() -> None:
    model = make(tie_embeddings=False).double()
    tokens, targets = data()
    # Token 0 stands in the first chunk alone, and only the second has a loss.
    tokens = tokens.clamp(min=1)
    tokens[:, :10] = 0
    targets[:, :10] = -100
    found = {}
    for kind in ("full", "truncated"):
        model.zero_grad()
        backward_in_chunks(model, tokens, targets, chunk=10, gradients=kind)
        found[kind] = gradients(model)["backbone.embedding.weight"]
    assert found["full"][0].abs().max() > 1e-6
    assert found["truncated"][0].abs().max() == 0
    assert found["truncated"][1:].abs().max() > 1e-6


def test_memory_is_that_of_a_chunk() -> None:
    model = make()
    tokens, targets = data(400)
    peaks = {}
    for chunk in (40, 400):
        with Kept(model.parameters()) as kept:
            backward_in_chunks(model, tokens, targets, chunk=chunk)
        peaks[chunk] = kept.peak
        assert kept.now == 0
    assert peaks[40] < 0.15 * peaks[400]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"chunk": 4, "gradients": "none"}, 'gradients must be "full" or "truncated"'),
    ],
)
def test_arguments_that_are_refused(change: dict[str, object], message: str) -> None:
    tokens, targets = data()
    with pytest.raises(ArgumentError, match=message):
        backward_in_chunks(make(), tokens, targets, **change)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="must both be"):
        backward_in_chunks(make(), tokens, targets[:, 1:], chunk=4)
