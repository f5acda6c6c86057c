"""Every backend of the selective scan against the float64 definition: every case, dtype, output and gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from longscan.ops.selective_scan import selective_scan, selective_state_update
from longscan.ops.selective_scan.cases import CASES, NAMES, ScanCase, make_inputs
from tests.ops.agreement import CUDA_RUNS, TOLERANCE, assert_close, in_float64, outputs_and_gradients

CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).split(".")[1])


def scan(case: ScanCase, backend: str):
    return partial(selective_scan, dt_softplus=case.softplus, return_final_state=True, backend=backend)


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
@DTYPE
@CASE
def test_agrees_with_the_float64_definition(case: ScanCase, dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = make_inputs(case, device, dtype)
    ours = outputs_and_gradients(scan(case, backend), inputs, NAMES)
    truth = outputs_and_gradients(scan(case, "reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[dtype])
    assert ours["output 0"].dtype == dtype
    assert ours["output 1"].dtype == (torch.complex64 if case.complex else torch.float32)


@CASE
def test_the_definition_differentiates_itself(case: ScanCase) -> None:
    """The backward pass of the reference is autograd's through its forward pass, to rounding."""
    from longscan.ops.selective_scan import reference

    if case.state > 64:
        pytest.skip("the same code as the smaller states, only slower")
    inputs = make_inputs(case, "cpu", torch.float64)
    ours = outputs_and_gradients(scan(case, "reference"), inputs, NAMES)

    def definition(**tensors):
        for name in ("B", "C"):
            if tensors[name].dim() == 3:
                tensors[name] = tensors[name].unsqueeze(2)
        cu_seqlens = tensors.pop("cu_seqlens", None)
        y, final, _ = reference.forward(**tensors, cu_seqlens=cu_seqlens, dt_softplus=case.softplus, save=False)
        return y, final

    truth = outputs_and_gradients(definition, inputs, NAMES)
    assert_close(ours, truth, 1e-12)


def test_gradcheck_of_the_definition() -> None:
    """Finite differences know nothing of either derivation."""
    for case in (ScanCase("real", 2, 5, 4, 3, groups=2, initial=True), ScanCase("complex", 1, 4, 3, 2, complex=True)):
        inputs = make_inputs(case, "cpu", torch.float64)
        given = [name for name in NAMES if inputs[name] is not None]
        leaves = [inputs[name].requires_grad_() for name in given]

        def function(*tensors, case=case, given=given):
            return scan(case, "reference")(**dict(zip(given, tensors, strict=True)))

        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
