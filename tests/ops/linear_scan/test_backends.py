"""The linear scan: every backend against the float64 definition, and the definition against its formula."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from longscan.errors import ArgumentError, LongscanError
from longscan.ops import backends, linear_scan
from longscan.ops.linear_scan.cases import CASES, FEW, NAMES, LinearCase, make_inputs
from tests.ops.agreement import RUNS, TOLERANCE, assert_close, in_float64, outputs_and_gradients

BACKENDS = pytest.mark.parametrize(
    ("backend", "device"),
    [*RUNS, pytest.param("chunked", "cpu", id="chunked"), pytest.param("chunked", "cuda", marks=pytest.mark.gpu)],
)
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).split(".")[1])


def scan(backend: str | None):
    return partial(linear_scan, return_final_state=True, backend=backend)


def case_of(name: str) -> LinearCase:
    return next(case for case in CASES if case.name == name)


@BACKENDS
@DTYPE
@CASE
def test_agrees_with_the_float64_definition(case: LinearCase, dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = make_inputs(case, device, dtype)
    ours = outputs_and_gradients(scan(backend), inputs, NAMES)
    truth = outputs_and_gradients(scan("reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[dtype])
    assert ours["output 0"].dtype == (torch.complex64 if case.complex else dtype)
    assert ours["output 1"].dtype == (torch.complex64 if case.complex else torch.float32)


@pytest.mark.skipif(isinstance(backends.load("linear_scan", "triton"), str), reason="Triton is Linux only")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the gpu-marked tests run these kernels on the device")
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_triton_in_its_interpreter(case: LinearCase, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from longscan.ops.linear_scan import triton

    # The interpreter walks a tile number by number: few of them.
    case = replace(case, batch=1, length=11, channels=2, lengths=case.lengths and (3, 0, 9))
    monkeypatch.setattr(triton, "_TILE", 4 if case.complex else 2)
    if cut:
        monkeypatch.setattr(triton, "piece_length", lambda *_: 4)
    inputs = make_inputs(case)
    truth = outputs_and_gradients(scan("reference"), in_float64(inputs), NAMES)
    assert_close(outputs_and_gradients(scan("triton"), inputs, NAMES), truth, TOLERANCE[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("is_complex", [False, True])
def test_pieces_of_one_long_sequence_on_a_gpu(is_complex: bool) -> None:
    case = LinearCase("million", batch=1, length=2**17 + 5, channels=3, complex=is_complex, initial=True)
    inputs = make_inputs(case, "cuda")
    truth = outputs_and_gradients(scan("chunked"), in_float64(inputs), NAMES)
    assert_close(outputs_and_gradients(scan("triton"), inputs, NAMES), truth, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_gradcheck(case: LinearCase, backend: str) -> None:
    """Finite differences know nothing of the derivation."""
    small = replace(case, batch=1, length=5, channels=2, lengths=case.lengths and (2, 0, 3))
    inputs = make_inputs(small, dtype=torch.float64)
    given = [name for name in NAMES if inputs[name] is not None]

    def function(*tensors):
        rest = {"cu_seqlens": inputs.get("cu_seqlens")}
        return scan(backend)(**dict(zip(given, tensors, strict=True)), **rest)

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in given])


def test_it_is_the_sum_over_the_past() -> None:
    """h_t = sum_s a_{s+1} ... a_t b_s, product by product."""
    inputs = make_inputs(LinearCase("sum", length=6, complex=True), dtype=torch.float64)
    a, b = inputs["a"], inputs["b"]
    expected = torch.stack([sum(a[:, s + 1 : t + 1].prod(1) * b[:, s] for s in range(t + 1)) for t in range(6)], 1)
    torch.testing.assert_close(linear_scan(a, b), expected)


@BACKENDS
def test_real_and_complex_mix(backend: str, device: str) -> None:
    inputs = make_inputs(case_of("complex"), device)
    real = {"a": inputs["a"].abs(), "b": inputs["b"], "initial_state": inputs["initial_state"].real}
    ours = outputs_and_gradients(scan(backend), real, NAMES)
    assert_close(ours, outputs_and_gradients(scan("reference"), in_float64(real), NAMES), 2e-5)
    assert ours["gradient of a"].dtype == torch.float32


@BACKENDS
@pytest.mark.parametrize("name", ["real", "packed-complex"])
def test_backward_is_bit_for_bit_repeatable(name: str, backend: str, device: str) -> None:
    inputs = make_inputs(case_of(name), device)
    first = outputs_and_gradients(scan(backend), inputs, NAMES)
    again = outputs_and_gradients(scan(backend), inputs, NAMES)
    for key, value in first.items():
        assert torch.equal(value, again[key]), key


@BACKENDS
def test_no_state_leaks_over_a_border(backend: str, device: str) -> None:
    """Not even NaN: what one packed sequence holds cannot reach another's output, state or gradient."""
    inputs = make_inputs(LinearCase("packed", lengths=(66, 5, 70), initial=True), device)
    clean = outputs_and_gradients(scan(backend), inputs, NAMES)
    inputs["b"][0, 66:71] = float("nan")
    found = outputs_and_gradients(scan(backend), inputs, NAMES)
    others = torch.ones(141, dtype=torch.bool)
    others[66:71] = False
    for key, value in found.items():
        over_sequences = key in ("output 1", "gradient of initial_state")
        mine = (value[[0, 2]], clean[key][[0, 2]]) if over_sequences else (value[0, others], clean[key][0, others])
        assert torch.equal(*mine), key
    assert found["output 0"][0, 66:71].isnan().all()


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_strided_inputs(backend: str) -> None:
    inputs = make_inputs(case_of("real"))
    strided = {name: torch.stack((inputs[name], inputs[name]), 3)[..., 0] for name in ("a", "b")}
    whole = scan(backend)(**inputs)
    for ours, expected in zip(scan(backend)(**strided), whole, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["cpu", "chunked", "reference"])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_opcheck(case: LinearCase, backend: str) -> None:
    inputs = make_inputs(case)
    tensors = [inputs[key] if inputs[key] is None else inputs[key].requires_grad_() for key in NAMES]
    torch.library.opcheck(torch.ops.longscan.linear_scan.default, (*tensors, inputs.get("cu_seqlens"), backend))


