"""The head's cross entropy: every backend against PyTorch's own in float64, and what it keeps in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import ArgumentError, LongscanError
from longscan.ops import linear_cross_entropy
from longscan.ops.linear_cross_entropy import IGNORED, library, reference
from longscan.ops.linear_cross_entropy.cases import CASES, NAMES, LossCase, make_inputs
from tests.ops.agreement import RUNS, TOLERANCE, assert_close, in_float64, outputs_and_gradients

#: There is no CPU kernel: products and PyTorch's own functions are all it takes.
OWN_RUNS = [run for run in RUNS if run.id != "cpu"]
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).split(".")[1])


def loss(case: LossCase, backend: str, reduction: str = "mean"):
    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        options = {"vocab_size": case.vocabulary, "reduction": reduction, "backend": backend}
        return (linear_cross_entropy(hidden, weight, targets, **options),)

    return call


def torchs(case: LossCase, reduction: str = "mean"):
    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        scores = (hidden @ weight.t())[..., : case.vocabulary].reshape(-1, case.vocabulary)
        return (F.cross_entropy(scores, targets.reshape(-1), reduction=reduction),)

    return call


@pytest.fixture(params=["whole", "pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pieces":
        monkeypatch.setattr(reference, "SCORES", {"cpu": 1})
        monkeypatch.setattr(reference, "MOST_SCORES", 1)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("backend", "device"), OWN_RUNS)
@DTYPE
@CASE
def test_agrees_with_torch_in_float64(
    case: LossCase, dtype: torch.dtype, backend: str, device: str, reduction: str
) -> None:
    inputs = make_inputs(case, device, dtype)
    ours = outputs_and_gradients(loss(case, backend, reduction), inputs, NAMES)
    exact = in_float64(inputs)
    # The product's weight is rounded to hidden's dtype; that is no error of the loss.
    exact["weight"] = inputs["weight"].to(dtype).cpu().double()
    truth = outputs_and_gradients(torchs(case, reduction), exact, NAMES)
    # Scores are rounded before their exponentials are taken.
    assert_close(ours, truth, 3 * TOLERANCE[dtype])
    assert ours["output 0"].dtype == torch.float32
    assert ours["gradient of hidden"].dtype == dtype
    assert ours["gradient of weight"].dtype == torch.float32


def test_gradcheck() -> None:
    case = LossCase("small", shape=(5, 3), vocabulary=4, padding=2)
    inputs = make_inputs(case, dtype=torch.float64)
    hidden, weight = (inputs[name].requires_grad_() for name in NAMES)
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda h, w, kind=reduction: loss(case, "reference", kind)(h, w, inputs["targets"])[0], (hidden, weight)
        )


@pytest.mark.parametrize("save", [True, False])
def test_opcheck(save: bool) -> None:
    inputs = make_inputs(CASES[0])
    hidden, weight = inputs["hidden"].flatten(0, 1), inputs["weight"]
    arguments = (hidden.requires_grad_(save), weight.requires_grad_(save), inputs["targets"].flatten(), 50, save)
    torch.library.opcheck(library.linear_cross_entropy, (*arguments, "reference"))


@pytest.mark.parametrize(("backend", "device"), OWN_RUNS)
def test_where_nothing_counts_there_is_nothing_to_learn(backend: str, device: str) -> None:
    inputs = make_inputs(CASES[0], device)
    inputs["targets"] = torch.full_like(inputs["targets"], IGNORED)
    found = outputs_and_gradients(loss(CASES[0], backend, "sum"), inputs, NAMES)
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize(("backend", "device"), OWN_RUNS)
def test_autocast_and_repeatable_bits(backend: str, device: str) -> None:
    case = LossCase("many", shape=(700, 32), vocabulary=300)
    inputs = make_inputs(case, device)
    with torch.autocast(device, torch.bfloat16):
        first = outputs_and_gradients(loss(case, backend), inputs, NAMES)
        again = outputs_and_gradients(loss(case, backend), inputs, NAMES)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    coarse = outputs_and_gradients(loss(case, backend), {**inputs, "hidden": inputs["hidden"].bfloat16()}, NAMES)
    torch.testing.assert_close(first["gradient of weight"], coarse["gradient of weight"])
    assert first["gradient of hidden"].dtype == torch.float32


def test_scores_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCORES", {"cpu": 64 * 1000})
    made: list[int] = []
    keep = torch.matmul

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                made.append(out.numel())
            return out

    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    targets = torch.randint(0, 1000, (1024,))
    expected = F.cross_entropy(keep(hidden, weight.t()), targets)
    saved: list[int] = []
    with Count(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        value = linear_cross_entropy(hidden, weight, targets)
        value.backward()
    torch.testing.assert_close(value, expected)
    assert max(made) <= 64 * 1000
    assert sum(saved) <= hidden.numel() + weight.numel() + targets.numel() + 2


def test_refuses_what_does_not_fit() -> None:
    hidden, weight, targets = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    for change, message in (
        ({"hidden": hidden[..., :0]}, "hidden: got shape"),
        ({"weight": weight[:, :3]}, "weight: got shape"),
        ({"targets": targets[:1]}, "targets: got shape"),
        ({"targets": targets.float()}, "targets: got torch.float32"),
        ({"targets": targets + 5}, "targets: got 5, allowed are 0 to 4"),
        ({"targets": targets - 1}, "targets: got -1"),
        ({"vocab_size": 6}, "vocab_size: got 6"),
        ({"reduction": "none"}, "reduction: got 'none'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            linear_cross_entropy(**{"hidden": hidden, "weight": weight, "targets": targets, **change})


def test_has_no_second_derivative() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    value = linear_cross_entropy(hidden, weight, torch.zeros(3, dtype=torch.int64)) ** 2
    (grad,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(LongscanError, match="no second derivative"):
        grad.sum().backward()
