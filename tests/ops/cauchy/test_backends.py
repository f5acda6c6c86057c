"""The Cauchy product: every backend against the definition in float64, its memory, its registration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longscan.errors import ArgumentError, BackendError, LongscanError
from longscan.ops import backends, cauchy
from longscan.ops.cauchy import chunked, library
from longscan.ops.cauchy.cases import CASES, NAMES, CauchyCase, make_inputs
from tests.ops.agreement import RUNS as OTHER_RUNS
from tests.ops.agreement import TOLERANCE, assert_close, in_float64, outputs_and_gradients

RUNS = [
    *OTHER_RUNS,
    pytest.param("chunked", "cpu", id="chunked"),
    pytest.param("chunked", "cuda", id="chunked-gpu", marks=pytest.mark.gpu),
]
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def call(backend: str):
    return lambda v, z, w: (cauchy(v, z, w, backend=backend),)


def naive(v: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor]:
    """Pole after pole, and their conjugates after them."""
    poles, numerators = torch.cat((w, w.conj()), -1), torch.cat((v, v.conj()), -1)
    return (sum(numerators[..., n, None] / (z - poles[:, n, None]) for n in range(poles.shape[1])),)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@CASE
def test_float32(case: CauchyCase, backend: str, device: str) -> None:
    inputs = make_inputs(case, device)
    ours = outputs_and_gradients(call(backend), inputs, NAMES)
    assert_close(ours, outputs_and_gradients(naive, in_float64(inputs), NAMES), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@CASE
def test_float64(case: CauchyCase, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_QUOTIENTS", {"cpu": 1})  # stretches of 32 places
    inputs = make_inputs(case, dtype=torch.float64)
    ours = outputs_and_gradients(call(backend), inputs, NAMES)
    assert_close(ours, outputs_and_gradients(naive, inputs, NAMES), 1e-12)


@pytest.mark.skipif(isinstance(backends.load("cauchy", "triton"), str), reason="Triton cannot be imported here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the gpu-marked tests run these kernels on the device")
@pytest.mark.parametrize("rows", [(), (5,)], ids=["one", "five"])
def test_triton_interpreted(rows: tuple[int, ...]) -> None:
    case = CauchyCase("tiny", 300, rows=rows, channels=2, poles=3)
    inputs = make_inputs(case)
    ours = outputs_and_gradients(call("triton"), inputs, NAMES)
    assert_close(ours, outputs_and_gradients(naive, in_float64(inputs), NAMES), TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend: str) -> None:
    inputs = make_inputs(CauchyCase("small", 4, channels=2, poles=2), dtype=torch.float64)
    v, w = inputs["v"].requires_grad_(), inputs["w"].requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: cauchy(v, inputs["z"], w, backend=backend), (v, w))


def test_any_grid_and_strides() -> None:
    inputs = make_inputs(CASES[0])
    inputs["z"] = inputs["z"] + 0.5
    inputs["v"] = inputs["v"].mT.contiguous().mT.conj()
    truth = naive(**in_float64(inputs))[0]
    for backend in ("cpu", "chunked", "reference"):
        assert_close({"y": cauchy(**inputs, backend=backend)}, {"y": truth}, TOLERANCE[torch.float32])


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_quotients_are_never_all_in_memory(backend: str) -> None:
    inputs = make_inputs(CauchyCase("long", 20_000, rows=(4,), channels=8, poles=32))
    v, w = inputs["v"].requires_grad_(), inputs["w"].requires_grad_()
    saved: list[Tensor] = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = cauchy(v, inputs["z"], w, backend=backend)
        y.backward(torch.ones_like(y))
    assert largest.numbers < 8 * 32 * 20_000 / 2
    assert sum(tensor.numel() for tensor in saved) == v.numel() + w.numel() + 20_000


@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_the_same_bits_twice(backend: str) -> None:
    first, again = (outputs_and_gradients(call(backend), make_inputs(CASES[-1]), NAMES) for _ in range(2))
    assert all(torch.equal(value, again[key]) for key, value in first.items())


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
def test_opcheck(backend: str) -> None:
    inputs = make_inputs(CASES[2])
    arguments = (inputs["v"].requires_grad_(), inputs["z"], inputs["w"].requires_grad_(), backend)
    torch.library.opcheck(library.cauchy, arguments)


@pytest.mark.compile
def test_compiles_whole_and_ignores_autocast() -> None:
    inputs = make_inputs(CASES[0])
    compiled = torch.compile(lambda v, z, w: 2 * cauchy(v, z, w), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(**inputs), 2 * cauchy(**inputs))
    torch.testing.assert_close(compiled(**inputs), 2 * cauchy(**inputs))


def test_refuses_what_does_not_fit() -> None:
    inputs = make_inputs(CASES[0])
    for change, message in (
        ({"v": inputs["v"].real}, r"v: got torch.float32"),
        ({"v": inputs["v"][0, 0, 0]}, r"v: got shape \(4,\)"),
        ({"z": inputs["z"].imag}, r"z: got torch.float32"),
        ({"z": inputs["z"][:0]}, r"z: got shape \(0,\)"),
        ({"z": inputs["z"].requires_grad_()}, r"z: asks for a gradient"),
        ({"w": inputs["w"][:, :2]}, r"w: got shape \(3, 2\)"),
        ({"w": inputs["w"].to("meta")}, r"w: is on meta"),
    ):
        with pytest.raises(ArgumentError, match=message):
            cauchy(**{**inputs, **change})
    wide = make_inputs(CASES[0], dtype=torch.float64)
    with pytest.raises(BackendError, match="complex64"):
        cauchy(**wide, backend="cpu")
    assert cauchy(**{**inputs, "z": inputs["z"].detach(), "w": wide["w"]}).dtype == torch.complex128


def test_has_no_second_derivative() -> None:
    inputs = make_inputs(CASES[0])
    v = inputs["v"].requires_grad_()
    (grad,) = torch.autograd.grad(cauchy(**inputs).abs().square().sum(), v, create_graph=True)
    with pytest.raises(LongscanError, match="no second derivative"):
        grad.abs().sum().backward()
