"""The Triton kernels of decay attention: in Triton's interpreter without a GPU, else on the device."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from longscan.errors import BackendError
from longscan.ops import backends, decay_attention, decay_attention_update
from longscan.ops.decay_attention import library
from longscan.ops.decay_attention.cases import CASES, FEW, NAMES, DecayCase, make_inputs
from tests.ops.agreement import TOLERANCE, assert_close, in_float64, outputs_and_gradients

pytestmark = pytest.mark.skipif(
    isinstance(backends.load("decay_attention", "triton"), str), reason="Triton cannot be imported here"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: What Triton's tiles care about: several blocks of keys and of values, and chunks of every length.
TILES = (
    DecayCase("blocks", batch=1, length=70, heads=2, groups=1, d_k=72, d_v=40, initial=True),
    DecayCase("chunks", batch=1, length=257, heads=1, d_k=16, d_v=16, decay="head"),
)
#: Model sizes, for a device.
LARGE = tuple(
    DecayCase(f"{d_k}-{d_v}-{decay}", 2, 515, 4, d_k, d_v, decay, initial=True, groups=groups)
    for groups, d_k, d_v in ((None, 64, 64), (1, 128, 64), (2, 256, 128), (None, 16, 256))
    for decay in ("none", "head", "step")
)


def attend(case: DecayCase, backend: str):
    return partial(decay_attention, normalise=case.normalise, return_final_state=True, backend=backend)


def check(case: DecayCase, dtype: torch.dtype, **changed: torch.Tensor) -> None:
    inputs = make_inputs(case, DEVICE, dtype) | changed
    ours = outputs_and_gradients(attend(case, "triton"), inputs, NAMES)
    # In chunks, whose agreement with the definition in float64 has a test of its own.
    truth = outputs_and_gradients(attend(case, "chunked"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[dtype])
    assert ours["output 0"].dtype == dtype
    assert ours["output 1"].dtype == torch.float32


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_agrees_in_every_dtype(case: DecayCase, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", TILES, ids=lambda case: case.name)
def test_tiles(case: DecayCase) -> None:
    check(case, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_sizes_of_models(case: DecayCase, dtype: torch.dtype) -> None:
    check(case, dtype)


def test_strong_and_weak_decays_side_by_side() -> None:
    """Decays of e^-100000, e^-50 and none at all next to ones of e^-0.001, whose digits a running sum would lose."""
    log_decay = torch.full((1, 150, 2), -1e-3)
    log_decay[:, ::7] = -1e5
    log_decay[:, 3::20] = -50.3
    log_decay[:, 60] = float("-inf")
    check(DecayCase("mixed", batch=1, length=150, heads=2), torch.float32, log_decay=log_decay.to(DEVICE))


def test_no_state_leaks_over_a_border() -> None:
    """Not even NaN, in either direction."""
    case = DecayCase("packed", lengths=(66, 5, 70), heads=1, initial=True)
    inputs = make_inputs(case, DEVICE)
    clean = outputs_and_gradients(attend(case, "triton"), inputs, NAMES)
    inputs["v"][0, 66:71] = float("nan")
    found = outputs_and_gradients(attend(case, "triton"), inputs, NAMES)
    others = [*range(66), *range(71, 141)]
    for key, value in found.items():
        over_sequences = key in ("output 1", "gradient of initial_state")
        mine = (value[[0, 2]], clean[key][[0, 2]]) if over_sequences else (value[0, others], clean[key][0, others])
        assert torch.equal(*mine), key
    assert found["output 0"][0, 66:71].isnan().all()


def test_a_decay_that_is_no_number_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(DecayCase("nan", batch=1, length=5, heads=1), DEVICE)
    inputs["log_decay"][0, 2] = float("nan")
    monkeypatch.setattr(library, "_check_decay", lambda log_decay: None)
    y = decay_attention(**inputs, backend="triton")
    assert y[0, 2:].isnan().all()


@pytest.mark.parametrize("name", ["step", "retention", "linear-attention", "groups", "wide"])
def test_a_step(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case, DEVICE)
    state = inputs["initial_state"]
    if state is None:
        state = torch.ones(case.batch, case.heads, case.d_k, case.d_v, device=DEVICE)
    now = {key: inputs[key][:, 0] for key in ("q", "k", "v")}
    log_decay = inputs["log_decay"]
    now["log_decay"] = log_decay[:, 0] if case.decay == "step" else log_decay
    found = decay_attention_update(state, **now, normalise=case.normalise, backend="triton")
    truth = decay_attention_update(state, **now, normalise=case.normalise, backend="reference")
    # One that lies otherwise in memory is updated where it lies.
    turned = state.clone().transpose(2, 3).contiguous().transpose(2, 3)
    y, same = decay_attention_update(turned, **now, normalise=case.normalise, backend="triton", inplace=True)
    assert same is turned
    for ours in (found, (y, same)):
        assert_close(dict(zip("ys", ours, strict=True)), dict(zip("ys", truth, strict=True)), 1e-5)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendError, match=r"its kernels take float32, bfloat16 and float16, not torch\.float64"):
        decay_attention(**make_inputs(CASES[0], DEVICE, torch.float64), backend="triton")
