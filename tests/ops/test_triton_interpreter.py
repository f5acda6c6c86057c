"""Triton's kernels run without a GPU, in Triton's interpreter: a few cases that between them touch every option.

The `gpu`-marked tests run the whole grid on a device.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from longscan.ops import backends, causal_conv1d, selective_scan
from longscan.ops.causal_conv1d import cases as conv_cases
from longscan.ops.selective_scan import cases as scan_cases
from tests.ops.agreement import TOLERANCE, assert_close, in_float64, outputs_and_gradients

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the gpu-marked tests run these kernels on the device"),
    pytest.mark.skipif(isinstance(backends.load("selective_scan", "triton"), str), reason="Triton is Linux only"),
]

# The interpreter takes milliseconds for a step of a thread: few states and steps, one row.
SCANS = [replace(case, batch=1, length=7, state=2, lengths=case.lengths and (3, 0, 9)) for case in scan_cases.FEW]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", SCANS, ids=lambda case: case.name)
def test_scan(case: scan_cases.ScanCase, dtype: torch.dtype) -> None:
    inputs = scan_cases.make_inputs(case, dtype=dtype)
    scan = partial(selective_scan, dt_softplus=case.softplus, return_final_state=True)
    ours = outputs_and_gradients(partial(scan, backend="triton"), inputs, scan_cases.NAMES)
    truth = outputs_and_gradients(partial(scan, backend="reference"), in_float64(inputs), scan_cases.NAMES)
    assert_close(ours, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", conv_cases.FEW, ids=lambda case: case.name)
def test_convolution(case: conv_cases.ConvCase, dtype: torch.dtype) -> None:
    inputs = conv_cases.make_inputs(case, dtype=dtype)
    convolve = partial(causal_conv1d, activation="silu" if case.silu else None, return_final_state=True)
    ours = outputs_and_gradients(partial(convolve, backend="triton"), inputs, conv_cases.NAMES)
    truth = outputs_and_gradients(partial(convolve, backend="reference"), in_float64(inputs), conv_cases.NAMES)
    assert_close(ours, truth, TOLERANCE[dtype])
