"""Long convolution: every backend against the float64 definition, and the definition against PyTorch's convolution."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from longscan.errors import ArgumentError, BackendError, LongscanError
from longscan.ops import long_conv
from longscan.ops.long_conv import reference
from longscan.ops.long_conv.cases import CASES, FEW, NAMES, LongConvCase, make_inputs
from longscan.ops.long_conv.fft import fast_size
from tests.ops.agreement import TOLERANCE, assert_close, in_float64, outputs_and_gradients

#: Plain PyTorch both: they run on every device.
BACKENDS = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param(name, device, id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
        for name in ("fft", "reference")
        for device in ("cpu", "cuda")
    ],
)
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).split(".")[1])


def convolve(backend: str):
    return partial(long_conv, return_final_state=True, backend=backend)


@BACKENDS
@DTYPE
@CASE
def test_agrees_with_the_float64_definition(case: LongConvCase, dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = make_inputs(case, device, dtype)
    ours = outputs_and_gradients(convolve(backend), inputs, NAMES)
    truth = outputs_and_gradients(convolve("reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[dtype])
    assert ours["output 0"].dtype == ours["output 1"].dtype == dtype


@CASE
def test_transforms_are_exact_in_float64(case: LongConvCase) -> None:
    inputs = make_inputs(case, dtype=torch.float64)
    ours = outputs_and_gradients(convolve("fft"), inputs, NAMES)
    assert_close(ours, outputs_and_gradients(convolve("reference"), inputs, NAMES), 1e-12)


@CASE
def test_the_definition_differentiates_itself(case: LongConvCase) -> None:
    inputs = make_inputs(case, dtype=torch.float64)
    del inputs["D"]
    names = ("u", "kernel", "initial_state")
    ours = outputs_and_gradients(lambda **tensors: (long_conv(**tensors, backend="reference"),), inputs, names)

    def definition(u, kernel, initial_state, cu_seqlens=None):
        return (reference.forward(u, kernel, initial_state, cu_seqlens),)

    assert_close(ours, outputs_and_gradients(definition, inputs, names), 1e-12)


@pytest.mark.parametrize("backend", ["fft", "reference"])
@pytest.mark.parametrize("lengths", [None, (4, 0, 3)], ids=["rows", "packed"])
def test_gradcheck(lengths: tuple[int, ...] | None, backend: str) -> None:
    """Finite differences know nothing of either derivation."""
    inputs = make_inputs(LongConvCase("small", 1, 7, 2, 5, systems=1, past=3, lengths=lengths), dtype=torch.float64)
    cu_seqlens = inputs.pop("cu_seqlens", None)

    def function(*tensors):
        return long_conv(*tensors, cu_seqlens=cu_seqlens, return_final_state=True, backend=backend)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in NAMES])


@pytest.mark.parametrize("backend", ["fft", "reference"])
def test_it_is_a_causal_convolution(backend: str) -> None:
    inputs = make_inputs(LongConvCase("plain", length=50, taps=20, skip=False), dtype=torch.float64)
    u = F.pad(inputs["u"].transpose(1, 2), (19, 0))
    expected = F.conv1d(u, inputs["kernel"].flip(1)[:, None], groups=6).transpose(1, 2)
    torch.testing.assert_close(long_conv(**inputs, backend=backend), expected)


def test_sizes_of_transforms_are_the_next_even_products_of_2_3_and_5() -> None:
    products = sorted(2 * 2**a * 3**b * 5**c for a in range(13) for b in range(9) for c in range(6))
    for least in (*range(1, 1500), 4097, 8000):
        assert fast_size(least) == next(size for size in products if size >= least)


@BACKENDS
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_backward_is_bit_for_bit_repeatable(case: LongConvCase, backend: str, device: str) -> None:
    inputs = make_inputs(case, device)
    first = outputs_and_gradients(convolve(backend), inputs, NAMES)
    again = outputs_and_gradients(convolve(backend), inputs, NAMES)
    for key, value in first.items():
        assert torch.equal(value, again[key]), key


@BACKENDS
def test_nothing_leaks_over_a_border(backend: str, device: str) -> None:
    """Not even NaN: what one packed sequence holds cannot reach another's output, state or gradient."""
    inputs = make_inputs(LongConvCase("packed", lengths=(40, 33, 37), past=4), device)
    clean = outputs_and_gradients(convolve(backend), inputs, NAMES)
    dirty = {key: value if value is None else value.clone() for key, value in inputs.items()}
    dirty["u"][0, 40:73] = float("nan")
    found = outputs_and_gradients(convolve(backend), dirty, NAMES)
    others = torch.ones(110, dtype=torch.bool)
    others[40:73] = False
    for key in ("output 0", "gradient of u"):
        assert torch.equal(found[key][0, others], clean[key][0, others]), key
    for key in ("output 1", "gradient of initial_state"):
        assert torch.equal(found[key][[0, 2]], clean[key][[0, 2]]), key
    assert found["output 0"][0, 40:73].isnan().all()


