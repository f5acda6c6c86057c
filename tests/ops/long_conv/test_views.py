"""Long convolution drawn by hypothesis: whole == cut anywhere; packed == separate; and as PyTorch sees it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.ops import long_conv
from longscan.ops.long_conv.cases import FEW, NAMES, LongConvCase, make_inputs
from tests.ops.agreement import assert_close, outputs_and_gradients

BACKENDS = pytest.mark.parametrize("backend", ["fft", "reference"])


@st.composite
def cases(draw: st.DrawFn) -> LongConvCase:
    return LongConvCase(
        "drawn",
        batch=draw(st.integers(1, 2)),
        length=draw(st.integers(1, 400)),
        channels=4,
        taps=draw(st.integers(1, 40)),
        systems=draw(st.sampled_from([1, 2, 4])),
        skip=draw(st.booleans()),
        past=draw(st.none() | st.integers(0, 50)),
    )


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(case=cases(), data=st.data())
def test_cut_anywhere_is_the_whole(case, data, backend) -> None:
    inputs = make_inputs(case, dtype=torch.float64)
    borders = sorted(data.draw(st.sets(st.integers(1, case.length - 1), max_size=3))) if case.length > 1 else []
    whole = partial(long_conv, return_final_state=True, backend=backend)

    def pieces(u, kernel, D, initial_state):
        outputs = []
        for start, end in pairwise([0, *borders, case.length]):
            y, initial_state = whole(u[:, start:end], kernel, D, initial_state)
            outputs.append(y)
        return torch.cat(outputs, 1), initial_state

    ours = outputs_and_gradients(pieces, inputs, NAMES)
    assert_close(ours, outputs_and_gradients(whole, inputs, NAMES), 1e-11)


@BACKENDS
@settings(max_examples=10, deadline=None)
@given(case=cases(), lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(sum))
def test_packed_sequences_are_separate_ones(case, lengths, backend) -> None:
    case = replace(case, lengths=tuple(lengths), batch=1)
    inputs = make_inputs(case, dtype=torch.float64)
    packed = partial(long_conv, return_final_state=True, backend=backend)

    def separate(u, kernel, D, initial_state, cu_seqlens):
        outputs, finals = [], []
        for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            state = u.new_zeros(1, 0, 4) if initial_state is None else initial_state[i : i + 1]
            if start == end:
                kept = state[:, max(0, state.shape[1] - case.taps + 1) :]
                finals.append(F.pad(kept, (0, 0, case.taps - 1 - kept.shape[1], 0)))
                continue
            y, final = packed(u[:, start:end], kernel, D, state)
            outputs.append(y)
            finals.append(final)
        return torch.cat(outputs, 1), torch.cat(finals)

    ours = outputs_and_gradients(packed, inputs, NAMES)
    assert_close(ours, outputs_and_gradients(separate, inputs, NAMES), 1e-11)


@pytest.mark.compile
@BACKENDS
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_opcheck(case: LongConvCase, backend: str) -> None:
    inputs = make_inputs(case)
    tensors = [inputs[key] if inputs[key] is None else inputs[key].requires_grad_() for key in NAMES if key != "D"]
    torch.library.opcheck(torch.ops.longscan.long_conv.default, (*tensors, inputs.get("cu_seqlens"), backend))


@pytest.mark.compile
def test_compiles_without_a_graph_break() -> None:
    def block(u, kernel, D, initial_state):
        y, state = long_conv(u, kernel, D, initial_state, return_final_state=True)
        return y.sin(), state

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (33, 70):
        inputs = make_inputs(LongConvCase("compiled", length=length, past=7))
        ours = outputs_and_gradients(lambda **tensors: compiled(*tensors.values()), inputs, NAMES)
        assert_close(ours, outputs_and_gradients(lambda **tensors: block(*tensors.values()), inputs, NAMES), 1e-6)


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs(LongConvCase("autocast", past=7))
    expected = long_conv(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = long_conv(**inputs)
    assert torch.equal(y, expected)
