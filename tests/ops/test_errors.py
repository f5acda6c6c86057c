"""Bad input gets an error that names the argument, what came and what is allowed."""

from __future__ import annotations

import pytest
import torch

from longscan.errors import ArgumentError, BackendError, LongscanError
from longscan.ops import backend, causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from longscan.ops.causal_conv1d import cases as conv_cases
from longscan.ops.selective_scan import cases as scan_cases

SCAN = scan_cases.ScanCase("errors", batch=2, length=5, channels=6, state=3, initial=True)
CONV = conv_cases.ConvCase("errors", batch=2, length=5, channels=6, initial=True)

BAD_SCANS = [
    ({"x": torch.zeros(5, 6)}, r"x: got shape \(5, 6\), expected \(batch, length, channels\)"),
    ({"x": torch.zeros(0, 5, 6)}, r"x: got shape \(0, 5, 6\)"),
    ({"x": torch.zeros(2, 0, 6)}, r"x: got shape \(2, 0, 6\)"),
    ({"x": torch.zeros(2, 5, 6, dtype=torch.int64)}, r"x: got torch\.int64, allowed are float32"),
    ({"dt": torch.zeros(2, 5, 7)}, r"dt: got shape \(2, 5, 7\), expected \(2, 5, 6\)"),
    ({"A": torch.zeros(7, 3)}, r"A: got shape \(7, 3\), expected \(channels, state\)"),
    ({"A": torch.full((6, 3), float("nan"))}, r"A: holds NaN"),
    ({"A": torch.full((6, 3), 0.25)}, r"A: has a real part of 0\.25; allowed is at most 0"),
    ({"B": torch.zeros(2, 5, 4)}, r"B: got shape \(2, 5, 4\), expected \(2, 5, 3\)"),
    ({"B": torch.zeros(2, 5, 4, 3)}, r"B: got 4 groups, which must divide the 6 channels"),
    ({"B": torch.zeros(2, 5, 3, dtype=torch.complex64)}, r"B: is complex while A is real"),
    ({"C": torch.zeros(5)}, r"C: got shape \(5,\), expected"),
    ({"C": torch.zeros(7, 3)}, r"C: got shape \(7, 3\), expected \(6, 3\) = \(channels, state\)"),
    ({"D": torch.zeros(5)}, r"D: got shape \(5,\), expected \(6,\)"),
    ({"z": torch.zeros(2, 4, 6)}, r"z: got shape \(2, 4, 6\)"),
    ({"dt_bias": torch.zeros(1)}, r"dt_bias: got shape \(1,\)"),
    ({"initial_state": torch.zeros(3, 6, 3)}, r"initial_state: got shape \(3, 6, 3\), expected \(2, 6, 3\)"),
    ({"initial_state": torch.zeros(2, 6, 3, dtype=torch.complex64)}, r"initial_state: is complex"),
    ({"initial_state": torch.zeros(2, 6, 3, dtype=torch.int64)}, r"initial_state: got torch\.int64"),
    ({"A": -torch.ones(6, 3, dtype=torch.int64)}, r"A: got torch\.int64, allowed are float32"),
    ({"C": torch.zeros(2, 5, 3, dtype=torch.bool)}, r"C: got torch\.bool"),
    ({"cu_seqlens": [0, 5]}, r"cu_seqlens: got a list, expected a tensor"),
    ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens: packed sequences share one row, so batch must be 1; got 2"),
    ({"backend": "fast"}, r"backend: got 'fast'; allowed are auto, reference"),
    ({"dt": torch.zeros(2, 5, 6, device="meta")}, r"dt: is on meta, expected cpu"),
]