@pytest.mark.parametrize("name", ["mamba", "odd-channels", "groups-2", "complex-initial", "constant-b-c", "state-5"])
def test_a_step_is_a_scan_of_length_one(name: str, backend: str, device: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case, device, torch.float32)
    batch = case.batch
    for constant in ("B", "C"):
        if inputs[constant].dim() == 2:
            inputs[constant] = inputs[constant].expand(batch, 3, *inputs[constant].shape)
    cut = {k: v[:, :3] if k in ("x", "dt", "z", "B", "C") and v is not None else v for k, v in inputs.items()}
    whole, final = selective_scan(**cut, dt_softplus=True, return_final_state=True, backend="reference")
    state = torch.zeros_like(final) if inputs["initial_state"] is None else inputs["initial_state"].clone()
    for t in range(3):
        now = {k: v[:, t] for k, v in cut.items() if k in ("x", "dt", "z", "B", "C") and v is not None}
        parameters = {k: cut[k] for k in ("A", "D", "dt_bias")}
        before = state.clone()
        y, fresh = selective_state_update(state, **now, **parameters, dt_softplus=True, backend=backend)
        assert torch.equal(state, before), "the caller's state changed"
        y_inplace, same = selective_state_update(
            state, **now, **parameters, dt_softplus=True, backend=backend, inplace=True
        )
        assert same is state
        assert torch.equal(same, fresh)
        assert torch.equal(y, y_inplace)
        assert_close({"y": y}, {"y": whole[:, t]}, 1e-5)
    assert_close({"state": state}, {"state": final}, 1e-5)


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
def test_a_step_carries_gradients(backend: str, device: str) -> None:
    case = ScanCase("step", length=1, initial=True)
    inputs = make_inputs(case, device, torch.float32)

    def step(x, dt, B, C, z, initial_state, **parameters):
        return selective_state_update(
            initial_state, x[:, 0], dt[:, 0], B=B[:, 0], C=C[:, 0], z=z[:, 0],
            dt_softplus=True, backend=backend, **parameters,
        )  # fmt: skip

    def one(**tensors):
        y, state = scan(case, "reference")(**tensors)
        return y[:, 0], state

    ours = outputs_and_gradients(step, inputs, NAMES)
    truth = outputs_and_gradients(one, in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
@pytest.mark.parametrize("name", ["mamba", "packed-states", "complex-groups"])
def test_strided_inputs_give_the_same(name: str, backend: str, device: str) -> None:
    """Halves of one projection, transposed layouts and expanded tensors, as blocks and other packages pass them."""
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case, device, torch.float32)
    straight = outputs_and_gradients(scan(case, backend), inputs, NAMES)

    def strided(**tensors):
        x, dt, z = tensors["x"], tensors["dt"], tensors["z"]
        if z is not None:
            both = torch.cat([x, z], -1)
            tensors["x"], tensors["z"] = both.chunk(2, -1)
        tensors["dt"] = dt.transpose(1, 2).contiguous().transpose(1, 2)
        padded = torch.nn.functional.pad(torch.view_as_real(tensors["B"]) if case.complex else tensors["B"], (0, 3))
        cut = padded[..., : padded.shape[-1] - 3]
        tensors["B"] = torch.view_as_complex(cut.contiguous()) if case.complex else cut
        tensors["A"] = tensors["A"].t().contiguous().t()
        return scan(case, backend)(**tensors)

    assert_close(outputs_and_gradients(strided, inputs, NAMES), straight, 1e-6)


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
@pytest.mark.parametrize("name", ["mamba", "packed-states", "complex-groups", "constant-b-c", "long"])
def test_backward_is_bit_for_bit_repeatable(name: str, backend: str, device: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case, device, torch.float32)
    first = outputs_and_gradients(scan(case, backend), inputs, NAMES)
    again = outputs_and_gradients(scan(case, backend), inputs, NAMES)
    for key, value in first.items():
        assert torch.equal(value, again[key]), key


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
def test_no_state_leaks_over_a_border(backend: str, device: str) -> None:
    """Not even NaN: what one packed sequence holds cannot reach another's output, state or gradient."""
    case = ScanCase("packed", lengths=(66, 5, 40), initial=True)
    inputs = make_inputs(case, device, torch.float32)
    clean = outputs_and_gradients(scan(case, backend), inputs, ("x", "dt", "z", "B", "C", "initial_state"))
    dirty = {k: v if v is None else v.clone() for k, v in inputs.items()}
    dirty["x"][0, 66:71] = float("nan")
    y, final = scan(case, backend)(**dirty)
    mine = torch.ones(111, dtype=torch.bool)
    mine[66:71] = False
    assert torch.equal(y.detach()[0, mine.to(device)], clean["output 0"][0, mine.to(device)])
    assert torch.equal(final.detach()[[0, 2]], clean["output 1"][[0, 2]])
    assert y[0, 66:71].isnan().all()


@pytest.mark.parametrize(("backend", "device"), CUDA_RUNS)
def test_large_steps_and_values_stay_finite(backend: str, device: str) -> None:
    inputs = make_inputs(ScanCase("mamba"), device, torch.float32)
    inputs["dt"] = inputs["dt"] * 60
    inputs["z"] = inputs["z"] * 60
    ours = outputs_and_gradients(scan(CASES[0], backend), inputs, NAMES)
    truth = outputs_and_gradients(scan(CASES[0], "reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[torch.float32])
