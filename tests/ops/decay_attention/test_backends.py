"""Decay attention: every backend against the float64 definition, and the definition against its formula."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from longscan.errors import ArgumentError, LongscanError
from longscan.ops import decay_attention, decay_attention_update
from longscan.ops.decay_attention import chunked, reference
from longscan.ops.decay_attention.cases import CASES, NAMES, DecayCase, make_inputs
from tests.ops.agreement import TOLERANCE, assert_close, in_float64, outputs_and_gradients

#: Plain PyTorch runs on every device.
RUNS = [
    pytest.param(name, device, id=f"{name}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for name, device in (
        ("chunked", "cpu"),
        ("reference", "cpu"),
        ("chunked", "cuda"),
        ("reference", "cuda"),
        ("triton", "cuda"),
    )
]
BACKENDS = pytest.mark.parametrize(("backend", "device"), RUNS)
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).split(".")[1])


def attend(case: DecayCase, backend: str):
    return partial(decay_attention, normalise=case.normalise, return_final_state=True, backend=backend)


def case_of(name: str) -> DecayCase:
    return next(case for case in CASES if case.name == name)


@pytest.fixture(params=["one-stretch", "many-stretches"])
def _stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many-stretches":
        monkeypatch.setattr(chunked, "_ENTRIES", {"cpu": 1})
        monkeypatch.setattr(chunked, "_ENTRIES_ELSEWHERE", 1)


@pytest.mark.usefixtures("_stretches")
@BACKENDS
@DTYPE
@CASE
def test_agrees_with_the_float64_definition(case: DecayCase, dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = make_inputs(case, device, dtype)
    ours = outputs_and_gradients(attend(case, backend), inputs, NAMES)
    truth = outputs_and_gradients(attend(case, "reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[dtype])
    assert ours["output 0"].dtype == dtype
    assert ours["output 1"].dtype == torch.float32


@CASE
def test_chunks_are_exact_in_float64(case: DecayCase) -> None:
    inputs = make_inputs(case, dtype=torch.float64)
    ours = outputs_and_gradients(attend(case, "chunked"), inputs, NAMES)
    assert_close(ours, outputs_and_gradients(attend(case, "reference"), inputs, NAMES), 1e-11)


@pytest.mark.parametrize("case", [case for case in CASES if not case.normalise], ids=lambda case: case.name)
def test_the_definition_differentiates_itself(case: DecayCase) -> None:
    inputs = make_inputs(case, dtype=torch.float64)
    ours = outputs_and_gradients(attend(case, "reference"), inputs, NAMES)

    def definition(**tensors):
        return reference.forward(**{"cu_seqlens": None} | tensors)

    assert_close(ours, outputs_and_gradients(definition, inputs, NAMES), 1e-12)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("decay", ["none", "head", "step"])
@pytest.mark.parametrize("normalise", [False, True])
def test_gradcheck(backend: str, decay: str, normalise: bool) -> None:
    """Finite differences know nothing of either derivation."""
    case = DecayCase("small", 1, 5, 2, 3, 2, decay=decay, normalise=normalise, initial=True)
    inputs = make_inputs(case, dtype=torch.float64)
    given = [name for name in NAMES if inputs[name] is not None]

    def function(*tensors):
        return attend(case, backend)(**dict(zip(given, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [inputs[name].requires_grad_() for name in given])


def test_it_is_attention_with_decayed_weights() -> None:
    """The sum over all pairs of times, as the papers write it."""
    inputs = make_inputs(DecayCase("pairs", length=9, normalise=True), dtype=torch.float64)
    q, k, v, g = (inputs[name] for name in NAMES[:4])
    total = g.cumsum(1)
    weights = torch.einsum("bthk,bshk->bhts", q, k) * torch.exp(
        (total[:, :, None] - total[:, None]).permute(0, 3, 1, 2)
    )
    weights = weights.tril()
    expected = torch.einsum("bhts,bshv->bthv", weights, v)
    torch.testing.assert_close(decay_attention(q, k, v, g), expected)
    divided = expected / (weights.sum(-1).transpose(1, 2)[..., None] + 1e-6)
    torch.testing.assert_close(decay_attention(q, k, v, g, normalise=True), divided)


@BACKENDS
@pytest.mark.parametrize("name", ["step", "retention", "no-decay", "linear-attention", "groups"])
def test_a_step_is_a_sequence_of_length_one(name: str, backend: str, device: str) -> None:
    case = case_of(name)
    inputs = make_inputs(case, device)
    over_time = ["q", "k", "v", *(["log_decay"] if case.decay == "step" else [])]
    cut = {key: value[:, :3] if key in over_time else value for key, value in inputs.items()}
    whole, final = attend(case, "reference")(**cut)
    state = cut["initial_state"]
    state = torch.zeros_like(final) if state is None else state.clone()
    for t in range(3):
        now = {key: cut[key][:, t] if key in over_time else cut[key] for key in NAMES[:4]}
        before = state.clone()
        y, fresh = decay_attention_update(state, **now, normalise=case.normalise, backend=backend)
        assert torch.equal(state, before), "the caller's state changed"
        again, same = decay_attention_update(state, **now, normalise=case.normalise, backend=backend, inplace=True)
        assert same is state
        assert torch.equal(same, fresh)
        assert torch.equal(y, again)
        assert_close({"y": y}, {"y": whole[:, t]}, 1e-5)
    assert_close({"state": state}, {"state": final}, 1e-5)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_step_carries_gradients(backend: str) -> None:
    case = DecayCase("step", length=1, initial=True, normalise=True)
    inputs = make_inputs(case)

    def step(q, k, v, log_decay, initial_state):
        now = (tensor[:, 0] for tensor in (q, k, v, log_decay))
        return decay_attention_update(initial_state, *now, normalise=True, backend=backend)

    def one(**tensors):
        y, state = attend(case, "reference")(**tensors)
        return y[:, 0], state

    truth = outputs_and_gradients(one, in_float64(inputs), NAMES)
    assert_close(outputs_and_gradients(step, inputs, NAMES), truth, TOLERANCE[torch.float32])


@BACKENDS
@pytest.mark.parametrize("name", ["step", "retention", "packed-states"])
def test_backward_is_bit_for_bit_repeatable(name: str, backend: str, device: str) -> None:
    case = case_of(name)
    inputs = make_inputs(case, device)
    first = outputs_and_gradients(attend(case, backend), inputs, NAMES)
    again = outputs_and_gradients(attend(case, backend), inputs, NAMES)
    for key, value in first.items():
        assert torch.equal(value, again[key]), key


@BACKENDS
def test_no_state_leaks_over_a_border(backend: str, device: str) -> None:
    """Not even NaN: what one packed sequence holds cannot reach another's output, state or gradient."""
    case = DecayCase("packed", lengths=(66, 5, 70), initial=True)
    inputs = make_inputs(case, device)
    clean = outputs_and_gradients(attend(case, backend), inputs, NAMES)
    dirty = {key: value if value is None else value.clone() for key, value in inputs.items()}
    dirty["v"][0, 66:71] = float("nan")
    found = outputs_and_gradients(attend(case, backend), dirty, NAMES)
    others = torch.ones(141, dtype=torch.bool)
    others[66:71] = False
    for key, value in found.items():
        over_sequences = key in ("output 1", "gradient of initial_state")
        mine = (value[[0, 2]], clean[key][[0, 2]]) if over_sequences else (value[0, others], clean[key][0, others])
        assert torch.equal(*mine), key
    assert found["output 0"][0, 66:71].isnan().all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_step_may_forget_everything(backend: str) -> None:
    """-inf at a step is a fresh start there, and gradients stay finite."""
    case = DecayCase("forget", length=150, initial=True)
    inputs = make_inputs(case, dtype=torch.float64)
    inputs["log_decay"][:, [40, 100]] = float("-inf")
    found = outputs_and_gradients(attend(case, backend), inputs, NAMES)
    assert all(value.isfinite().all() for value in found.values())
    pieces = {name: inputs[name][:, 100:] for name in NAMES[:4]}
    pieces["log_decay"][:, 0] = 0
    y, final = attend(case, "reference")(**pieces)
    assert_close({"y": found["output 0"][:, 100:], "state": found["output 1"]}, {"y": y, "state": final}, 1e-12)


