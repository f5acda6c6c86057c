"""The logarithm of the cross-entropy, where the cross-entropy has digits left and where it has none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.tasks.task import IGNORED
from longscan.training.objectives import log_cross_entropy


def with_gradient(loss: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, scores)[0]


@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_it_is_the_logarithm_of_the_mean(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (scale * torch.randn(4, 3, 7, generator=generator)).requires_grad_()
    targets = torch.randint(0, 7, (4, 3), generator=generator)
    targets[0, 1] = IGNORED
    ours, gradient = with_gradient(log_cross_entropy(scores, targets), scores)
    mean, of_mean = with_gradient(F.cross_entropy(scores.double().flatten(0, 1), targets.flatten()), scores)
    torch.testing.assert_close(ours, mean.log().float())
    torch.testing.assert_close(gradient, of_mean / mean.float())


def test_it_goes_on_where_float32_ends() -> None:
    scores = torch.tensor([[300.0, 0.0, -1.0], [0.0, 200.0, 5.0]], requires_grad=True)
    targets = torch.tensor([0, 1])
    assert F.cross_entropy(scores, targets) == 0
    loss, gradient = with_gradient(log_cross_entropy(scores, targets), scores)
    # Nearly all of it is the second row's, whose odds against are exp(5) + 1 to exp(200).
    assert loss.item() == pytest.approx(-195 - torch.tensor(2.0).log().item(), abs=0.01)
    assert gradient[1, 1].item() == pytest.approx(-1, abs=1e-3)
    assert gradient[1, 2].item() == pytest.approx(1, abs=0.01)
    assert gradient[0].abs().max() < 1e-20


def test_values_have_none() -> None:
    with pytest.raises(ArgumentError, match="log-loss is of classes"):
        log_cross_entropy(torch.zeros(2, 1), torch.zeros(2, 1))