@pytest.mark.compile
def test_compiles_without_a_graph_break() -> None:
    def block(a, b):
        h, state = linear_scan(a, b, return_final_state=True)
        return h.sin(), state

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (33, 70):
        inputs = {name: make_inputs(LinearCase("compiled", length=length))[name] for name in NAMES[:2]}
        ours = outputs_and_gradients(lambda a, b: compiled(a, b), inputs, NAMES[:2])
        assert_close(ours, outputs_and_gradients(block, inputs, NAMES[:2]), 1e-6)


def test_autocast_narrows_activations_only() -> None:
    inputs = make_inputs(case_of("constant"))
    with torch.autocast("cpu", torch.bfloat16):
        h, state = linear_scan(**inputs, return_final_state=True)
    expected, expected_state = linear_scan(**(inputs | {"b": inputs["b"].bfloat16()}), return_final_state=True)
    assert h.dtype == torch.float32
    assert torch.equal(h.bfloat16(), expected)
    assert torch.equal(state, expected_state)


def test_a_million_steps() -> None:
    """Constant input tends to 1 / (1 - decay) of it, and stays there."""
    with torch.no_grad():
        h = linear_scan(torch.tensor(1 - 2**-10), torch.ones(1, 2**20, 1))
    assert abs(float(h[0, -1, 0]) / 2**10 - 1) < 1e-4


ERRORS = [
    ({"b": torch.zeros(2, 5)}, r"b: got shape \(2, 5\), expected \(batch, length, channels\)"),
    ({"b": torch.zeros(2, 0, 24)}, r"b: got shape \(2, 0, 24\)"),
    ({"b": torch.zeros(2, 5, 24, dtype=torch.int64)}, r"b: got torch\.int64"),
    ({"a": torch.zeros(2, 4, 24)}, r"a: got shape \(2, 4, 24\), expected one that broadcasts"),
    ({"a": torch.zeros(1, 2, 5, 24)}, r"a: got shape \(1, 2, 5, 24\)"),
    ({"a": torch.zeros(2, 5, 24, dtype=torch.int32)}, r"a: got torch\.int32"),
    ({"a": torch.zeros(24, device="meta")}, r"a: is on meta, expected cpu"),
    ({"initial_state": torch.zeros(1, 24)}, r"initial_state: got shape \(1, 24\), expected \(2, 24\)"),
    ({"initial_state": torch.zeros(2, 24, dtype=torch.complex64)}, r"initial_state: got torch\.complex64"),
    ({"cu_seqlens": torch.tensor([0, 5])}, r"batch must be 1; got 2"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:24] for _, message in ERRORS])
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        linear_scan(**(make_inputs(LinearCase("errors", length=5)) | change))


def test_a_second_derivative_is_refused() -> None:
    inputs = make_inputs(CASES[0])
    inputs["b"].requires_grad_()
    (grad,) = torch.autograd.grad(linear_scan(**inputs).square().sum(), inputs["b"], create_graph=True)
    with pytest.raises(LongscanError, match="linear_scan: has no second derivative"):
        grad.sum().backward()
