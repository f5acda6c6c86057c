"""S4 against dense matrices: its kernel, its step, what a state gives, both directions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.mixers import S4
from longscan.nn import dplr
from longscan.statespace import discretise_dense, transition

MEASURES = pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "fourier"])


def dense(mixer: S4, channel: int, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A_bar (N, N), B_bar and C of one channel, complex128, over whole conjugate pairs, by dense inverses."""
    A = torch.complex(-mixer.A_log.exp(), mixer.A_imag)[channel]
    P, B = torch.view_as_complex(mixer.P)[channel].mT, torch.view_as_complex(mixer.B)[channel]
    A, P, B, C = (torch.cat((t, t.conj())) for t in (A, P, B, torch.view_as_complex(C)[channel]))
    A = torch.diag(A) - P @ P.mH
    half = mixer.log_dt.exp()[channel] / 2 * A
    eye = torch.eye(A.shape[0], dtype=A.dtype)
    inverse = torch.linalg.inv(eye - half)
    return inverse @ (eye + half), inverse @ (mixer.log_dt.exp()[channel] * B), C


def naive_kernel(mixer: S4, length: int, direction: int = 0) -> Tensor:
    """C A_bar^l B_bar, one product after the other."""
    kernels = []
    for channel in range(mixer.d_model):
        A_bar, h, C = dense(mixer, channel, mixer.C[direction])
        values = []
        for _ in range(length):
            values.append((C @ h).real)
            h = A_bar @ h
        kernels.append(torch.stack(values))
    return torch.stack(kernels)


def test_the_kernel_is_the_naive_one_at_order_64_and_length_16384() -> None:
    torch.manual_seed(0)
    mixer = S4(2).double()
    with torch.no_grad():
        kernel, naive = mixer.convolution_kernel(16_384), naive_kernel(mixer, 16_384)
    assert (kernel - naive).abs().max() < 1e-9
    assert naive.abs().max() > 0.1


@MEASURES
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 33])
def test_the_kernel_is_exact_at_every_length(measure: str, length: int) -> None:
    torch.manual_seed(0)
    mixer = S4(3, d_state=6, measure=measure, dt_min=0.1, dt_max=1.0).double()
    torch.testing.assert_close(mixer.convolution_kernel(length), naive_kernel(mixer, length), rtol=1e-9, atol=1e-11)


def test_starts_as_hippo() -> None:
    """In its own basis the system is LegS, discretised: the same response, from matrices of another kind."""
    torch.manual_seed(0)
    mixer = S4(1, d_state=8, dt_min=0.05, dt_max=0.05).double()
    A, B = transition("legs", 8)
    A_bar, B_bar = discretise_dense(A, B, float(mixer.log_dt.detach().exp()), "bilinear")
    ours = [dense(mixer, 0, mixer.C[0])[0].matrix_power(l).diagonal().sum().real for l in range(1, 9)]
    hippo = [A_bar.matrix_power(l).diagonal().sum() for l in range(1, 9)]
    # Parameters are float32 at first.
    torch.testing.assert_close(torch.stack(ours), torch.stack(hippo), rtol=1e-5, atol=1e-5)
    w, P, scaled = mixer.system()
    state = 2 * dplr.solve(w, P, scaled).abs().square().sum()
    torch.testing.assert_close(state, B_bar.square().sum(), rtol=1e-5, atol=1e-7)


@MEASURES
def test_forward_and_steps_are_the_dense_recurrence(measure: str) -> None:
    torch.manual_seed(0)
    mixer = S4(2, d_state=6, measure=measure, dt_min=0.1, dt_max=1.0).double()
    x = torch.randn(3, 11, 2, dtype=torch.float64)
    y = torch.empty_like(x)
    for channel in range(2):
        A_bar, B_bar, C = dense(mixer, channel, mixer.C[0])
        h = torch.zeros(3, 6, dtype=A_bar.dtype)
        for t in range(11):
            h = h @ A_bar.mT + B_bar * x[:, t, channel, None]
            y[:, t, channel] = (h @ C).real + mixer.D[channel] * x[:, t, channel]
    expected = F.glu(mixer.out_proj(F.gelu(y)), dim=-1)
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-9, atol=1e-10)
    state, outputs = mixer.initial_state(3), []
    for t in range(11):
        out, state = mixer.step(x[:, t], state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=1e-9, atol=1e-10)


def test_a_state_goes_over_many_steps() -> None:
    """More steps than a stretch of the sums that a state is made of, and no power of two."""
    torch.manual_seed(0)
    mixer = S4(2, d_state=8, dt_min=0.01).double()
    x = torch.randn(2, 777, 2, dtype=torch.float64)
    whole, after = mixer(x, mixer.initial_state(2))
    first, state = mixer(x[:, :300], mixer.initial_state(2))
    second, again = mixer(x[:, 300:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(again.ssm, after.ssm, rtol=1e-9, atol=1e-10)


def test_both_directions() -> None:
    torch.manual_seed(0)
    mixer = S4(2, d_state=4, bidirectional=True, dt_min=0.1).double()
    x = torch.randn(1, 9, 2, dtype=torch.float64)
    forth, back = naive_kernel(mixer, 9, 0), naive_kernel(mixer, 9, 1)
    y = mixer.D * x
    for lag in range(9):
        y[:, lag:] += forth[:, lag] * x[:, : 9 - lag]
        y[:, : 9 - lag] += back[:, lag] * x[:, lag:]
    expected = F.glu(mixer.out_proj(F.gelu(y)), dim=-1)
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-9, atol=1e-10)
    packed, _ = mixer(x, cu_seqlens=torch.tensor([0, 4, 4, 9]))
    alone = torch.cat([mixer(part)[0] for part in x.split([4, 5], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-10)


def test_both_directions_do_not_stream() -> None:
    mixer = S4(2, d_state=4, bidirectional=True)
    x = torch.randn(1, 3, 2)
    state = S4(2, d_state=4).initial_state(1)
    for call in (
        lambda: mixer.initial_state(1),
        lambda: mixer(x, state),
        lambda: mixer.step(x[:, 0], state),
        lambda: mixer.convolution_kernel(3),
    ):
        with pytest.raises(ArgumentError, match="bidirectional S4"):
            call()


def test_float32_is_near_float64_over_a_long_sequence() -> None:
    torch.manual_seed(0)
    mixer = S4(4)
    x = torch.randn(1, 4096, 4)
    y = mixer(x)[0]
    exact = mixer.double()(x.double())[0]
    assert (y - exact).abs().max() < 1e-3 * exact.abs().max()


def test_memory_is_of_order_states_plus_length() -> None:
    mixer, length = S4(2, d_state=128), 20_000
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mixer.convolution_kernel(length)
    # Spectra of the four products and what they are joined by, and the 16 powers of A_bar; not N numbers a place.
    assert sum(saved.values()) < 2 * (16 * 32_768 + 20 * 128 * 128) < 2 * 64 * 20_000


def test_options_that_make_no_sense() -> None:
    for options in ({"d_state": 3}, {"measure": "lmu"}, {"measure": "hippo"}, {"dt_min": 1.0}):
        with pytest.raises(ArgumentError):
            S4(4, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="length"):
        S4(4).convolution_kernel(0)


def test_parameters_of_the_system_are_not_decayed_and_stay_float32() -> None:
    mixer = S4(4).to(torch.bfloat16)
    for name in ("log_dt", "A_log", "A_imag", "P", "B", "C", "D"):
        parameter = getattr(mixer, name)
        assert parameter._no_weight_decay
        assert parameter.dtype == torch.float32
