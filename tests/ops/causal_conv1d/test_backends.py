"""Every backend of the causal convolution against the float64 definition: every case, dtype, output and gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from longscan.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from longscan.ops.causal_conv1d.cases import CASES, NAMES, ConvCase, make_inputs
from tests.ops.agreement import CUDA_RUNS, TOLERANCE, assert_close, in_float64, outputs_and_gradients

CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).split(".")[1])


def convolve(case: ConvCase, backend: str):
    activation = "silu" if case.silu else None
    return partial(causal_conv1d, activation=activation, return_final_state=True, backend=backend)


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
@DTYPE
@CASE
def test_agrees_with_the_float64_definition(case: ConvCase, dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = make_inputs(case, device, dtype)
    ours = outputs_and_gradients(convolve(case, backend), inputs, NAMES)
    truth = outputs_and_gradients(convolve(case, "reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[dtype])
    assert ours["output 0"].dtype == ours["output 1"].dtype == dtype


@CASE
def test_the_definition_is_torchs_convolution(case: ConvCase) -> None:
    """Against `torch.nn.functional.conv1d` where that can say the same: one sequence a row."""
    if case.lengths is not None:
        pytest.skip("torch's convolution does not know packed sequences")
    inputs = make_inputs(case, "cpu", torch.float64)

    def theirs(x, weight, bias, initial_state):
        before = x.new_zeros(case.batch, case.width - 1, case.channels) if initial_state is None else initial_state
        padded = torch.cat([before, x], 1)
        y = torch.nn.functional.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=case.channels)
        y = y.transpose(1, 2)
        state = padded[:, padded.shape[1] - (case.width - 1) :]
        return torch.nn.functional.silu(y) if case.silu else y, state

    ours = outputs_and_gradients(convolve(case, "reference"), inputs, NAMES)
    assert_close(ours, outputs_and_gradients(theirs, inputs, NAMES), 1e-12)


def test_gradcheck_of_the_definition() -> None:
    inputs = make_inputs(ConvCase("check", 2, 5, 3, initial=True), "cpu", torch.float64)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(convolve(CASES[0], "reference"), leaves)


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
@pytest.mark.parametrize("name", ["mamba", "plain", "width-1", "width-2", "width-7", "initial-state"])
def test_a_step_is_a_convolution_of_length_one(name: str, backend: str, device: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case, device, torch.float32)
    whole, final = convolve(case, "reference")(**inputs)
    state = torch.zeros_like(final) if inputs["initial_state"] is None else inputs["initial_state"].clone()
    filters = {"weight": inputs["weight"], "bias": inputs["bias"], "activation": "silu" if case.silu else None}
    for t in range(whole.shape[1]):
        before = state.clone()
        y, fresh = causal_conv1d_update(state, inputs["x"][:, t], **filters, backend=backend)
        assert torch.equal(state, before), "the caller's state changed"
        y_inplace, same = causal_conv1d_update(state, inputs["x"][:, t], **filters, backend=backend, inplace=True)
        assert same is state
        assert torch.equal(same, fresh)
        assert torch.equal(y, y_inplace)
        assert_close({"y": y}, {"y": whole[:, t]}, 1e-5)
    assert torch.equal(state, final)


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
def test_strided_inputs_give_the_same(backend: str, device: str) -> None:
    inputs = make_inputs(CASES[0], device, torch.float32)
    straight = outputs_and_gradients(convolve(CASES[0], backend), inputs, NAMES)

    def half(x, **others):
        return convolve(CASES[0], backend)(torch.cat([x, x], -1).chunk(2, -1)[0], **others)

    def transposed(x, **others):
        return convolve(CASES[0], backend)(x.transpose(1, 2).contiguous().transpose(1, 2), **others)

    for way in (half, transposed):
        assert_close(outputs_and_gradients(way, inputs, NAMES), straight, 1e-6)


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
def test_backward_is_bit_for_bit_repeatable(backend: str, device: str) -> None:
    for case in (CASES[0], CASES[-1]):
        inputs = make_inputs(case, device, torch.float32)
        first = outputs_and_gradients(convolve(case, backend), inputs, NAMES)
        again = outputs_and_gradients(convolve(case, backend), inputs, NAMES)
        for key, value in first.items():
            assert torch.equal(value, again[key]), key


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
def test_the_filter_does_not_reach_over_a_border(backend: str, device: str) -> None:
    case = ConvCase("packed", lengths=(6, 5, 4), initial=True)
    inputs = make_inputs(case, device, torch.float32)
    clean, clean_final = convolve(case, backend)(**inputs)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][0, 6:11] = float("nan")
    y, final = convolve(case, backend)(**inputs)
    assert torch.equal(y[0, :6], clean[0, :6])
    assert torch.equal(y[0, 11:], clean[0, 11:])
    assert torch.equal(final[[0, 2]], clean_final[[0, 2]])
