"""causal_conv1d's functions against their definitions in float64: states, rings, padding, packed sequences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.integrations.mamba_ssm.conv import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
    causal_conv1d_varlen_states,
    causal_conv1d_varlen_states_ref,
)
from longscan.integrations.mamba_ssm.conv_functions import (
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
    causal_conv1d_update_function,
)
from longscan.ops.causal_conv1d import cpu
from tests.integrations.mamba_ssm import formulas
from tests.integrations.mamba_ssm.test_scan import Seen, place

BATCH, CHANNELS, LENGTH = 3, 5, 9


def arguments(width: int = 4, initial: bool = True, bias: bool = True) -> list[Any]:
    torch.manual_seed(0)
    return [
        torch.randn(BATCH, LENGTH, CHANNELS).transpose(1, 2),
        torch.randn(CHANNELS, width),
        torch.randn(CHANNELS) if bias else None,
        torch.randn(BATCH, CHANNELS, width - 1) if initial else None,
    ]


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("optional", [False, True])
def test_the_convolution_is_its_definition(width: int, activation: str | None, optional: bool) -> None:
    """Longer filters than the original's 2 to 4 as well; the gradient of the final states counts."""
    formulas.agree(
        lambda x, weight, bias, initial: causal_conv1d_fn(
            x, weight, bias, initial_states=initial, return_final_states=True, activation=activation
        ),
        lambda *tensors: formulas.conv(*tensors, silu=activation is not None),
        arguments(width, optional, optional),
    )


def test_the_reference_and_final_states_out() -> None:
    x, weight, bias, initial = arguments()
    out, final = causal_conv1d_ref(x, weight, bias, initial, True, activation="silu")
    into = torch.empty(BATCH, CHANNELS, 3)
    again, same = causal_conv1d_fn(x, weight, bias, None, initial, True, into, "silu")
    torch.testing.assert_close(again, out)
    assert torch.equal(into, final)
    assert same is into
    assert torch.equal(causal_conv1d_fn(x, weight, bias, None, initial, activation="silu"), again)


def test_a_short_sequence_keeps_what_came_before() -> None:
    x, weight, bias, initial = arguments()
    _, final = causal_conv1d_fn(x[..., :1], weight, bias, None, initial, True)
    assert torch.equal(final, torch.cat([initial[..., 1:], x[..., :1]], dim=-1))


def test_words_that_are_not_known() -> None:
    x, weight, *_ = arguments()
    with pytest.raises(ArgumentError, match="allowed are None, 'silu' and 'swish'"):
        causal_conv1d_fn(x, weight, activation="gelu")
    with pytest.raises(ArgumentError, match="x: got shape"):
        causal_conv1d_fn(x[0], weight)
    with pytest.raises(ArgumentError, match=r"seq_idx: got torch.float32"):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(BATCH, LENGTH))


# Packed sequences


def packed(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor | None, seq_idx: Tensor) -> tuple[Any, Any]:
    """One sequence after another, in float64."""
    out, final = torch.zeros_like(x), []
    for row, numbers in enumerate(seq_idx.tolist()):
        borders = [0, *(t for t in range(1, len(numbers)) if numbers[t] != numbers[t - 1]), len(numbers)]
        state = (
            torch.zeros(1, x.shape[1], weight.shape[1] - 1, dtype=x.dtype) if initial is None else initial[row, None]
        )
        first = True
        for start, end in pairwise(borders):
            if numbers[start] < 0:
                continue
            before = state if first else torch.zeros_like(state)
            out[row, :, start:end], state = formulas.conv(x[row, None, :, start:end], weight, bias, before, True)
            first = False
        final.append(state[0])
    return out, torch.stack(final)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 2), min_size=7, max_size=7), min_size=1, max_size=3), st.booleans())
def test_no_leak_between_packed_sequences(numbers: list[list[int]], with_initial: bool) -> None:
    """Any numbers, padding anywhere, with initial and final states, which the original refuses together."""
    seq_idx = torch.tensor(numbers, dtype=torch.int32)
    rows = seq_idx.shape[0]
    torch.manual_seed(0)
    initial = torch.randn(rows, CHANNELS, 3) if with_initial else None
    formulas.agree(
        lambda x, weight, bias, initial: causal_conv1d_fn(x, weight, bias, seq_idx, initial, True, None, "silu"),
        lambda x, weight, bias, initial: packed(x, weight, bias, initial, seq_idx),
        [
            torch.randn(rows, 7, CHANNELS).transpose(1, 2),
            torch.randn(CHANNELS, 4),
            torch.randn(CHANNELS),
            initial,
        ],
    )


