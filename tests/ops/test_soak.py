"""Operators on calls drawn at random, every fast backend against the float64 definition: outputs and all gradients.

A handful of calls an operator here; ``-m soak`` draws LONGSCAN_CASES in all, 10,000 unless told, from LONGSCAN_SEED.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from longscan import ops
from longscan.ops.add_rms_norm import cases as norm
from longscan.ops.cauchy import cases as cauchy
from longscan.ops.causal_conv1d import cases as conv
from longscan.ops.decay_attention import cases as decay
from longscan.ops.linear_cross_entropy import cases as loss
from longscan.ops.linear_scan import cases as linear
from longscan.ops.long_conv import cases as long
from longscan.ops.selective_scan import cases as scan
from longscan.ops.vandermonde import cases as vandermonde
from tests.ops.agreement import TOLERANCE, assert_close, in_float64, outputs_and_gradients
from tests.soak import record

CASES, SEED = (int(os.environ.get(f"LONGSCAN_{name}", default)) for name, default in (("CASES", 10_000), ("SEED", 0)))
DAILY = 6
#: Rounded to so much, sums over a whole drawn call still agree.
WIDER = 3

BATCHES, LENGTHS, CHANNELS = st.integers(1, 3), st.integers(1, 150), st.integers(1, 40)
PACKED = st.none() | st.lists(st.integers(0, 70), min_size=1, max_size=5).filter(any).map(tuple)
YES = st.booleans()
ROWS = st.lists(st.integers(1, 3), max_size=2).map(tuple)
WIDE, ALL = (torch.float32,), tuple(TOLERANCE)
Outputs = tuple[Tensor, ...]


class Subject(NamedTuple):
    """An operator: how its calls are drawn and made, and which backends and dtypes it has here."""

    cases: ModuleType
    drawn: st.SearchStrategy[Any]
    call: Callable[[Any, str], Callable[..., Outputs]]
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = ALL


def of_groups(groups: int) -> st.SearchStrategy[scan.ScanCase]:
    sides = st.sampled_from(["step", "step", "constant"])
    return st.builds(
        scan.ScanCase, st.just("drawn"), batch=BATCHES, length=LENGTHS, channels=st.integers(1, 14).map(groups.__mul__),
        state=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 32]), groups=st.just(groups), b=sides, c=sides, complex=YES,
        skip=YES, gate=YES, bias=YES, softplus=YES, initial=YES, lengths=PACKED,
    )  # fmt: skip


def of_heads(groups: int) -> st.SearchStrategy[decay.DecayCase]:
    return st.builds(
        decay.DecayCase, st.just("drawn"), batch=BATCHES, length=LENGTHS, heads=st.integers(1, 3).map(groups.__mul__),
        d_k=st.integers(1, 20), d_v=st.integers(1, 20), decay=st.sampled_from(["none", "head", "step"]), initial=YES,
        lengths=PACKED, groups=st.just(groups),
    )  # fmt: skip


def wrap(function: Callable[..., Any], **options: Any) -> Callable[..., Outputs]:
    def call(**inputs: Tensor | None) -> Outputs:
        out = function(**inputs, **options)
        return out if isinstance(out, tuple) else (out,)

    return call


SUBJECTS = {
    "selective_scan": Subject(
        scan, st.integers(1, 3).flatmap(of_groups),
        lambda case, name: wrap(ops.selective_scan, dt_softplus=case.softplus, return_final_state=True, backend=name),
        ("cpu",),
    ),
    "causal_conv1d": Subject(
        conv,
        st.builds(
            conv.ConvCase, st.just("drawn"), BATCHES, LENGTHS, CHANNELS, st.integers(1, 8), YES, YES, YES, PACKED,
        ),
        lambda case, name: wrap(
            ops.causal_conv1d, activation="silu" if case.silu else None, return_final_state=True, backend=name
        ),
        ("cpu",),
    ),
    "linear_scan": Subject(
        linear,
        st.builds(
            linear.LinearCase, st.just("drawn"), BATCHES, LENGTHS, CHANNELS,
            st.sets(st.sampled_from(["batch", "time", "channel"])).map(tuple), YES, YES, PACKED,
        ),
        lambda case, name: wrap(ops.linear_scan, return_final_state=True, backend=name),
        ("cpu", "chunked"), WIDE,
    ),
    "decay_attention": Subject(
        decay, st.integers(1, 3).flatmap(of_heads),
        lambda case, name: wrap(
            ops.decay_attention, normalise=case.normalise, return_final_state=True, backend=name
        ),
        ("chunked",),
    ),
    "long_conv": Subject(
        long,
        st.builds(
            long.LongConvCase, st.just("drawn"), BATCHES, st.integers(1, 300), st.just(6), st.integers(1, 60),
            st.sampled_from([None, 1, 2, 3, 6]), YES, st.none() | st.integers(0, 60), PACKED,
        ),
        lambda case, name: wrap(ops.long_conv, return_final_state=True, backend=name),
        ("fft",),
    ),
    "vandermonde": Subject(
        vandermonde,
        st.builds(vandermonde.VandermondeCase, st.just("drawn"), LENGTHS, ROWS, st.integers(1, 9), st.integers(1, 20)),
        lambda case, name: wrap(ops.vandermonde, length=case.length, backend=name),
        ("chunked",), WIDE,
    ),
    "cauchy": Subject(
        cauchy,
        st.builds(cauchy.CauchyCase, st.just("drawn"), LENGTHS, ROWS, st.integers(1, 9), st.integers(1, 20)),
        lambda case, name: wrap(ops.cauchy, backend=name),
        ("cpu", "chunked"), WIDE,
    ),
    "add_rms_norm": Subject(
        norm,
        st.builds(
            norm.NormCase, st.just("drawn"), st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), YES,
            st.just(torch.float32), YES,
        ),
        lambda case, name: wrap(ops.add_rms_norm, residual_dtype=case.residual_dtype, backend=name),
        ("cpu",),
    ),
    "linear_cross_entropy": Subject(
        loss,
        st.builds(
            loss.LossCase, st.just("drawn"), st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
            st.integers(1, 90), st.integers(0, 8), st.just(False),
        ),
        lambda case, name: wrap(ops.linear_cross_entropy, vocab_size=case.vocabulary, backend=name),
        ("reference",), WIDE,
    ),
}  # fmt: skip


def agrees(subject: Subject, case: Any, backend: str, dtype: torch.dtype, seed: int) -> None:
    inputs = subject.cases.make_inputs(case, dtype=dtype, seed=seed)
    names = subject.cases.NAMES
    ours = outputs_and_gradients(subject.call(case, backend), inputs, names)
    truth = outputs_and_gradients(subject.call(case, "reference"), in_float64(inputs), names)
    assert_close(ours, truth, WIDER * TOLERANCE[dtype])


@pytest.fixture(scope="module")
def soaked() -> Iterator[dict[str, Any]]:
    """What the soak finds, by operator."""
    found: dict[str, Any] = {}
    yield found
    if found:
        cases, disagreements = (sum(each[key] for each in found.values()) for key in ("cases", "disagreements"))
        record("operators", {"cases": cases, "disagreements": disagreements, "seed": SEED, "operators": found})


@pytest.mark.parametrize(
    ("name", "examples"),
    [(name, DAILY) for name in SUBJECTS]
    + [pytest.param(name, -(-CASES // len(SUBJECTS)), marks=pytest.mark.soak) for name in SUBJECTS],
)
def test_drawn_calls_agree_with_the_definition(
    name: str, examples: int, soaked: dict[str, Any], countdown: Callable[[Iterable[int], int], Iterator[int]]
) -> None:
    subject, daily = SUBJECTS[name], examples == DAILY
    calls = iter(range(examples)) if daily else countdown(range(examples), examples)
    cases, disagreements, begin = 0, [], time.perf_counter()

    # One wrong answer does not end the search for others.
    @seed(SEED)
    @settings(
        max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        database=None,
    )  # fmt: skip
    @given(
        case=subject.drawn,
        backend=st.sampled_from(subject.backends),
        dtype=st.sampled_from(subject.dtypes),
        numbers=st.integers(0, 2**31),
    )
    def check(case: Any, backend: str, dtype: torch.dtype, numbers: int) -> None:
        nonlocal cases
        next(calls, None)
        cases += 1
        try:
            agrees(subject, case, backend, dtype, numbers)
        except AssertionError as error:
            disagreements.append(f"{case}, {backend}, {dtype}, seed {numbers}: {error}")

    check()
    # The bar ends with its items.
    list(calls)
    if not daily:
        seconds = round(time.perf_counter() - begin, 1)
        soaked[name] = {
            "cases": cases, "disagreements": len(disagreements), "seconds": seconds, "which": disagreements[:5],
        }  # fmt: skip
    assert cases >= examples, "too few calls were drawn"
    assert not disagreements, "\n\n".join(disagreements[:5])