def test_bytes_kept_for_backward_are_the_arguments() -> None:
    inputs = make_inputs(LongConvCase("memory", length=512, taps=512, skip=False))
    inputs["u"].requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        long_conv(**inputs)
    assert sum(kept.values()) == inputs["u"].nbytes + inputs["kernel"].nbytes


def test_a_long_sequence_keeps_its_digits_in_float32() -> None:
    inputs = make_inputs(LongConvCase("long", batch=1, length=2**15, taps=2**15, channels=2))
    inputs["kernel"] *= torch.exp(-torch.arange(2**15) / 2**13)
    y, exact = long_conv(**inputs), long_conv(**in_float64(inputs))
    assert (y - exact).abs().max() < 2e-6 * exact.abs().max()


ERRORS = [
    ({"u": torch.zeros(2, 5)}, r"u: got shape \(2, 5\), expected \(batch, length, channels\)"),
    ({"u": torch.zeros(2, 0, 6)}, r"u: got shape \(2, 0, 6\)"),
    ({"u": torch.zeros(2, 5, 6, dtype=torch.int64)}, r"u: got torch\.int64"),
    ({"kernel": torch.zeros(4, 5)}, r"kernel: got shape \(4, 5\), expected \(channels, K\) = \(6, at least 1\)"),
    ({"kernel": torch.zeros(6, 0)}, r"kernel: got shape \(6, 0\)"),
    ({"kernel": torch.zeros(6)}, r"kernel: got shape \(6,\)"),
    ({"kernel": torch.zeros(6, 5, dtype=torch.complex64)}, r"kernel: got torch\.complex64"),
    ({"D": torch.zeros(3)}, r"D: got shape \(3,\), expected \(6,\)"),
    ({"initial_state": torch.zeros(1, 4, 6)}, r"initial_state: got shape \(1, 4, 6\), expected \(2, any, 6\)"),
    ({"initial_state": torch.zeros(2, 6)}, r"initial_state: got shape \(2, 6\)"),
    ({"kernel": torch.zeros(6, 5, device="meta")}, r"kernel: is on meta, expected cpu"),
    ({"cu_seqlens": torch.tensor([0, 5])}, r"batch must be 1; got 2"),
    ({"u": torch.zeros(1, 5, 6), "cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens: starts at 0 and ends at 4"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:24] for _, message in ERRORS])
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        long_conv(**(make_inputs(LongConvCase("errors", length=5, taps=5)) | change))


def test_a_backend_that_does_not_exist_is_no_fallback() -> None:
    with pytest.raises(BackendError, match="long_conv has no backend 'chunked'"):
        long_conv(**make_inputs(CASES[0]), backend="chunked")


def test_a_second_derivative_is_refused() -> None:
    inputs = make_inputs(CASES[0])
    inputs["u"].requires_grad_()
    (grad,) = torch.autograd.grad(long_conv(**inputs).square().sum(), inputs["u"], create_graph=True)
    with pytest.raises(LongscanError, match="long_conv: has no second derivative"):
        grad.sum().backward()
