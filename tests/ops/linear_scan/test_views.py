"""The linear scan drawn by hypothesis: whole == cut anywhere == steps; packed == separate; the past alone counts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.ops import linear_scan
from longscan.ops.linear_scan.cases import NAMES, LinearCase, make_inputs
from tests.ops.agreement import assert_close, outputs_and_gradients

# float64 leaves rounding no room to hide a fault.
BACKENDS = pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-11), ("chunked", torch.float64, 1e-11), ("cpu", torch.float32, 2e-5)],
    ids=["reference", "chunked", "cpu"],
)


@st.composite
def cases(draw: st.DrawFn, longest: int = 60) -> LinearCase:
    return LinearCase(
        "drawn",
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, longest)),
        channels=draw(st.integers(1, 40)),
        decay=tuple(draw(st.sets(st.sampled_from(["batch", "time", "channel"])))),
        complex=draw(st.booleans()),
        initial=draw(st.booleans()),
    )


def cut(inputs: dict, start: int, end: int) -> dict:
    """The part of a call's inputs between two times; what is constant stays."""
    return {
        name: tensor[:, start:end] if tensor is not None and tensor.dim() == 3 and tensor.shape[1] > 1 else tensor
        for name, tensor in inputs.items()
    }


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(case=cases(), data=st.data())
def test_cut_anywhere_is_the_whole(case, data, backend, dtype, tolerance) -> None:
    inputs = make_inputs(case, dtype=dtype)
    borders = sorted(data.draw(st.sets(st.integers(1, case.length - 1), max_size=3))) if case.length > 1 else []
    whole = partial(linear_scan, return_final_state=True, backend=backend)

    def pieces(**tensors):
        state, outputs = tensors.pop("initial_state"), []
        for start, end in pairwise([0, *borders, case.length]):
            h, state = whole(**cut(tensors, start, end), initial_state=state)
            outputs.append(h)
        return torch.cat(outputs, 1), state

    ours = outputs_and_gradients(pieces, inputs, NAMES)
    assert_close(ours, outputs_and_gradients(whole, inputs, NAMES), tolerance)


@BACKENDS
@settings(max_examples=10, deadline=None)
@given(case=cases(longest=12))
def test_the_whole_is_the_recurrence(case, backend, dtype, tolerance) -> None:
    inputs = make_inputs(case, dtype=dtype)

    def steps(a, b, initial_state):
        h = torch.zeros_like(b[:, 0]) if initial_state is None else initial_state
        outputs = []
        for decay, add in zip(a.expand(b.shape).unbind(1), b.unbind(1), strict=True):
            h = decay * h + add
            outputs.append(h)
        return torch.stack(outputs, 1), h

    ours = outputs_and_gradients(partial(linear_scan, return_final_state=True, backend=backend), inputs, NAMES)
    assert_close(ours, outputs_and_gradients(steps, inputs, NAMES), tolerance)


@BACKENDS
@settings(max_examples=10, deadline=None)
@given(case=cases(), lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(sum))
def test_packed_sequences_are_separate_ones(case, lengths, backend, dtype, tolerance) -> None:
    inputs = make_inputs(replace(case, lengths=tuple(lengths), batch=1), dtype=dtype)
    packed = partial(linear_scan, return_final_state=True, backend=backend)

    def separate(cu_seqlens, initial_state, **tensors):
        outputs, finals = [], []
        for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            state = None if initial_state is None else initial_state[i : i + 1]
            if start == end:
                finals.append(torch.zeros_like(tensors["b"][:, 0]) if state is None else state)
                continue
            h, final = packed(**cut(tensors, start, end), initial_state=state)
            outputs.append(h)
            finals.append(final)
        return torch.cat(outputs, 1), torch.cat(finals)

    ours = outputs_and_gradients(packed, inputs, NAMES)
    assert_close(ours, outputs_and_gradients(separate, inputs, NAMES), tolerance)


@BACKENDS
@settings(max_examples=8, deadline=None)
@given(case=cases(), data=st.data())
def test_the_future_cannot_alter_the_past(case, data, backend, dtype, tolerance) -> None:
    inputs = make_inputs(case, dtype=dtype)
    t = data.draw(st.integers(0, case.length - 1))
    before = linear_scan(**inputs, backend=backend)
    inputs["b"][:, t:] = 7.0
    assert torch.equal(before[:, :t], linear_scan(**inputs, backend=backend)[:, :t])
