"""What only the Triton kernels have: tiles, chunks and their chaining, and blocks that must fit groups.

In Triton's interpreter without a GPU, where each case is kept tiny, else on the device.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch

from longscan.ops import add_rms_norm, backends, causal_conv1d
from longscan.ops.add_rms_norm import cases as norm_cases
from longscan.ops.causal_conv1d.cases import NAMES as CONV_NAMES
from longscan.ops.causal_conv1d.cases import ConvCase
from longscan.ops.causal_conv1d.cases import make_inputs as conv_inputs
from longscan.ops.selective_scan import selective_scan
from longscan.ops.selective_scan.cases import NAMES, ScanCase, make_inputs
from tests.ops.agreement import TOLERANCE, assert_close, in_float64, outputs_and_gradients

pytestmark = pytest.mark.skipif(
    isinstance(backends.load("selective_scan", "triton"), str), reason="Triton cannot be imported here"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Between them every branch of the kernels; two or three states suffice, as states are taken one after the other.
TINY = (
    ScanCase("groups", batch=2, length=19, channels=6, state=2, groups=2, initial=True),
    ScanCase("chunks", batch=1, length=67, channels=4, state=2, gate=False, skip=False, bias=False),
    ScanCase("constants", batch=1, length=5, channels=3, state=3, b="constant", c="constant", softplus=False),
    ScanCase("packed", channels=3, state=2, lengths=(3, 0, 66), initial=True),
    ScanCase("complex", channels=2, state=2, complex=True, lengths=(2, 17), initial=True),
    ScanCase("complex-constant", batch=1, length=3, channels=2, state=2, complex=True, b="constant", c="constant"),
)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_scan(case: ScanCase, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the forward pass agree with the definition, and so do the gradients that start from either."""
    longest = max(case.lengths or (case.length,))
    if chunked and longest <= 64:
        pytest.skip("no sequence is longer than a chunk")
    module = importlib.import_module("longscan.ops.selective_scan.triton")
    monkeypatch.setattr(module, "_FILL", 1 << 40 if chunked else 0)
    inputs = make_inputs(case, DEVICE)
    scan = partial(selective_scan, dt_softplus=case.softplus, return_final_state=True)
    ours = outputs_and_gradients(partial(scan, backend="triton"), inputs, NAMES)
    truth = outputs_and_gradients(partial(scan, backend="reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[torch.float32])


def test_b_and_c_in_unlike_groups() -> None:
    """Blocks of channels fit the groups of both."""
    inputs = make_inputs(ScanCase("b", batch=1, length=4, channels=12, state=2, groups=2), DEVICE)
    inputs["C"] = make_inputs(ScanCase("c", batch=1, length=4, channels=12, state=2, groups=3), DEVICE)["C"]
    scan = partial(selective_scan, dt_softplus=True, return_final_state=True)
    ours = outputs_and_gradients(partial(scan, backend="triton"), inputs, NAMES)
    truth = outputs_and_gradients(partial(scan, backend="reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[torch.float32])


def test_step_sizes_keep_their_digits() -> None:
    """The softplus of very negative numbers, which a fast logarithm of 1 + exp would lose."""
    x = torch.ones(1, 1, 8, device=DEVICE)
    raw = torch.linspace(-14, 30, 8, device=DEVICE).view(1, 1, 8)
    ones: Any = torch.ones(1, 1, 1, device=DEVICE)
    A = torch.full((8, 1), -1e-9, device=DEVICE)
    y = selective_scan(x, raw, A, ones, ones, dt_softplus=True, backend="triton")
    assert isinstance(y, torch.Tensor)
    truth = torch.nn.functional.softplus(raw.double())
    assert torch.allclose(y.double(), truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("lengths", [(3, 0, 70), (1,)], ids=["packed", "one-step"])
def test_convolution(lengths: tuple[int, ...]) -> None:
    inputs = conv_inputs(ConvCase("tiny", channels=3, width=5, lengths=lengths, initial=True), DEVICE)
    convolve = partial(causal_conv1d, activation="silu", return_final_state=True)
    ours = outputs_and_gradients(partial(convolve, backend="triton"), inputs, CONV_NAMES)
    truth = outputs_and_gradients(partial(convolve, backend="reference"), in_float64(inputs), CONV_NAMES)
    assert_close(ours, truth, TOLERANCE[torch.float32])


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "first"])
def test_norm(residual: bool) -> None:
    inputs = norm_cases.make_inputs(
        norm_cases.NormCase("tiny", shape=(70, 21), residual=residual, strided=True), DEVICE
    )
    ours = outputs_and_gradients(partial(add_rms_norm, backend="triton"), inputs, norm_cases.NAMES)
    truth = outputs_and_gradients(partial(add_rms_norm, backend="reference"), in_float64(inputs), norm_cases.NAMES)
    assert_close(ours, truth, TOLERANCE[torch.float32])
