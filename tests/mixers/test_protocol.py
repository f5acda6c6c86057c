"""The views of a mixer are one model: whole, cut anywhere, token by token, packed, and as a convolution."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.mixers import MIXERS
from longscan.nn import SequenceMixer, State
from tests.mixers.systems import D_MODEL, VARIANTS, make

all_variants = pytest.mark.parametrize("variant", VARIANTS)
few = settings(max_examples=6, deadline=None, derandomize=True)
seeds = st.integers(0, 2**16)


def same(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def inputs(batch: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, D_MODEL, dtype=torch.float64, generator=generator)


def in_pieces(mixer: SequenceMixer, x: Tensor, sizes: list[int], state: State | None = None) -> tuple[Tensor, State]:
    state = mixer.initial_state(x.shape[0]) if state is None else state
    outputs = []
    for piece in x.split(sizes, dim=1):
        y, state = mixer(piece, state)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def gradients(mixer: SequenceMixer, x: Tensor, y: Tensor, weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((y * weights).sum(), [x, *mixer.parameters()]))


def test_every_registered_mixer_is_tested() -> None:
    assert {name for name, _ in VARIANTS.values()} == set(MIXERS)


@all_variants
@few
@given(seed=seeds, batch=st.integers(1, 3), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_whole_is_cut_anywhere_in_outputs_and_gradients(variant: str, seed: int, batch: int, sizes: list[int]) -> None:
    mixer = make(variant, seed)
    x = inputs(batch, sum(sizes), seed).requires_grad_()
    weights = inputs(batch, sum(sizes), seed + 1)
    whole, nothing = mixer(x)
    assert nothing is None
    cut, _ = in_pieces(mixer, x, sizes)
    same(cut, whole)
    for one, other in zip(gradients(mixer, x, whole, weights), gradients(mixer, x, cut, weights), strict=True):
        same(one, other)


@all_variants
@few
@given(seed=seeds, length=st.integers(1, 9))
def test_whole_is_token_by_token(variant: str, seed: int, length: int) -> None:
    mixer = make(variant, seed)
    x = inputs(2, length, seed)
    whole, _ = mixer(x)
    state, kept = mixer.initial_state(2), mixer.initial_state(2)
    for inplace in (False, True):
        with torch.set_grad_enabled(not inplace):
            outputs, now = [], state.clone() if inplace else state
            for t in range(length):
                y, now = mixer.step(x[:, t], now, inplace=inplace)
                outputs.append(y)
        same(torch.stack(outputs, dim=1), whole)
    for before, after in zip(kept.tensors(), state.tensors(), strict=True):
        assert torch.equal(before, after), "a functional call changed the caller's state"


@all_variants
@few
@given(seed=seeds, lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
def test_packed_is_each_alone(variant: str, seed: int, lengths: list[int]) -> None:
    mixer = make(variant, seed)
    x = inputs(1, sum(lengths), seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed, nothing = mixer(x, cu_seqlens=offsets)
    assert nothing is None
    # With a state: of an earlier, longer past, ragged from then on.
    _, before = mixer(inputs(len(lengths), 3, seed + 1), mixer.initial_state(len(lengths)))
    assert before is not None
    carried, after = mixer(x, before, cu_seqlens=offsets.int())
    assert after is not None
    following = inputs(len(lengths), 2, seed + 2)
    next_y, _ = mixer(following, after)
    for row, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        own: State | None = before.select([row])
        if end > start:
            alone, _ = mixer(x[:, start:end])
            same(packed[:, start:end], alone)
            alone, own = mixer(x[:, start:end], own)
            same(carried[:, start:end], alone)
        alone, _ = mixer(following[row : row + 1], own)
        same(next_y[row : row + 1], alone)


@all_variants
def test_packed_gradients_are_those_of_each_alone(variant: str) -> None:
    mixer = make(variant)
    x, weights = inputs(1, 9, 0).requires_grad_(), inputs(1, 9, 1)
    packed, _ = mixer(x, cu_seqlens=torch.tensor([0, 4, 5, 9]))
    alone = torch.cat([mixer(piece)[0] for piece in x.split([4, 1, 4], dim=1)], dim=1)
    for one, other in zip(gradients(mixer, x, packed, weights), gradients(mixer, x, alone, weights), strict=True):
        same(one, other)


@all_variants
def test_gradients_reach_the_state_that_came_in(variant: str) -> None:
    mixer = make(variant)
    first, second = inputs(2, 4, 0).requires_grad_(), inputs(2, 3, 1)
    _, state = mixer(first, mixer.initial_state(2))
    y, _ = mixer(second, state)
    (gradient,) = torch.autograd.grad(y.square().sum(), first)
    assert gradient.abs().amax() > 0
    assert state is not None
    y, _ = mixer(second, state.detach())
    assert torch.autograd.grad(y.square().sum(), first, allow_unused=True) == (None,)


@all_variants
@few
@given(seed=seeds, place=st.integers(0, 6))
def test_the_future_cannot_alter_the_past(variant: str, seed: int, place: int) -> None:
    mixer = make(variant, seed)
    x = inputs(2, 7, seed)
    changed = x.clone()
    changed[:, place:] += 1.0
    y, other = mixer(x)[0], mixer(changed)[0]
    # An FFT convolution mixes rounding errors over all places.
    same(y[:, :place], other[:, :place], 1e-12)
    assert not torch.allclose(y[:, place:], other[:, place:])


@all_variants
def test_rows_do_not_meet(variant: str) -> None:
    mixer = make(variant)
    x = inputs(3, 6, 0)
    y, state = mixer(x, mixer.initial_state(3))
    for row in range(3):
        alone, own = mixer(x[row : row + 1], mixer.initial_state(1))
        same(y[row : row + 1], alone)
        assert state is not None
        assert own is not None
        for one, other in zip(state.select([row]).tensors(), own.tensors(), strict=True):
            same(one, other)


@all_variants
def test_a_kernel_is_the_mixer_or_there_is_none(variant: str) -> None:
    mixer = make(variant)
    if mixer.time_invariant:
        assert mixer.convolution_kernel(7).shape == (D_MODEL, 7)
    else:
        with pytest.raises(ArgumentError, match=r"depends on its input|mixes channels"):
            mixer.convolution_kernel(7)


@all_variants
@pytest.mark.parametrize("length", [0, 5])
def test_state_bytes_are_what_the_state_holds(variant: str, length: int) -> None:
    mixer = make(variant, dtype=torch.float32)
    state: State | None = mixer.initial_state(3)
    if length:
        _, state = mixer(inputs(3, length, 0).float(), state)
    assert state is not None
    assert state.nbytes == mixer.state_bytes(3, length)


@all_variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(variant: str, dtype: torch.dtype) -> None:
    mixer = make(variant, dtype=torch.float32)
    x = inputs(2, 9, 0).float()
    expected, _ = mixer(x)
    low = make(variant, dtype=torch.float32).to(dtype)
    y, state = low(x.to(dtype), low.initial_state(2))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    cut, after = in_pieces(low, x.to(dtype), [4, 1, 4])
    torch.testing.assert_close(cut, y, rtol=0.05, atol=0.05)
    assert state is not None
    for one, other in zip(state.tensors(), after.tensors(), strict=True):
        assert one.dtype == other.dtype


@all_variants
def test_autocast(variant: str) -> None:
    mixer = make(variant, dtype=torch.float32)
    x = inputs(2, 9, 0).float().requires_grad_()
    expected, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = mixer(x)
        cut, state = in_pieces(mixer, x, [4, 1, 4])
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(cut.float(), expected, rtol=0.05, atol=0.05)
    for one, other in zip(state.tensors(), mixer.initial_state(2).tensors(), strict=True):
        assert one.dtype == other.dtype
    y.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in mixer.parameters())


@all_variants
@torch.no_grad()
def test_forward_mode_is_right_or_refused(variant: str) -> None:
    """PyTorch drops a custom operator's tangent, which would give a wrong derivative without a word."""
    mixer, x, direction, weights = make(variant), inputs(2, 5, 0), inputs(2, 5, 1), inputs(2, 5, 2)
    try:
        _, tangent = torch.func.jvp(lambda x: mixer(x)[0], (x,), (direction,))
    except (ArgumentError, NotImplementedError, RuntimeError) as error:
        # Ours, PyTorch's own operators' without a forward formula, and its autograd functions' without one.
        if not re.search("forward|jvp", str(error)):
            raise
        return
    with torch.enable_grad():
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((mixer(x)[0] * weights).sum(), x)
    same((tangent * weights).sum(), (gradient * direction).sum())


