"""Every backend of the fused residual sum and RMSNorm against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longscan.errors import ArgumentError, BackendError
from longscan.ops.add_rms_norm import add_rms_norm
from longscan.ops.add_rms_norm.cases import CASES, NAMES, NormCase, make_inputs
from tests.ops.agreement import RUNS, TOLERANCE, assert_close, in_float64, outputs_and_gradients

CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).split(".")[1])
BLOCK = CASES[0]


def norm(case: NormCase, backend: str):
    def call(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(**tensors, residual_dtype=case.residual_dtype, backend=backend)

    return call


@pytest.mark.parametrize(("backend", "device"), RUNS)
@DTYPE
@CASE
def test_agrees_with_the_float64_definition(case: NormCase, dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = make_inputs(case, device, dtype)
    ours = outputs_and_gradients(norm(case, backend), inputs, NAMES)
    truth = outputs_and_gradients(norm(case, "reference"), in_float64(inputs), NAMES)
    coarse = torch.bfloat16 if case.residual_dtype == torch.bfloat16 else dtype
    assert_close(ours, truth, TOLERANCE[coarse])
    assert ours["output 0"].dtype == dtype
    assert ours["output 1"].dtype == case.residual_dtype


def test_gradcheck_of_the_definition() -> None:
    for residual in (True, False):
        inputs = make_inputs(NormCase("small", (3, 5), residual=residual), dtype=torch.float64)
        leaves = [tensor.requires_grad_() for tensor in inputs.values() if tensor is not None]
        assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, backend="reference"), leaves)


def test_the_definition_is_torchs_norm_of_the_sum() -> None:
    inputs = make_inputs(BLOCK, dtype=torch.float64)
    normed, stream = add_rms_norm(**inputs, eps=1e-3)
    assert torch.equal(stream, inputs["x"] + inputs["residual"])
    expected = torch.nn.functional.rms_norm(stream, (BLOCK.shape[-1],), inputs["weight"], eps=1e-3)
    torch.testing.assert_close(normed, expected)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_the_stream_keeps_float32_sums(backend: str, device: str) -> None:
    """A thousand bfloat16 blocks add up: the stream does not lose what is small beside it."""
    small = torch.full((1, 8), 2.0**-10, dtype=torch.bfloat16, device=device)
    weight = torch.ones(8, device=device)
    _, stream = add_rms_norm(torch.ones(1, 8, dtype=torch.bfloat16, device=device), weight, backend=backend)
    for _ in range(1024):
        _, stream = add_rms_norm(small, weight, stream, backend=backend)
    assert torch.equal(stream, torch.full_like(stream, 2.0))


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_the_outputs_share_no_memory_with_the_inputs(backend: str, device: str) -> None:
    x = torch.ones(4, 8, device=device)
    normed, stream = add_rms_norm(x, torch.ones(8, device=device), backend=backend)
    stream.zero_()
    normed.zero_()
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_backward_is_bit_for_bit_repeatable(backend: str, device: str) -> None:
    inputs = make_inputs(NormCase("many", (3, 500, 40)), device)
    first = outputs_and_gradients(norm(BLOCK, backend), inputs, NAMES)
    again = outputs_and_gradients(norm(BLOCK, backend), inputs, NAMES)
    for key, value in first.items():
        assert torch.equal(value, again[key]), key


def test_one_gradient_alone() -> None:
    """A loss that reads only the stream, or only the normed output, still reaches every input it depends on."""
    inputs = make_inputs(BLOCK)
    for output in (0, 1):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        add_rms_norm(**leaves)[output].sum().backward()
        assert leaves["x"].grad is not None
        assert leaves["residual"].grad is not None
        if output == 1:
            assert torch.equal(leaves["x"].grad, torch.ones_like(leaves["x"]))
            assert not leaves["weight"].grad.any()


def test_autocast_keeps_the_stream_and_rounds_the_output() -> None:
    x, weight = torch.randn(4, 8), torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16):
        normed, stream = add_rms_norm(x, weight)
    assert normed.dtype == torch.bfloat16
    assert stream.dtype == torch.float32
    assert torch.equal(stream, x)


def test_opcheck() -> None:
    for case in (BLOCK, CASES[1]):
        inputs = make_inputs(case)
        x, residual = inputs["x"].reshape(-1, case.shape[-1]), inputs["residual"]
        leaves = (x.requires_grad_(), inputs["weight"].requires_grad_())
        residual = None if residual is None else residual.reshape(x.shape).requires_grad_()
        torch.library.opcheck(
            torch.ops.longscan.add_rms_norm.default, (*leaves, residual, 1e-5, torch.float32, "reference")
        )


@pytest.mark.compile
def test_compiles_in_one_graph() -> None:
    inputs = make_inputs(BLOCK)
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    ours = outputs_and_gradients(lambda **t: compiled(**t), inputs, NAMES)
    assert_close(ours, outputs_and_gradients(lambda **t: add_rms_norm(**t), inputs, NAMES), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight: got shape \(3,\), expected \(48,\)"),
        ({"residual": torch.ones(2, 48)}, r"residual: got shape \(2, 48\)"),
        ({"x": torch.ones(0, 48)}, r"x: got shape \(0, 48\)"),
        ({"x": torch.ones(2, 48, dtype=torch.int64)}, "x: got torch.int64"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"eps": float("nan")}, "eps: got nan"),
        ({"residual_dtype": torch.int32}, "residual_dtype: got torch.int32"),
        ({"backend": "fast"}, "backend: got 'fast'"),
    ],
)
def test_refuses_what_is_not_allowed(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        add_rms_norm(**{**make_inputs(BLOCK), **change})


def test_a_named_backend_does_not_fall_back() -> None:
    with pytest.raises(BackendError, match=r"cpu.*float64"):
        add_rms_norm(**make_inputs(BLOCK, dtype=torch.float64), backend="cpu")