@pytest.mark.parametrize(("change", "message"), BAD_SCANS, ids=[message[:24] for _, message in BAD_SCANS])
def test_scan(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        selective_scan(**(scan_cases.make_inputs(SCAN) | change))


BAD_OFFSETS = [
    (torch.tensor([0, 4, 3, 10]), r"cu_seqlens: decreases from 4 to 3 at entry 2"),
    (torch.tensor([1, 4, 10]), r"cu_seqlens: starts at 1 and ends at 10, expected 0 and the length 10"),
    (torch.tensor([0, 4, 11]), r"cu_seqlens: starts at 0 and ends at 11"),
    (torch.tensor([0]), r"cu_seqlens: got shape \(1,\)"),
    (torch.tensor([[0, 10]]), r"cu_seqlens: got shape \(1, 2\)"),
    (torch.tensor([0.0, 10.0]), r"cu_seqlens: got torch\.float32, allowed are int32 and int64"),
]


@pytest.mark.parametrize(("offsets", "message"), BAD_OFFSETS, ids=[message[:40] for _, message in BAD_OFFSETS])
def test_offsets(offsets: torch.Tensor, message: str) -> None:
    scan = scan_cases.make_inputs(scan_cases.ScanCase("packed", lengths=(4, 6)))
    with pytest.raises(ArgumentError, match=message):
        selective_scan(**(scan | {"cu_seqlens": offsets}))
    conv = conv_cases.make_inputs(conv_cases.ConvCase("packed", lengths=(4, 6)))
    with pytest.raises(ArgumentError, match=message):
        causal_conv1d(**(conv | {"cu_seqlens": offsets}))


BAD_CONVOLUTIONS = [
    ({"x": torch.zeros(5, 6)}, r"x: got shape \(5, 6\)"),
    ({"weight": torch.zeros(5, 4)}, r"weight: got shape \(5, 4\), expected \(channels, width\) = \(6, at least 1\)"),
    ({"weight": torch.zeros(6, 4, dtype=torch.int32)}, r"weight: got torch\.int32"),
    ({"bias": torch.zeros(7)}, r"bias: got shape \(7,\), expected \(6,\)"),
    ({"activation": "gelu"}, r"activation: got 'gelu', allowed are None and 'silu'"),
    ({"initial_state": torch.zeros(2, 4, 6)}, r"initial_state: got shape \(2, 4, 6\), expected \(2, 3, 6\)"),
    ({"initial_state": torch.zeros(2, 3, 6, dtype=torch.complex64)}, r"initial_state: got torch\.complex64"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONVOLUTIONS, ids=[message[:24] for _, message in BAD_CONVOLUTIONS])
def test_convolution(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        causal_conv1d(**(conv_cases.make_inputs(CONV) | change))


def test_steps() -> None:
    state, x, A, B = torch.zeros(2, 6, 3), torch.zeros(2, 6), -torch.ones(6, 3), torch.zeros(2, 3)
    with pytest.raises(ArgumentError, match=r"state: got shape \(2, 6, 3\), expected \(2, 6, 4\)"):
        selective_state_update(state, x, x, -torch.ones(6, 4), torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ArgumentError, match=r"B: got shape \(6, 3\), expected \(2, 3\)"):
        selective_state_update(state, x, x, A, torch.zeros(6, 3), B)
    with pytest.raises(ArgumentError, match="inplace: a gradient is recorded"):
        selective_state_update(state, x.clone().requires_grad_(), x, A, B, B, inplace=True)
    with pytest.raises(ArgumentError, match=r"state: got torch\.float64, expected torch\.float32"):
        selective_state_update(state.double(), x, x, A, B, B, inplace=True)
    with pytest.raises(ArgumentError, match=r"^state: is complex while A is real"):
        selective_state_update(state.to(torch.complex64), x, x, A, B, B)
    with pytest.raises(ArgumentError, match=r"^state: got torch\.int64"):
        selective_state_update(state.long(), x, x, A, B, B)
    with pytest.raises(ArgumentError, match=r"^state: got torch\.complex64"):
        causal_conv1d_update(torch.zeros(2, 1, 6, dtype=torch.complex64), x, torch.zeros(6, 2))
    with pytest.raises(ArgumentError, match=r"state: got shape \(2, 3, 6\), expected \(2, 1, 6\)"):
        causal_conv1d_update(torch.zeros(2, 3, 6), x, torch.zeros(6, 2))
    with pytest.raises(ArgumentError, match="inplace: a gradient is recorded"):
        causal_conv1d_update(torch.zeros(2, 1, 6), x, torch.zeros(6, 2, requires_grad=True), inplace=True)


def test_a_named_backend_never_falls_back() -> None:
    inputs = scan_cases.make_inputs(SCAN, dtype=torch.float64)
    assert selective_scan(**inputs).dtype == torch.float64
    with pytest.raises(BackendError, match=r"backend 'cpu' cannot serve this selective_scan: .*float64"):
        selective_scan(**inputs, backend="cpu")
    with backend("cpu"), pytest.raises(BackendError, match="float64"):
        selective_scan(**inputs)
    with pytest.raises(ArgumentError, match="backend: got 'gpu'"), backend("gpu"):
        pass


def test_a_tangent_is_refused() -> None:
    """Wherever it comes in: as an argument or a parameter."""
    inputs = scan_cases.make_inputs(SCAN)
    for name in ("x", "A", "initial_state"):

        def scan(tensor: torch.Tensor, name: str = name) -> torch.Tensor:
            return selective_scan(**(inputs | {name: tensor}))

        with pytest.raises(ArgumentError, match=f"{name}: has a tangent"):
            torch.func.jvp(scan, (inputs[name],), (inputs[name],))


def test_a_second_derivative_is_refused() -> None:
    inputs = scan_cases.make_inputs(SCAN)
    inputs["x"].requires_grad_()
    y = selective_scan(**inputs)
    (grad,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(LongscanError, match="selective_scan: has no second derivative"):
        grad.sum().backward()