def test_packed_rows_are_one_call_on_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch, cpu, "forward")
    x, weight, bias, _ = arguments()
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 9, [0] * 2 + [1] * 3 + [2] * 4], dtype=torch.int32)
    causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    causal_conv1d_fn(x, weight, bias, activation="silu")
    assert len(seen.calls) == 2
    assert seen.calls[0][0] is not None
    assert seen.calls[0][0][0] == x.data_ptr()
    assert seen.calls[1][0] == place(x.transpose(1, 2))


# Steps


def stepped(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """The definition: output, and the state after."""
    before = weight.shape[1] - 1
    y, _ = formulas.conv(x, weight, bias, state[..., state.shape[2] - before :], silu)
    return y, torch.cat([state, x], dim=-1)[..., -state.shape[2] :]


@pytest.mark.parametrize("function", [causal_conv1d_update, causal_conv1d_update_ref])
@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize("length", [None, 1, 2, 8])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_a_step_is_its_definition(width: int, length: int | None, extra: int, function: Any) -> None:
    torch.manual_seed(0)
    state = torch.randn(BATCH, CHANNELS, max(width - 1 + extra, 1))
    x = torch.randn(BATCH, CHANNELS) if length is None else torch.randn(BATCH, CHANNELS, length)
    weight, bias = torch.randn(CHANNELS, width), torch.randn(CHANNELS)
    expected, after = stepped(x[..., None] if length is None else x, state, weight, bias, True)
    got = function(x, state, weight, bias, "silu")
    torch.testing.assert_close(got, expected[..., 0] if length is None else expected)
    assert torch.equal(state, after)


def test_gradients_of_a_step_flow_through_the_state() -> None:
    def ours(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        state = state.clone()
        first = causal_conv1d_update(x[..., 0], state, weight, bias, "silu")
        return torch.stack([first, causal_conv1d_update(x[..., 1], state, weight, bias, "silu")], dim=-1), state

    torch.manual_seed(0)
    formulas.agree(
        ours,
        lambda *tensors: stepped(*tensors, silu=True),
        [torch.randn(BATCH, CHANNELS, 2), torch.randn(BATCH, CHANNELS, 4), *arguments()[1:3]],
    )


def test_one_token_moves_nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformers calls it: a state of `width` inputs, whose newest ones the operator updates where they lie."""
    seen = Seen(monkeypatch, cpu, "update")
    x, weight, bias, _ = arguments()
    state = torch.randn(BATCH, CHANNELS, 4)
    with torch.no_grad():
        causal_conv1d_update(x[..., :1], state, weight, bias, "silu")
    assert seen.calls[0][0] == place(state[..., 1:].transpose(1, 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(0, 3), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 9))
def test_a_ring_gives_what_the_whole_sequence_gives(width: int, extra: int, pieces: list[int], begun: int) -> None:
    torch.manual_seed(0)
    total = begun + sum(pieces)
    x = torch.randn(BATCH, CHANNELS, total)
    weight, bias = torch.randn(CHANNELS, width), torch.randn(CHANNELS)
    expected, _ = formulas.conv(x, weight, bias, None, True)
    state = torch.zeros(BATCH, CHANNELS, width - 1 + extra)
    done = 0
    for piece in ([begun] if begun else []) + pieces:
        count = torch.full((BATCH,), done, dtype=torch.int32)
        out = causal_conv1d_update(x[..., done : done + piece], state, weight, bias, "silu", cache_seqlens=count)
        torch.testing.assert_close(out, expected[..., done : done + piece])
        done += piece
    for last in range(max(0, total - state.shape[2]), total):
        assert torch.equal(state[..., last % state.shape[2]], x[..., last])


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_indices_choose_states_and_negative_ones_are_padding(length: int, ring: bool) -> None:
    torch.manual_seed(0)
    _, weight, bias, _ = arguments()
    x = torch.randn(BATCH, CHANNELS, length)
    states = torch.randn(7, CHANNELS, 5)
    count = torch.tensor([2, 0, 9], dtype=torch.int32) if ring else None
    expected, own = torch.zeros_like(x), states.clone()
    for row, entry in ((0, 6), (2, 0)):
        here = None if count is None else count[row : row + 1]
        alone = own[entry : entry + 1]
        expected[row] = causal_conv1d_update(x[row : row + 1], alone, weight, bias, "silu", here)[0]
    indices = torch.tensor([6, -1, 0], dtype=torch.int32)
    got = causal_conv1d_update(x, states, weight, bias, "silu", count, indices)
    torch.testing.assert_close(got, expected)
    assert torch.equal(states, own)


def test_states_of_another_dtype() -> None:
    """Under autocast the cache is float32 and the input is not."""
    x, weight, bias, _ = arguments()
    state = torch.randn(BATCH, CHANNELS, 4)
    expected, after = stepped(x[..., :1].bfloat16().float(), state, weight, bias, True)
    got = causal_conv1d_update(x[..., :1].bfloat16(), state, weight, bias, "silu")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=3e-2, atol=3e-2)
    assert torch.equal(state, after)


@pytest.mark.parametrize(
    ("shape", "indices", "words"),
    [
        ((BATCH, CHANNELS, 2), None, "at least width - 1 = 3"),
        ((BATCH + 1, CHANNELS, 4), None, "expected .batch, channels, state_len"),
        ((9, CHANNELS + 1, 4), torch.zeros(BATCH, dtype=torch.int32), "expected .entries, channels"),
        ((9, CHANNELS, 4), torch.zeros(2, dtype=torch.int32), "conv_state_indices: got shape"),
    ],
)
def test_states_are_checked(shape: tuple[int, ...], indices: Tensor | None, words: str) -> None:
    x, weight, bias, _ = arguments()
    with pytest.raises(ArgumentError, match=words):
        causal_conv1d_update(x, torch.zeros(shape), weight, bias, conv_state_indices=indices)


@pytest.mark.parametrize("function", [causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref])
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), state_len=st.integers(1, 4))
def test_states_of_packed_sequences(lengths: list[int], state_len: int, function: Any) -> None:
    torch.manual_seed(0)
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    x = torch.randn(max(offsets[-1], 1), CHANNELS)
    states = function(x, torch.tensor(offsets, dtype=torch.int32), state_len)
    assert states.shape == (len(lengths), CHANNELS, state_len)
    for state, (start, end) in zip(states, pairwise(offsets), strict=True):
        kept = x[max(start, end - state_len) : end].T
        assert torch.equal(state[:, state_len - kept.shape[1] :], kept)
        assert not state[:, : state_len - kept.shape[1]].any()


# The functions without autograd


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("pack", [False, True])
def test_forward_and_backward_functions(silu: bool, pack: bool) -> None:
    seq_idx = torch.tensor([[0] * 4 + [1] * 5] * BATCH, dtype=torch.int32) if pack else None
    given = formulas.leaves(arguments())
    out, final = causal_conv1d_fn(*given[:3], seq_idx, given[3], True, None, "silu" if silu else None)
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    expected = torch.autograd.grad([out, final], given, [dout, dfinal])

    x, weight, bias, initial = arguments()
    into = torch.empty_like(final)
    again = causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial, into, silu)
    assert torch.equal(again, out)
    assert torch.equal(into, final)
    dx = torch.empty_like(x)
    found = causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, initial, dfinal, dx, True, silu)
    assert found[0] is dx
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    no_bias = causal_conv1d_bwd_function(x, weight, None, dout, seq_idx, None, None, None, False, silu)
    assert no_bias[2:] == (None, None)


def test_gradient_of_an_initial_state_of_zeros() -> None:
    x, weight, bias, _ = arguments()
    zeros = torch.zeros(BATCH, CHANNELS, 3)
    dout = torch.randn_like(x)
    implied = causal_conv1d_bwd_function(x, weight, bias, dout, None, None, None, None, True, True)[3]
    written = causal_conv1d_bwd_function(x, weight, bias, dout, None, zeros, None, None, True, True)[3]
    assert implied is not None
    assert implied.any()
    torch.testing.assert_close(implied, written)


def test_update_function() -> None:
    x, weight, bias, _ = arguments()
    state = torch.randn(BATCH, CHANNELS, 4)
    same = state.clone()
    got = causal_conv1d_update_function(x, state, weight, bias, True, None, None)
    assert torch.equal(got, causal_conv1d_update(x, same, weight, bias, "silu"))
    assert torch.equal(state, same)
