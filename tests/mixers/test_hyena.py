"""Hyena against sums over lags, as the paper writes them; its filters; how its memory grows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.mixers import Hyena


def naive_filter(mixer: Hyena, lag: int) -> Tensor:
    """h at one lag, (n_filters, d_model)."""
    last = mixer.max_length - 1
    bands = (mixer.d_features - 1) // 2
    frequencies = [1e-4 + i * (bands - 1 - 1e-4) / (bands - 1) for i in range(bands)] if bands > 1 else [1e-4]
    waves = [
        complex(math.cos(angle), -math.sin(angle))
        for angle in (2 * math.pi * lag / (last + 1) * f for f in frequencies)
    ]
    features = [lag / last, *(wave.real for wave in waves), *(wave.imag for wave in waves)]
    hidden = torch.tensor(features, dtype=torch.float64)
    for layer in mixer.filter_network[:-1]:
        hidden = torch.sin(mixer.frequency * (layer.weight @ hidden + layer.bias))
    values = (mixer.filter_network[-1].weight @ hidden).view(mixer.n_filters, mixer.d_model)
    fast, slow = math.log(1e-2) / 0.3, math.log(1e-2) / 1.5
    rates = [slow + c * (fast - slow) / (mixer.d_model - 1) for c in range(mixer.d_model)]
    return values * torch.tensor([math.exp(rate * lag / last) for rate in rates], dtype=torch.float64)


def naive(mixer: Hyena, x: Tensor) -> Tensor:
    projected = mixer.in_proj(x)
    short = torch.zeros_like(projected) + mixer.conv1d.bias
    for lag in range(mixer.d_conv):
        short[:, lag:] += mixer.conv1d.weight[:, 0, mixer.d_conv - 1 - lag] * projected[:, : x.shape[1] - lag]
    *gates, z = short.chunk(mixer.order + 1, dim=-1)
    unfiltered = mixer.order - mixer.n_filters
    for n, gate in enumerate(gates):
        if n >= unfiltered:
            y = mixer.D[n - unfiltered] * z
            for lag in range(min(x.shape[1], mixer.max_length)):
                y[:, lag:] += naive_filter(mixer, lag)[n - unfiltered] * z[:, : x.shape[1] - lag]
            z = y
        z = gate * z
    return mixer.out_proj(z)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": 1},
        {"order": 3, "d_features": 7},
        {"order": 3, "filter_values": False},
        {"max_length": 6},
        {"d_features": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_it_is_its_definition(options: dict) -> None:
    torch.manual_seed(0)
    mixer = Hyena(4, **({"max_length": 40, "filter_width": 5} | options)).double()
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], naive(mixer, x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_bare_it_is_one_filter() -> None:
    torch.manual_seed(0)
    mixer = Hyena(4, max_length=6, filter_width=5, bare=True).double()
    assert not any("proj" in name or "conv" in name for name, _ in mixer.named_parameters())
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    y = mixer.D[0] * x
    for lag in range(6):
        y[:, lag:] += naive_filter(mixer, lag)[0] * x[:, : 11 - lag]
    torch.testing.assert_close(mixer(x)[0], y, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_filters_do_not_depend_on_how_many_lags_are_asked_for() -> None:
    mixer = Hyena(4, max_length=50).double()
    filters = mixer.filters(50)
    assert filters.shape == (2, 4, 50)
    torch.testing.assert_close(mixer.filters(7), filters[..., :7], rtol=1e-12, atol=1e-12)
    for length in (0, 51):
        with pytest.raises(ArgumentError, match="max_length"):
            mixer.filters(length)


@torch.no_grad()
def test_no_filter_reaches_beyond_max_length() -> None:
    mixer = Hyena(4, max_length=6, order=1, d_conv=1).double()
    x = torch.randn(1, 20, 4, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3] += 1
    difference = (mixer(x)[0] - mixer(changed)[0]).abs().amax((0, 2))
    assert (difference[3:9] > 1e-6).all()
    assert difference[9:].amax() < 1e-12


@pytest.mark.parametrize("filter_values", [True, False])
def test_the_state_grows_up_to_its_bound_and_no_further(filter_values: bool) -> None:
    mixer = Hyena(4, max_length=6, filter_values=filter_values)
    state = mixer.initial_state(2)
    sizes = []
    with torch.no_grad():
        for length in range(1, 10):
            _, state = mixer.step(torch.randn(2, 4), state)
            assert state.nbytes == mixer.state_bytes(2, length)
            sizes.append(state.nbytes)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[4] == sizes[-1]


def test_steps_compute_filters_when_the_past_outgrows_them_or_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = Hyena(4, max_length=24, filter_width=5).double()
    computed: list[int] = []
    original = Hyena.filters

    def counted(self: Hyena, length: int) -> Tensor:
        computed.append(length)
        return original(self, length)

    monkeypatch.setattr(Hyena, "filters", counted)
    x = torch.randn(2, 20, 4, dtype=torch.float64)
    state = mixer.initial_state(2)
    with torch.no_grad():
        for t in range(15):
            y, state = mixer.step(x[:, t], state)
        assert computed == [2, 6, 14, 24]
        torch.testing.assert_close(y, mixer(x[:, :15])[0][:, -1], rtol=1e-10, atol=1e-10)
        computed.clear()
        mixer.step(x[:, 15], state)
        assert not computed
        mixer.D.mul_(2)
        y, _ = mixer.step(x[:, 15], state)
        fresh, _ = mixer.step(x[:, 15], state.clone())
        assert computed == [24, 24]
        assert torch.equal(y, fresh)
    # Under gradients, what was kept is no help: it has none.
    y, _ = mixer.step(x[:, 15], state)
    assert torch.autograd.grad(y.sum(), mixer.frequency)[0].abs().amax() > 0


@pytest.mark.parametrize("max_length", [2, 100, 400])
@torch.no_grad()
def test_a_state_that_is_given_away_grows_in_place(max_length: int) -> None:
    torch.manual_seed(0)
    mixer = Hyena(4, max_length=max_length, filter_width=5).double()
    x = torch.randn(2, 300, 4, dtype=torch.float64)
    expected, _ = mixer(x)
    state, memories = mixer.initial_state(2), set()
    for t in range(300):
        y, state = mixer.step(x[:, t], state, inplace=True)
        torch.testing.assert_close(y, expected[:, t], rtol=1e-9, atol=1e-9)
        assert state.nbytes == mixer.double().state_bytes(2, t + 1)
        memories.add(state.room.memory.data_ptr())
        if t == 200:
            # A fork has memory of its own.
            fork = state.select([0, 1])
            mixer.step(torch.zeros(2, 4, dtype=torch.float64), fork, inplace=True)
    assert len(memories) <= 6


@torch.no_grad()
def test_rows_of_unlike_lengths_go_on_together() -> None:
    mixer = Hyena(4, max_length=30).double()
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    _, short = mixer(x[:1, :3], mixer.initial_state(1))
    _, long = mixer(x[1:, :8], mixer.initial_state(1))
    both = type(short).cat([short, long])
    y, _ = mixer(torch.cat((x[:1, 3:6], x[1:, 8:11])), both)
    torch.testing.assert_close(y[:1], mixer(x[:1])[0][:, 3:6], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[1:], mixer(x[1:])[0][:, 8:11], rtol=1e-10, atol=1e-10)


def test_options_that_make_no_sense() -> None:
    for options in (
        {"order": 0},
        {"order": 1, "filter_values": False},
        {"max_length": 1},
        {"d_features": 4},
        {"d_features": 1},
        {"d_conv": 0},
        {"filter_layers": 0},
    ):
        with pytest.raises(ArgumentError):
            Hyena(4, **options)  # type: ignore[arg-type]


def test_parameters_of_the_filters_are_not_decayed_and_stay_float32() -> None:
    mixer = Hyena(4).to(torch.bfloat16)
    for parameter in (*mixer.filter_network.parameters(), mixer.frequency, mixer.D):
        assert parameter._no_weight_decay
        assert parameter.dtype == torch.float32
    assert mixer.conv1d.weight.dtype == torch.bfloat16