@pytest.mark.parametrize("decay", ["head", "step"])
def test_strong_and_weak_decays_side_by_side(decay: str) -> None:
    """A decay of e^-100000 next to ones of e^-0.001: differences of running sums would lose the small ones."""
    inputs = make_inputs(DecayCase("mixed", length=200, heads=2, decay=decay))
    if decay == "head":
        inputs["log_decay"] = torch.tensor([-1e5, -1e-3])
    else:
        inputs["log_decay"] = torch.full((2, 200, 2), -1e-3)
        inputs["log_decay"][:, ::7] = -1e5
    ours = outputs_and_gradients(attend(CASES[0], "chunked"), inputs, NAMES)
    truth = outputs_and_gradients(attend(CASES[0], "reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[torch.float32])


def test_a_shared_decays_gradient_keeps_its_digits() -> None:
    """What its steps give to it, 1,100 in absolute values, leaves 0.99: a few roundings of the former are allowed."""
    inputs = make_inputs(
        DecayCase("shared", batch=3, length=123, heads=1, d_k=1, d_v=1, decay="head", initial=True), seed=1206
    )
    ours = outputs_and_gradients(attend(CASES[0], "chunked"), inputs, NAMES)
    truth = outputs_and_gradients(attend(CASES[0], "reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, 3 * TOLERANCE[torch.float32])


def test_a_million_steps() -> None:
    """Nothing overflows, and the state is the sum of what has not faded, about 1 / (1 - decay).

    A decay near 1 is what float32 can say of it: once a chunk, 64 e-5 away from 1, it is off by up to 5 parts in 10^5.
    """
    length = 2**20
    ones = torch.ones((), dtype=torch.float32).expand(1, length, 1, 1)
    log_decay = torch.tensor([-1e-5])
    with torch.no_grad():
        y, state = decay_attention(ones, ones, ones, log_decay, return_final_state=True)
    expected = float((1 - (length * log_decay.double()).exp()) / -torch.expm1(log_decay.double()))
    assert abs(float(state) / expected - 1) < 2e-4
    assert torch.equal(y[0, -1, 0], state[0, 0, 0])


def test_bytes_kept_for_backward_are_the_arguments() -> None:
    inputs = make_inputs(DecayCase("memory", batch=1, length=512, d_k=32, d_v=32))
    inputs["q"].requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decay_attention(**inputs)
    assert sum(kept.values()) == sum(inputs[name].nbytes for name in NAMES[:4])


ERRORS = [
    ({"q": torch.zeros(2, 5, 3)}, r"q: got shape \(2, 5, 3\), expected \(batch, length, heads, d_k\)"),
    ({"q": torch.zeros(2, 0, 3, 8)}, r"q: got shape \(2, 0, 3, 8\)"),
    ({"k": torch.zeros(2, 5, 3, 7)}, r"k: got shape \(2, 5, 3, 7\), expected \(2, 5, 3, 8\)"),
    ({"v": torch.zeros(2, 5, 4, 6)}, r"v: got shape \(2, 5, 4, 6\), expected \(2, 5, 3, 6\)"),
    ({"v": torch.zeros(2, 5, 0, 6)}, r"v: got shape \(2, 5, 0, 6\), .* as many heads as q and k, or a multiple"),
    ({"log_decay": torch.zeros(2, 5, 3), "v": torch.zeros(2, 5, 6, 6)}, r"log_decay: .* expected \(2, 5, 6\)"),
    ({"v": torch.zeros(2, 5, 3, 0)}, r"v: got shape \(2, 5, 3, 0\)"),
    ({"v": torch.zeros(2, 5, 3, 6, dtype=torch.int64)}, r"v: got torch\.int64"),
    ({"log_decay": torch.zeros(2)}, r"log_decay: got shape \(2,\), expected \(3,\)"),
    ({"log_decay": torch.zeros(2, 5)}, r"log_decay: got shape \(2, 5\), expected \(2, 5, 3\)"),
    ({"log_decay": torch.full((3,), 0.5)}, r"log_decay: has an entry of 0\.5; allowed is at most 0"),
    ({"log_decay": torch.full((3,), float("nan"))}, r"log_decay: has an entry of nan"),
    ({"initial_state": torch.zeros(2, 3, 8, 7)}, r"initial_state: got shape .* expected \(2, 3, 8, 6\)"),
    ({"initial_state": torch.zeros(2, 3, 8, 6), "normalise": True}, r"expected \(2, 3, 8, 7\).*normaliser"),
    ({"cu_seqlens": torch.tensor([0, 5])}, r"batch must be 1; got 2"),
    ({"k": torch.zeros(2, 5, 3, 8, device="meta")}, r"k: is on meta, expected cpu"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:24] for _, message in ERRORS])
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        decay_attention(**(make_inputs(DecayCase("errors", length=5)) | change))


def test_errors_of_a_step() -> None:
    q, v, state = torch.zeros(2, 3, 8), torch.zeros(2, 3, 6), torch.zeros(2, 3, 8, 6)
    with pytest.raises(ArgumentError, match=r"q: got shape \(2, 3, 1, 8\), expected \(batch, heads, d_k\)"):
        decay_attention_update(state, q[:, :, None], q, v)
    with pytest.raises(ArgumentError, match=r"state: got shape \(1, 3, 8, 6\)"):
        decay_attention_update(state[:1], q, q, v)
    with pytest.raises(ArgumentError, match=r"log_decay: got shape \(2, 4\), expected \(2, 3\)"):
        decay_attention_update(state, q, q, v, torch.zeros(2, 4))
    with pytest.raises(ArgumentError, match="inplace: a gradient is recorded"):
        decay_attention_update(state, q, q, v.clone().requires_grad_(), inplace=True)
    with pytest.raises(ArgumentError, match=r"state: got torch\.float64, expected torch\.float32"):
        decay_attention_update(state.double(), q, q, v, inplace=True)


def test_a_second_derivative_is_refused() -> None:
    inputs = make_inputs(CASES[0])
    inputs["v"].requires_grad_()
    (grad,) = torch.autograd.grad(decay_attention(**inputs).square().sum(), inputs["v"], create_graph=True)
    with pytest.raises(LongscanError, match="decay_attention: has no second derivative"):
        grad.sum().backward()
