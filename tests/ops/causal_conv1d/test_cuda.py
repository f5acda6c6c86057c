"""The CUDA kernels of the causal convolution compile for every architecture, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longscan.ops import backends, nvrtc

SOURCE = Path(backends.__file__).parent / "causal_conv1d" / "conv.cu"
MAMBA = {"FORMAT": 1, "PACKED": 0, "WIDTH": 4, "SILU": 1, "PIECE": 64, "PAIR": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is installed for tests on Linux only")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_mambas_kernels_compile_and_spill_nothing(arch: str) -> None:
    code, log = nvrtc.compile_source(SOURCE, nvrtc.macros(MAMBA), arch)
    assert code.startswith(b"\x7fELF")
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == 2, log


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is installed for tests on Linux only")
@pytest.mark.parametrize(
    "options",
    [{"FORMAT": 0, "PAIR": 0}, {"FORMAT": 2, "PACKED": 1, "SILU": 0}, {"WIDTH": 1}, {"WIDTH": 8, "PAIR": 0}],
    ids=str,
)
def test_the_other_options_compile(options: dict[str, int]) -> None:
    code, _ = nvrtc.compile_source(SOURCE, nvrtc.macros({**MAMBA, **options}), "sm_80")
    assert code.startswith(b"\x7fELF")
