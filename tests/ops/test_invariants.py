"""What must hold whatever the numbers: whole == cut anywhere == steps; packed == separate; the past alone counts.

Outputs, final states and gradients, drawn over shapes and options by hypothesis.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.ops import causal_conv1d, decay_attention, selective_scan, selective_state_update
from longscan.ops.causal_conv1d import cases as conv_cases
from longscan.ops.selective_scan import cases as scan_cases
from tests.ops.agreement import assert_close, outputs_and_gradients

OVER_TIME = ("x", "dt", "z", "B", "C")
# float64 leaves rounding no room to hide a fault; only the reference serves it.
BACKENDS = pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-10), ("cpu", torch.float32, 5e-5)],
    ids=["reference", "cpu"],
)


@st.composite
def scans(draw: st.DrawFn, max_length: int = 40) -> scan_cases.ScanCase:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return scan_cases.ScanCase(
        "drawn",
        batch=draw(st.integers(1, 2)),
        length=draw(st.integers(1, max_length)),
        channels=groups * draw(st.integers(1, 7)),
        state=draw(st.sampled_from([1, 2, 3, 8, 16])),
        groups=groups,
        b=draw(st.sampled_from(["step", "step", "constant"])),
        c=draw(st.sampled_from(["step", "step", "constant"])),
        complex=draw(st.booleans()),
        skip=draw(st.booleans()),
        gate=draw(st.booleans()),
        softplus=draw(st.booleans()),
        initial=draw(st.booleans()),
    )


def cut(inputs: dict, start: int, end: int) -> dict:
    """The part of a scan's inputs between two times; constants stay."""
    out = {}
    for name, tensor in inputs.items():
        varies = name in OVER_TIME and tensor is not None and tensor.dim() > 2
        out[name] = tensor[:, start:end] if varies else tensor
    return out


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(case=scans(), data=st.data())
def test_a_scan_cut_anywhere_is_the_whole_scan(case, data, backend, dtype, tolerance) -> None:
    inputs = scan_cases.make_inputs(case, dtype=dtype)
    borders = sorted(data.draw(st.sets(st.integers(1, case.length - 1), max_size=3))) if case.length > 1 else []

    def whole(**tensors):
        return selective_scan(**tensors, dt_softplus=case.softplus, return_final_state=True, backend=backend)

    def pieces(**tensors):
        state, outputs = tensors.pop("initial_state"), []
        for start, end in zip([0, *borders], [*borders, case.length], strict=True):
            y, state = whole(**cut(tensors, start, end), initial_state=state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    ours = outputs_and_gradients(pieces, inputs, scan_cases.NAMES)
    assert_close(ours, outputs_and_gradients(whole, inputs, scan_cases.NAMES), tolerance)


@BACKENDS
@settings(max_examples=10, deadline=None)
@given(case=scans(max_length=8))
def test_a_scan_is_its_steps(case, backend, dtype, tolerance) -> None:
    inputs = scan_cases.make_inputs(case, dtype=dtype)

    def whole(**tensors):
        return selective_scan(**tensors, dt_softplus=case.softplus, return_final_state=True, backend=backend)

    def steps(**tensors):
        state = tensors.pop("initial_state")
        if state is None:
            state = torch.zeros(case.batch, case.channels, case.state, dtype=tensors["A"].dtype)
        for name in ("B", "C"):
            if tensors[name].dim() == 2:
                tensors[name] = tensors[name].expand(case.batch, case.length, -1, -1)
        outputs = []
        for t in range(case.length):
            now = {k: v[:, t] if k in OVER_TIME and v is not None else v for k, v in tensors.items()}
            y, state = selective_state_update(state, **now, dt_softplus=case.softplus, backend=backend)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    ours = outputs_and_gradients(steps, inputs, scan_cases.NAMES)
    assert_close(ours, outputs_and_gradients(whole, inputs, scan_cases.NAMES), tolerance)


@BACKENDS
@settings(max_examples=10, deadline=None)
@given(case=scans(), lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(sum))
def test_packed_sequences_are_separate_ones(case, lengths, backend, dtype, tolerance) -> None:
    from dataclasses import replace

    case = replace(case, lengths=tuple(lengths), batch=1)
    inputs = scan_cases.make_inputs(case, dtype=dtype)

    def packed(**tensors):
        return selective_scan(**tensors, dt_softplus=case.softplus, return_final_state=True, backend=backend)

    def separate(cu_seqlens, initial_state, **tensors):
        outputs, finals = [], []
        for i, (start, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
            state = None if initial_state is None else initial_state[i : i + 1]
            if start == end:
                empty = torch.zeros(1, case.channels, case.state, dtype=tensors["A"].dtype)
                finals.append(empty if state is None else state)
                continue
            y, final = packed(**cut(tensors, start, end), initial_state=state)
            outputs.append(y)
            finals.append(final)
        return torch.cat(outputs, 1), torch.cat(finals)

    ours = outputs_and_gradients(packed, inputs, scan_cases.NAMES)
    assert_close(ours, outputs_and_gradients(separate, inputs, scan_cases.NAMES), tolerance)


@BACKENDS
@settings(max_examples=10, deadline=None)
@given(case=scans(), data=st.data())
def test_the_future_cannot_alter_the_past(case, data, backend, dtype, tolerance) -> None:
    inputs = scan_cases.make_inputs(case, dtype=dtype)
    t = data.draw(st.integers(0, case.length - 1))
    before = selective_scan(**inputs, dt_softplus=case.softplus, backend=backend)
    for name in OVER_TIME:
        if inputs[name] is not None and inputs[name].dim() > 2:
            inputs[name][:, t:] = float("nan")
    after = selective_scan(**inputs, dt_softplus=case.softplus, backend=backend)
    assert torch.equal(before[:, :t], after[:, :t])


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 30), width=st.integers(1, 6), channels=st.integers(1, 20), data=st.data())
def test_a_convolution_cut_anywhere_is_the_whole(length, width, channels, data, backend, dtype, tolerance) -> None:
    case = conv_cases.ConvCase("drawn", 2, length, channels, width, initial=data.draw(st.booleans()))
    inputs = conv_cases.make_inputs(case, dtype=dtype)
    borders = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []

    def whole(**tensors):
        return causal_conv1d(**tensors, activation="silu", return_final_state=True, backend=backend)

    def pieces(x, initial_state, **filters):
        outputs, state = [], initial_state
        for start, end in zip([0, *borders], [*borders, length], strict=True):
            y, state = whole(x=x[:, start:end], initial_state=state, **filters)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    ours = outputs_and_gradients(pieces, inputs, conv_cases.NAMES)
    assert_close(ours, outputs_and_gradients(whole, inputs, conv_cases.NAMES), tolerance)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_outputs_are_the_caller_s_own(backend: str) -> None:
    """They can be changed in place, as any result of PyTorch's, also where gradients are recorded."""
    x, A = torch.randn(2, 5, 6, requires_grad=True), -torch.rand(6, 3)
    B = torch.randn(2, 5, 3, requires_grad=True)
    heads = torch.randn(2, 5, 2, 3, requires_grad=True)
    outputs = [
        *selective_scan(x, torch.rand(2, 5, 6), A, B, B, return_final_state=True, backend=backend),
        *causal_conv1d(x, torch.randn(6, 4), return_final_state=True, backend=backend),
        *decay_attention(heads, heads, heads, return_final_state=True, backend=backend),
    ]
    for output in outputs:
        output += 1
    sum(output.sum() for output in outputs).backward()
    assert x.grad is not None
