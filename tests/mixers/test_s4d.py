"""S4D: kernel against its definition, convolution against kernel, memory of both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longscan.errors import ArgumentError
from longscan.mixers import S4D


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 31])
def test_kernel_is_its_definition(discretisation: str, length: int) -> None:
    torch.manual_seed(0)
    mixer = S4D(3, d_state=6, discretisation=discretisation).double()
    log_A_bar, B_bar, C, _ = mixer.system()
    powers = log_A_bar.exp()[..., None] ** torch.arange(length)
    expected = 2 * (C[..., None] * B_bar[..., None] * powers).sum(1).real
    torch.testing.assert_close(mixer.convolution_kernel(length), expected, rtol=1e-9, atol=1e-10)


def test_dss_exp_is_one_of_its_settings() -> None:
    """Gupta, Gu and Berant 2022 (arXiv 2203.14343), proposition 1: K_l = Re sum_n W_n (e^(dt a) - 1) / a e^(l dt a)."""
    torch.manual_seed(0)
    mixer = S4D(3, d_state=8, a_init="dss").double()
    A, dt = torch.complex(-mixer.A_log.exp(), mixer.A_imag)[..., None], mixer.log_dt.exp()[:, None, None]
    W = 2 * torch.view_as_complex(mixer.C)[..., None]
    expected = (W * (torch.exp(dt * A) - 1) / A * torch.exp(torch.arange(20) * dt * A)).sum(1).real
    torch.testing.assert_close(mixer.convolution_kernel(20), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(mixer.A_log[0].exp(), torch.full((4,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_discretisation_is_the_published_one() -> None:
    mixer = S4D(3, d_state=6).double()
    A, dt = torch.complex(-mixer.A_log.exp(), mixer.A_imag), mixer.log_dt.exp()[:, None]
    log_A_bar, B_bar, *_ = mixer.system()
    torch.testing.assert_close(log_A_bar.exp(), torch.exp(dt * A))
    torch.testing.assert_close(B_bar, (torch.exp(dt * A) - 1) / A)


def test_forward_is_the_convolution_with_the_kernel() -> None:
    torch.manual_seed(0)
    mixer = S4D(4, d_state=8).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    kernel = mixer.convolution_kernel(9)
    y = mixer.D * x
    for lag in range(9):
        y[:, lag:] += kernel[:, lag] * x[:, : 9 - lag]
    expected = F.glu(mixer.out_proj(F.gelu(y)), dim=-1)
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-9, atol=1e-10)


def test_float32_is_near_float64_over_a_long_sequence() -> None:
    torch.manual_seed(0)
    mixer = S4D(4)
    x = torch.randn(1, 4096, 4)
    y = mixer(x)[0]
    exact = mixer.double()(x.double())[0]
    assert (y - exact).abs().max() < 1e-4 * exact.abs().max()


def test_the_kernel_does_not_hold_states_times_length(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = S4D(4, d_state=64)
    length, largest = 10_000, 0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        saved: list[int] = []
        mixer.convolution_kernel(length)
        largest = max(saved)
    assert largest < 4 * 32 * length / 10


def test_options_that_make_no_sense() -> None:
    for options in (
        {"d_state": 3},
        {"d_state": "64"},
        {"a_init": "hippo"},
        {"discretisation": "euler"},
        {"dt_min": 1.0},
    ):
        with pytest.raises(ArgumentError):
            S4D(4, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="length"):
        S4D(4).convolution_kernel(0)


def test_parameters_of_the_system_are_not_decayed_and_stay_float32() -> None:
    mixer = S4D(4).to(torch.bfloat16)
    for name in ("log_dt", "A_log", "A_imag", "C", "D"):
        parameter = getattr(mixer, name)
        assert parameter._no_weight_decay
        assert parameter.dtype == torch.float32
