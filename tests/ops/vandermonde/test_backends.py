"""The Vandermonde product and its transpose: backends against the definition in float64, memory, registration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longscan.errors import ArgumentError, BackendError, LongscanError
from longscan.ops import backends, vandermonde, vandermonde_transpose
from longscan.ops.vandermonde import library
from longscan.ops.vandermonde.cases import CASES, NAMES, VandermondeCase, make_inputs
from tests.ops.agreement import TOLERANCE, assert_close, in_float64, outputs_and_gradients

RUNS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("chunked", "cpu", id="chunked"),
    pytest.param("chunked", "cuda", id="chunked-gpu", marks=pytest.mark.gpu),
]
#: Triton's kernels: on the device, or in Triton's interpreter where there is none.
ON_TRITON = [
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    pytest.param(
        "cpu", id="interpreted",
        marks=pytest.mark.skipif(
            torch.cuda.is_available() or isinstance(backends.load("vandermonde", "triton"), str),
            reason="Triton cannot be imported here, or a device runs its kernels",
        ),
    ),
]  # fmt: skip
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE[torch.float32] if dtype == torch.float32 else 1e-11


def signal(case: VandermondeCase, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(*case.rows, case.channels, case.length, generator=generator, dtype=torch.float64)
    return {"values": values.to(device, dtype), "log_A_bar": make_inputs(case, device, dtype)["log_A_bar"]}


def naive_kernel(weights: Tensor, log_A_bar: Tensor, length: int) -> tuple[Tensor]:
    """Power after power, by multiplication."""
    A_bar, power, out = torch.exp(log_A_bar), torch.exp(0 * log_A_bar), []
    for _ in range(length):
        out.append(2 * (weights * power).sum(-1).real)
        power = power * A_bar
    return (torch.stack(out, -1),)


def naive_sums(values: Tensor, log_A_bar: Tensor) -> tuple[Tensor]:
    """The recurrence, from the last value to the first."""
    sums = values.new_zeros(*values.shape[:-1], log_A_bar.shape[1], dtype=log_A_bar.dtype)
    for l in reversed(range(values.shape[-1])):
        sums = torch.exp(log_A_bar) * sums + values[..., l, None]
    return (sums,)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@DTYPE
@CASE
def test_product(case: VandermondeCase, dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = make_inputs(case, device, dtype)
    ours = outputs_and_gradients(
        lambda weights, log_A_bar: (vandermonde(weights, log_A_bar, case.length, backend=backend),), inputs, NAMES
    )
    truth = outputs_and_gradients(
        lambda weights, log_A_bar: naive_kernel(weights, log_A_bar, case.length), in_float64(inputs), NAMES
    )
    assert ours["output 0"].dtype == dtype
    assert_close(ours, truth, tolerance(dtype))


@pytest.mark.parametrize(("backend", "device"), RUNS)
@DTYPE
@CASE
def test_transpose(case: VandermondeCase, dtype: torch.dtype, backend: str, device: str) -> None:
    inputs, names = signal(case, device, dtype), ("values", "log_A_bar")
    ours = outputs_and_gradients(
        lambda values, log_A_bar: (vandermonde_transpose(values, log_A_bar, backend=backend),), inputs, names
    )
    truth = outputs_and_gradients(naive_sums, in_float64(inputs), names)
    assert_close(ours, truth, tolerance(dtype))


@pytest.mark.parametrize("device", ON_TRITON)
@pytest.mark.parametrize("rows", [(), (2,)], ids=["one", "two"])
def test_triton(rows: tuple[int, ...], device: str) -> None:
    """More than a tile, and no whole number of them."""
    case = VandermondeCase("tiles", 1100, rows=rows, channels=2, states=3)
    inputs, values = make_inputs(case, device), signal(case, device)
    ours = outputs_and_gradients(
        lambda weights, log_A_bar: (vandermonde(weights, log_A_bar, case.length, backend="triton"),), inputs, NAMES
    )
    truth = outputs_and_gradients(
        lambda weights, log_A_bar: naive_kernel(weights, log_A_bar, case.length), in_float64(inputs), NAMES
    )
    assert_close(ours, truth, TOLERANCE[torch.float32])
    names = ("values", "log_A_bar")
    ours = outputs_and_gradients(
        lambda values, log_A_bar: (vandermonde_transpose(values, log_A_bar, backend="triton"),), values, names
    )
    assert_close(ours, outputs_and_gradients(naive_sums, in_float64(values), names), TOLERANCE[torch.float32])


@pytest.mark.skipif(isinstance(backends.load("vandermonde", "triton"), str), reason="Triton cannot be imported here")
def test_triton_refuses_double_precision() -> None:
    inputs = make_inputs(CASES[0], dtype=torch.float64)
    with pytest.raises(BackendError, match="complex64"):
        vandermonde(inputs["weights"], inputs["log_A_bar"], 3, backend="triton")


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend: str) -> None:
    case = VandermondeCase("small", 5, rows=(2,), channels=2, states=2)
    weights, log_A_bar = (t.requires_grad_() for t in make_inputs(case, dtype=torch.float64).values())
    values = signal(case, dtype=torch.float64)["values"].requires_grad_()
    assert torch.autograd.gradcheck(lambda w, a: vandermonde(w, a, 5, backend=backend), (weights, log_A_bar))
    assert torch.autograd.gradcheck(lambda v, a: vandermonde_transpose(v, a, backend=backend), (values, log_A_bar))


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_powers_are_never_all_in_memory() -> None:
    case = VandermondeCase("long", 10_000, channels=2, states=32)
    weights, log_A_bar = (tensor.requires_grad_() for tensor in make_inputs(case).values())
    saved: list[Tensor] = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernel = vandermonde(weights, log_A_bar, case.length)
        sums = vandermonde_transpose(kernel.detach().requires_grad_(), log_A_bar)
        kernel.sum().backward()
        sums.abs().sum().backward()
    assert largest.numbers < 2 * 32 * 10_000 / 10
    arguments = 3 * weights.numel() + kernel.numel()
    # Besides the operators' arguments what `abs` keeps of the sums.
    assert sum(tensor.numel() for tensor in saved) <= arguments + 2 * sums.numel()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_same_bits_twice(backend: str) -> None:
    case = CASES[-1]
    call = lambda weights, log_A_bar: (vandermonde(weights, log_A_bar, case.length, backend=backend),)  # noqa: E731
    first, again = (outputs_and_gradients(call, make_inputs(case), NAMES) for _ in range(2))
    assert all(torch.equal(value, again[key]) for key, value in first.items())


def test_a_long_memory_in_float32() -> None:
    """Powers come from exponentials of their own, so errors do not grow by multiplication."""
    log_A_bar = torch.tensor([[-1e-5 + 0.01j]], dtype=torch.complex64)
    kernel = vandermonde(torch.ones_like(log_A_bar), log_A_bar, 100_000)
    exact = vandermonde(torch.ones_like(log_A_bar), log_A_bar.to(torch.complex128), 100_000)
    assert (kernel - exact).abs().max() < 2e-4


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_opcheck(backend: str) -> None:
    case = CASES[1]
    weights, log_A_bar = (tensor.requires_grad_() for tensor in make_inputs(case).values())
    torch.library.opcheck(library.vandermonde, (weights, log_A_bar, case.length, backend))
    values = signal(case)["values"].requires_grad_()
    torch.library.opcheck(library.vandermonde_transpose, (values, log_A_bar, backend))


@pytest.mark.compile
def test_compiles_whole_and_ignores_autocast() -> None:
    def both(weights: Tensor, log_A_bar: Tensor) -> Tensor:
        return vandermonde_transpose(vandermonde(weights, log_A_bar, 50), log_A_bar)

    inputs = make_inputs(CASES[4])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(**inputs), both(**inputs))
    torch.testing.assert_close(compiled(**inputs), both(**inputs))


def test_dtypes_meet() -> None:
    case = CASES[1]
    inputs, values = make_inputs(case), signal(case)["values"]
    wide = inputs["log_A_bar"].to(torch.complex128)
    assert vandermonde(inputs["weights"], wide, 3).dtype == torch.float64
    assert vandermonde_transpose(values.bfloat16(), inputs["log_A_bar"]).dtype == torch.complex64
    assert vandermonde_transpose(values.double(), inputs["log_A_bar"]).dtype == torch.complex128


def test_refuses_what_does_not_fit() -> None:
    inputs = {**make_inputs(CASES[0]), "length": 4}
    weights, log_A_bar = inputs["weights"], inputs["log_A_bar"]
    for change, message in (
        ({"weights": weights.real}, r"weights: got torch.float32"),
        ({"weights": weights[0]}, r"weights: got shape \(4,\)"),
        ({"weights": weights[:, :0]}, r"weights: got shape \(3, 0\)"),
        ({"log_A_bar": log_A_bar.real}, r"log_A_bar: got torch.float32"),
        ({"log_A_bar": log_A_bar[:2]}, r"log_A_bar: got shape \(2, 4\)"),
        ({"log_A_bar": log_A_bar.to("meta")}, r"log_A_bar: is on meta"),
        ({"length": 0}, r"length: got 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            vandermonde(**{**inputs, **change})
    values = torch.zeros(3, 7)
    for bad, message in ((values[0], r"values: got shape"), (values.int(), r"values: got torch.int32"),
                         (values[:2], r"log_A_bar: got shape \(3, 4\), expected \(2, 4\)")):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            vandermonde_transpose(bad, log_A_bar)
    with pytest.raises(BackendError, match="has no backend"):
        vandermonde(weights, log_A_bar, 4, backend="fft")


def test_has_no_second_derivative() -> None:
    inputs = make_inputs(CASES[0])
    weights = inputs["weights"].requires_grad_()
    values = vandermonde(weights, inputs["log_A_bar"], 4)
    (grad,) = torch.autograd.grad(values.square().sum(), weights, create_graph=True)
    with pytest.raises(LongscanError, match="no second derivative"):
        grad.abs().sum().backward()