@all_variants
def test_what_goes_wrong_is_said(variant: str) -> None:
    mixer = make(variant, dtype=torch.float32)
    x = torch.randn(2, 5, D_MODEL)
    state = mixer.initial_state(2)
    with pytest.raises(ArgumentError, match=rf"\(batch, length, {D_MODEL}\).*\(2, 5, 9\)"):
        mixer(torch.randn(2, 5, D_MODEL + 1))
    with pytest.raises(ArgumentError, match="empty"):
        mixer(x[:0])
    with pytest.raises(ArgumentError, match="empty"):
        mixer(x[:, :0])
    with pytest.raises(ArgumentError, match=r"float64.*float32.*autocast"):
        mixer(x.double())
    with pytest.raises(ArgumentError, match="meta"):
        mixer(x.to("meta"))
    with pytest.raises(ArgumentError, match="2 sequences, the input has 1"):
        mixer(x[:1], state)
    with pytest.raises(ArgumentError, match="2 sequences, the input has 3"):
        mixer(x[:1], state, cu_seqlens=torch.tensor([0, 1, 2, 5]))
    with pytest.raises(ArgumentError, match="a tensor of offsets, got a list"):
        mixer(x[:1], cu_seqlens=[0, 5])
    with pytest.raises(ArgumentError, match="batch must be 1"):
        mixer(x, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ArgumentError, match="cu_seqlens"):
        mixer(x[:1], cu_seqlens=torch.tensor([0.0, 5.0]))
    for offsets in ([0, 3, 2, 5], [0, 4], [1, 5]):
        with pytest.raises(ArgumentError, match="cu_seqlens"):
            mixer(x[:1], cu_seqlens=torch.tensor(offsets))
    for batch in (0, -1, 1.5):
        with pytest.raises(ArgumentError, match="batch"):
            mixer.initial_state(batch)  # type: ignore[arg-type]
    others = (MIXERS[name](D_MODEL) for name in MIXERS if not isinstance(mixer, MIXERS[name]))
    for other in others:
        with pytest.raises(ArgumentError, match=r"state must be a .*State"):
            mixer(x, other.initial_state(2))


@pytest.mark.compile
@all_variants
def test_compiles_and_exports_whole(variant: str) -> None:
    mixer = make(variant, dtype=torch.float32)
    x = torch.randn(2, 6, D_MODEL)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, _ = compiled(x)
    expected, _ = mixer(x)
    same(y, expected, 1e-6)
    y.sum().backward()
    y, state = compiled(x, mixer.initial_state(2))
    same(y, expected, 1e-5)
    assert type(state) is type(mixer.initial_state(2))
    exported = torch.export.export(mixer, (x, mixer.initial_state(2)))
    y, state = exported.module()(x, mixer.initial_state(2))
    same(y, expected, 1e-5)
    assert type(state) is type(mixer.initial_state(2))
