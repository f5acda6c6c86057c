"""Decay attention drawn by hypothesis: whole == cut anywhere == steps; packed == separate; and as PyTorch sees it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.ops import decay_attention, decay_attention_update
from longscan.ops.decay_attention.cases import CASES, NAMES, DecayCase, make_inputs
from tests.ops.agreement import assert_close, outputs_and_gradients

BACKENDS = pytest.mark.parametrize("backend", ["chunked", "reference"])


@st.composite
def cases(draw: st.DrawFn, longest: int = 150) -> DecayCase:
    return DecayCase(
        "drawn",
        batch=draw(st.integers(1, 2)),
        length=draw(st.integers(1, longest)),
        heads=draw(st.integers(1, 3)),
        d_k=draw(st.integers(1, 9)),
        d_v=draw(st.integers(1, 9)),
        decay=draw(st.sampled_from(["none", "head", "step"])),
        normalise=draw(st.booleans()),
        initial=draw(st.booleans()),
    )


def cut(inputs: dict, start: int, end: int) -> dict:
    """The part of a call's inputs between two times; what is constant stays."""
    over_time = ("q", "k", "v", "log_decay")
    return {
        name: tensor[:, start:end] if name in over_time and tensor is not None and tensor.dim() > 2 else tensor
        for name, tensor in inputs.items()
    }


def whole_of(case: DecayCase, backend: str):
    def whole(**tensors):
        return decay_attention(**tensors, normalise=case.normalise, return_final_state=True, backend=backend)

    return whole


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(case=cases(), data=st.data())
def test_cut_anywhere_is_the_whole(case, data, backend) -> None:
    inputs = make_inputs(case, dtype=torch.float64)
    borders = sorted(data.draw(st.sets(st.integers(1, case.length - 1), max_size=3))) if case.length > 1 else []
    whole = whole_of(case, backend)

    def pieces(**tensors):
        state, outputs = tensors.pop("initial_state"), []
        for start, end in pairwise([0, *borders, case.length]):
            y, state = whole(**cut(tensors, start, end), initial_state=state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    ours = outputs_and_gradients(pieces, inputs, NAMES)
    assert_close(ours, outputs_and_gradients(whole, inputs, NAMES), 1e-10)


@BACKENDS
@settings(max_examples=10, deadline=None)
@given(case=cases(longest=8))
def test_steps_are_the_whole(case, backend) -> None:
    inputs = make_inputs(case, dtype=torch.float64)

    def steps(**tensors):
        state = tensors.pop("initial_state")
        if state is None:
            state = torch.zeros(case.batch, case.heads, case.d_k, case.d_v + case.normalise, dtype=torch.float64)
        outputs = []
        for t in range(case.length):
            now = {k: v[:, t] if v is not None and v.dim() > 2 else v for k, v in tensors.items()}
            y, state = decay_attention_update(state, **now, normalise=case.normalise, backend=backend)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    ours = outputs_and_gradients(steps, inputs, NAMES)
    assert_close(ours, outputs_and_gradients(whole_of(case, backend), inputs, NAMES), 1e-10)


@BACKENDS
@settings(max_examples=10, deadline=None)
@given(case=cases(), lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4).filter(sum))
def test_packed_sequences_are_separate_ones(case, lengths, backend) -> None:
    case = replace(case, lengths=tuple(lengths), batch=1)
    inputs = make_inputs(case, dtype=torch.float64)
    packed = whole_of(case, backend)

    def separate(cu_seqlens, initial_state, **tensors):
        outputs, finals = [], []
        for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            state = None if initial_state is None else initial_state[i : i + 1]
            if start == end:
                empty = torch.zeros(1, case.heads, case.d_k, case.d_v + case.normalise, dtype=torch.float64)
                finals.append(empty if state is None else state)
                continue
            y, final = packed(**cut(tensors, start, end), initial_state=state)
            outputs.append(y)
            finals.append(final)
        return torch.cat(outputs, 1), torch.cat(finals)

    ours = outputs_and_gradients(packed, inputs, NAMES)
    assert_close(ours, outputs_and_gradients(separate, inputs, NAMES), 1e-10)


@BACKENDS
@settings(max_examples=10, deadline=None)
@given(case=cases(), data=st.data())
def test_the_future_cannot_alter_the_past(case, data, backend) -> None:
    inputs = make_inputs(case)
    t = data.draw(st.integers(0, case.length - 1))
    before, _ = whole_of(case, backend)(**inputs)
    for name in NAMES[:3]:
        inputs[name][:, t:] = 7.0
    if case.decay == "step":
        inputs["log_decay"][:, t:] = -3.0
    after, _ = whole_of(case, backend)(**inputs)
    assert torch.equal(before[:, :t], after[:, :t])


@pytest.mark.compile
@BACKENDS
@pytest.mark.parametrize("name", ["step", "retention", "no-decay", "packed-states"])
def test_opcheck(name: str, backend: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case)
    tensors = [inputs[key] if inputs[key] is None else inputs[key].requires_grad_() for key in NAMES]
    operator = torch.ops.longscan.decay_attention.default
    torch.library.opcheck(operator, (*tensors, inputs.get("cu_seqlens"), case.normalise, backend))
    if case.lengths is None and case.initial:
        q, k, v, g, state = (tensor if tensor is None else tensor.detach() for tensor in tensors)
        step = (state, q[:, 0], k[:, 0], v[:, 0], g, backend)
        torch.library.opcheck(torch.ops.longscan.decay_attention_update_.default, step)


@pytest.mark.compile
def test_compiles_without_a_graph_break() -> None:
    def block(q, k, v, log_decay):
        y, state = decay_attention(q, k, v, log_decay, normalise=True, return_final_state=True)
        return y.sin(), state

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (33, 70):
        inputs = make_inputs(DecayCase("compiled", length=length, normalise=True))
        given = {name: inputs[name] for name in NAMES[:4]}
        ours = outputs_and_gradients(lambda **tensors: compiled(*tensors.values()), given, NAMES[:4])
        assert_close(ours, outputs_and_gradients(lambda **tensors: block(*tensors.values()), given, NAMES[:4]), 1e-6)


def test_autocast_narrows_activations_only() -> None:
    inputs = make_inputs(next(case for case in CASES if case.name == "retention"))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = decay_attention(**inputs, return_final_state=True)
    narrow = {k: v.bfloat16() if k in ("q", "k", "v") else v for k, v in inputs.items()}
    expected, expected_state = decay_attention(**narrow, return_final_state=True)
    assert y.dtype == torch.float32
    assert torch.equal(y.bfloat16(), expected)
    assert torch.equal(state, expected_state)
