"""The block's inside, with a backward pass of its own, against its parts under autograd; and what it keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan import ops
from longscan.mixers import Mamba
from longscan.mixers.mamba import MambaState
from longscan.nn import mamba_inner

WHOLE = pytest.mark.parametrize("recompute", [False, True])


def results(mixer: Mamba, whole: bool, x: Tensor, state: MambaState | None, **options: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of everything there is."""
    function = mixer._whole if whole else mixer._parts
    leaves = {"x": x.detach().requires_grad_()}
    if state is not None:
        leaves |= {"conv": state.conv.detach().requires_grad_(), "ssm": state.ssm.detach().requires_grad_()}
        state = MambaState(leaves["conv"], leaves["ssm"])
    outputs = function(leaves["x"], state, options.get("cu_seqlens"))
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (output.double() * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device)).sum()
        for output in outputs
    )
    inside = {name: value for name, value in mixer.named_parameters() if not name.startswith("out_proj")}
    everything = {**leaves, **inside}
    gradients = torch.autograd.grad(loss, list(everything.values()))
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return found | {f"gradient of {name}": gradient for name, gradient in zip(everything, gradients, strict=True)}


def assert_same(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        assert ours[name].dtype == expected.dtype, name
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def make(seed: int = 0, **options: Any) -> tuple[Mamba, MambaState]:
    torch.manual_seed(seed)
    mixer = Mamba(12, d_state=4, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    state = mixer.initial_state(2).map(lambda tensor: torch.randn_like(tensor))
    return mixer, state


@WHOLE
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False, "d_conv": 2, "dt_rank": 3}])
def test_is_its_parts(options: dict[str, Any], with_state: bool, recompute: bool) -> None:
    mixer, state = make(recompute=recompute, **options)
    mixer, state = mixer.double(), state.map(Tensor.double)
    x = torch.randn(2, 19, 12, dtype=torch.float64)
    ours, parts = (results(mixer, whole, x, state if with_state else None) for whole in (True, False))
    assert_same(ours, parts, 1e-12)


@WHOLE
def test_packed_sequences(recompute: bool) -> None:
    mixer, state = make(recompute=recompute)
    x, offsets = torch.randn(1, 20, 12), torch.tensor([0, 7, 20])
    ours, parts = (results(mixer, whole, x, state, cu_seqlens=offsets) for whole in (True, False))
    assert_same(ours, parts, 1e-5)


@WHOLE
def test_autocast(recompute: bool) -> None:
    mixer, _ = make(recompute=recompute)
    x = torch.randn(2, 33, 12)
    exact = results(mixer, True, x, None)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(mixer, True, x, None)
    assert ours["output 0"].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for name, value in ours.items() if name.startswith("gradient"))
    for name, expected in exact.items():
        error = (ours[name].float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.03, name


def test_gradcheck() -> None:
    mixer, state = make()
    mixer, state = mixer.double(), state.map(Tensor.double)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    conv, ssm = (tensor.requires_grad_() for tensor in state.tensors())
    assert torch.autograd.gradcheck(lambda *t: mixer._whole(t[0], MambaState(t[1], t[2]), None), (x, conv, ssm))


@WHOLE
def test_the_backend_of_the_forward_pass_has_the_backward_pass(recompute: bool) -> None:
    mixer, _ = make(recompute=recompute)
    x, gradients = torch.randn(2, 70, 12, requires_grad=True), []
    for forward in ("reference", "auto"):
        with ops.backend(forward):
            loss = mixer(x)[0].square().sum()
        gradients.append(torch.autograd.grad(loss, [x, mixer.A_log]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_without_gradients_it_is_the_same() -> None:
    mixer, state = make()
    x = torch.randn(2, 19, 12)
    with torch.no_grad():
        plain = mixer._whole(x, state, None)
    for ours, expected in zip(plain, mixer._whole(x, state, None), strict=True):
        assert torch.equal(ours, expected)


def test_frozen_weights_get_no_gradients() -> None:
    mixer, _ = make()
    mixer.requires_grad_(False)
    mixer.x_proj.weight.requires_grad_()
    mixer(torch.randn(2, 5, 12))[0].sum().backward()
    assert mixer.x_proj.weight.grad is not None
    assert all(p.grad is None for name, p in mixer.named_parameters() if name != "x_proj.weight")


def bytes_kept(mixer: Mamba, x: Tensor) -> int:
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in mixer.parameters()}
    return sum(size for place, size in storages.items() if place not in own)


def test_recomputing_keeps_less() -> None:
    x = torch.randn(1, 512, 64, requires_grad=True)
    kept = {recompute: bytes_kept(Mamba(64, recompute=recompute), x) for recompute in (False, True)}
    per_channel = x.shape[1] * 128 * 4
    # The convolution's output and dt.
    assert kept[False] - kept[True] == 2 * per_channel


def test_a_second_derivative_is_refused() -> None:
    mixer, _ = make()
    x = torch.randn(2, 5, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.gpu
@WHOLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype, recompute: bool) -> None:
    torch.manual_seed(0)
    mixer, x = Mamba(64, recompute=recompute), torch.randn(2, 300, 64)
    truth = results(copy.deepcopy(mixer).double(), False, x.double(), None)
    ours = results(mixer.cuda().to(dtype), True, x.cuda().to(dtype), None)
    for name, expected in truth.items():
        error = (ours[name].cpu().double() - expected).norm() / expected.norm()
        assert error < (1e-4 if dtype == torch.float32 else 0.02), (name, float(error))


@WHOLE
def test_a_gap_before_B_changes_nothing(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, state = make(recompute=recompute)
    x = torch.randn(2, 9, 12)
    truth = results(mixer, True, x, state)
    monkeypatch.setattr(mamba_inner, "_gap", lambda *sizes: 3)
    assert_same(results(mixer, True, x, state), truth, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_coefficients_start_at_whole_vectors(dtype: torch.dtype) -> None:
    x = torch.empty(1, dtype=dtype, device="cuda")
    for rank in range(1, 20):
        assert (rank + mamba_inner._gap(rank, 16, x)) * x.element_size() % 16 == 0
    assert mamba_inner._gap(3, 3, x) == 0
