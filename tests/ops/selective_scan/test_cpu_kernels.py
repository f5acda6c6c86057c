"""What is particular to the CPU's kernels: tiles and blocks of every size, threads, memory in place, accuracy."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from longscan.ops import selective_scan, selective_state_update
from longscan.ops.selective_scan.cases import NAMES, ScanCase, make_inputs
from tests.ops.agreement import assert_close, in_float64, outputs_and_gradients

pytest.importorskip("numba")


def scan(backend: str):
    return partial(selective_scan, dt_softplus=True, return_final_state=True, backend=backend)


def check(case: ScanCase, tolerance: float = 2e-5) -> None:
    inputs = make_inputs(case)
    ours = outputs_and_gradients(scan("cpu"), inputs, NAMES)
    truth = outputs_and_gradients(scan("reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, tolerance)


@pytest.mark.parametrize("length", [7, 8, 9, 63, 64, 65, 127, 129])
def test_lengths_about_the_borders_of_tiles_and_chunks(length: int) -> None:
    check(ScanCase("length", batch=1, length=length, channels=5, state=4, initial=True))


@pytest.mark.parametrize("state", [2, 3, 17, 18, 21])
def test_states_that_make_odd_chunks(state: int) -> None:
    """Chunks grow with the state, and have to stay whole tiles."""
    check(ScanCase("states", batch=1, length=200, channels=3, state=state, initial=True))


@pytest.mark.parametrize("channels", [15, 16, 17, 33, 130, 300])
def test_channels_about_the_borders_of_vectors_and_blocks(channels: int) -> None:
    check(ScanCase("channels", batch=1, length=10, channels=channels, state=3))


def test_more_sequences_than_runs_of_them() -> None:
    lengths = tuple((7 * i) % 11 for i in range(37))
    check(ScanCase("packed", lengths=lengths, channels=18, state=4, initial=True))


@pytest.mark.parametrize("name", ["mamba", "packed", "constant-b-c"])
def test_gradients_do_not_depend_on_the_number_of_threads(name: str) -> None:
    case = {
        "mamba": ScanCase("mamba", length=150, channels=80),
        "packed": ScanCase("packed", lengths=(70, 3, 90, 40), channels=40, groups=2, initial=True),
        "constant-b-c": ScanCase("constant", b="constant", c="constant", channels=40),
    }[name]
    inputs = make_inputs(case)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(scan("cpu"), inputs, NAMES))
    finally:
        torch.set_num_threads(before)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_float32_errors_over_a_long_memory() -> None:
    """Decays within 1e-4 of 1 over 4,096 steps: what an exponential that is wrong near 0 would spoil."""
    torch.manual_seed(0)
    length, channels, state = 4096, 16, 4
    x, B, C = torch.randn(1, length, channels), torch.randn(1, length, state), torch.randn(1, length, state)
    dt, A = torch.rand(1, length, channels) * 0.01, -torch.rand(channels, state) * 0.02
    y, final = selective_scan(x, dt, A, B, C, return_final_state=True, backend="cpu")
    doubles = [tensor.double() for tensor in (x, dt, A, B, C)]
    y64, final64 = selective_scan(*doubles, return_final_state=True, backend="reference")
    assert (y - y64).abs().max() / y64.abs().max() < 3e-6
    assert (final - final64).abs().max() / final64.abs().max() < 3e-6


def test_states_that_decay_to_nothing() -> None:
    inputs = make_inputs(ScanCase("mamba", initial=True))
    inputs["A"] = torch.full_like(inputs["A"], -3e4)
    ours = outputs_and_gradients(scan("cpu"), inputs, NAMES)
    truth = outputs_and_gradients(scan("reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, 2e-5)


def test_halves_of_a_projection_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from longscan.ops.selective_scan import cpu

    inputs = make_inputs(ScanCase("mamba"))
    both = torch.cat([inputs["x"], inputs["z"]], -1)
    inputs["x"], inputs["z"] = both.chunk(2, -1)

    def refuse(tensor, *args, **kwargs):
        raise AssertionError(f"copied a tensor of strides {tensor.stride()}")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", lambda t, **kw: t if t.is_contiguous() else refuse(t))
        served = [cpu._served(inputs[name]) for name in ("x", "dt", "z")]
    assert [t.data_ptr() for t in served] == [inputs[name].data_ptr() for name in ("x", "dt", "z")]


@pytest.mark.parametrize("channels", [1, 19, 5000])
@pytest.mark.parametrize("groups", [1, "channels"])
def test_a_step_of_every_width(channels: int, groups) -> None:
    groups = channels if groups == "channels" else 1
    torch.manual_seed(0)
    batch, state = 2, 21
    h = torch.randn(batch, channels, state)
    x, dt, z = torch.randn(3, batch, channels)
    A, D, bias = -torch.rand(channels, state), torch.randn(channels), torch.randn(channels)
    B, C = torch.randn(batch, groups, state), torch.randn(batch, 1, state)
    arguments = (h, x, dt, A, B, C, D, z, bias)
    y, fresh = selective_state_update(*arguments, dt_softplus=True, backend="cpu")
    doubles = [tensor.double() for tensor in arguments]
    y64, fresh64 = selective_state_update(*doubles, dt_softplus=True, backend="reference")
    assert_close({"y": y, "state": fresh}, {"y": y64, "state": fresh64}, 2e-6)


def test_a_step_updates_a_state_that_is_not_contiguous() -> None:
    torch.manual_seed(0)
    whole = torch.randn(3, 8, 2, 5)
    state = whole[:, :, 1]
    other, before = whole[:, :, 0].clone(), state.clone()
    x, dt, A = torch.randn(3, 8), torch.rand(3, 8), -torch.rand(8, 5)
    B, C = torch.randn(2, 3, 5)
    expected = selective_state_update(before, x, dt, A, B, C, backend="reference")
    y, same = selective_state_update(state, x, dt, A, B, C, inplace=True, backend="cpu")
    assert same is state
    assert torch.equal(whole[:, :, 0], other)
    assert_close({"y": y, "state": state}, {"y": expected[0], "state": expected[1]}, 2e-6)
