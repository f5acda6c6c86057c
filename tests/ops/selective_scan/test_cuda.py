"""The CUDA kernels: they compile for every architecture (no GPU needed); every plan of theirs agrees with float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longscan.bench.scan import make_inputs as bench_inputs
from longscan.errors import BackendError
from longscan.ops import backends, nvrtc
from longscan.ops.selective_scan import selective_scan
from longscan.ops.selective_scan.cases import NAMES, ScanCase, make_inputs
from longscan.ops.selective_scan.cuda import _forward_tile
from longscan.ops.selective_scan.cuda_plan import SPANS, Split, backward_split, forward_split
from tests.ops.agreement import TOLERANCE, assert_close, in_float64, outputs_and_gradients

FOLDER = Path(backends.__file__).parent / "selective_scan"

#: Mamba's own call: bfloat16, 16 real states, B and C per step, a gate and softplus.
MAMBA = {
    "FORMAT": 1, "COMPLEX": 0, "B_STEP": 1, "C_STEP": 1, "HAS_Z": 1, "SOFTPLUS": 1, "PACKED": 0, "ALIGNED": 1,
    "LANES": 2, "STATES": 8, "WHOLE": 1, "PARTIAL": 0,
}  # fmt: skip
FORWARD = {"OUTPUT": 1, "SAVE": 1, "CHUNKED": 0, "CHUNK": 32, "WARPS": 4}
FLOW = {"TILE": 16, "AHEAD": 2, "WARPS": 4, "RESIDENT": 4}


def forward(options: dict[str, int], lanes: int, states: int, **more: int) -> tuple[str, dict[str, int]]:
    numbers = states * (1 + options["COMPLEX"])
    layout = _forward_tile(lanes, numbers, channels=2048)
    return "scan_forward.cu", {**options, **FORWARD, **layout, "LANES": lanes, "STATES": states, **more}


BACKWARD = {"TILE": 32, "SUB": 4, "CHUNKED": 0, "WARPS": 4, "RESIDENT": 2}
OTHER = {**MAMBA, "FORMAT": 0, "COMPLEX": 1, "LANES": 4, "STATES": 2, "B_STEP": 0, "HAS_Z": 0, "SOFTPLUS": 0,
         "PACKED": 1, "ALIGNED": 0, "WHOLE": 0}  # fmt: skip

KERNELS = {
    "forward": forward(MAMBA, 2, 8),
    "forward-narrow": forward(MAMBA, 4, 4),
    "forward-narrowest": forward(MAMBA, 8, 2),
    "first-pass": forward(MAMBA, 2, 8, OUTPUT=0, SAVE=0, CHUNKED=1),
    "backward": ("scan_backward.cu", {**MAMBA, **BACKWARD}),
    "backward-split": ("scan_backward.cu", {**MAMBA, **BACKWARD, "CHUNKED": 1}),
    "collect": ("scan_collect.cu", {**MAMBA, "VECTOR": 4}),
    "flow": ("scan_flow.cu", {**MAMBA, **FLOW}),
    "chain": ("scan_chain.cu", {**MAMBA, "REVERSE": 1}),
}
OTHERS = {
    "forward": forward(OTHER, 4, 2),
    "backward": ("scan_backward.cu", {**OTHER, **BACKWARD}),
    "collect": ("scan_collect.cu", {**OTHER, "VECTOR": 1}),
    "flow": ("scan_flow.cu", {**OTHER, **FLOW}),
    "chain": ("scan_chain.cu", {**OTHER, "REVERSE": 0}),
    "forward-partial": forward(MAMBA, 4, 8, PARTIAL=1),
    "backward-partial": ("scan_backward.cu", {**MAMBA, **BACKWARD, "LANES": 4, "PARTIAL": 1}),
}

needs_compiler = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is installed for tests on Linux only")


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", KERNELS)
def test_mambas_kernels_compile_and_spill_nothing(name: str, arch: str) -> None:
    source, options = KERNELS[name]
    code, log = nvrtc.compile_source(FOLDER / source, nvrtc.macros(options), arch)
    assert code.startswith(b"\x7fELF")
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in log, log


@needs_compiler
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_options_compile(name: str) -> None:
    source, options = OTHERS[name]
    code, _ = nvrtc.compile_source(FOLDER / source, nvrtc.macros(options), "sm_80")
    assert code.startswith(b"\x7fELF")


@needs_compiler
def test_compiled_code_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSCAN_CUDA_CACHE_DIR", str(tmp_path))
    source, options = KERNELS["chain"]
    code = nvrtc.compile_cubin(FOLDER / source, nvrtc.macros(options), "sm_90")
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == code
    monkeypatch.setattr(nvrtc, "compile_source", None)
    assert nvrtc.compile_cubin(FOLDER / source, nvrtc.macros(options), "sm_90") == code


@needs_compiler
def test_a_kernel_that_does_not_compile_says_why(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text('extern "C" __global__ void broken() { nonsense; }')
    with pytest.raises(BackendError, match=r"(?s)broken.cu does not compile for sm_90 .*nonsense"):
        nvrtc.compile_source(source, nvrtc.macros({"UNUSED": 1}), "sm_90")


@pytest.mark.parametrize("plan", [forward_split, backward_split])
def test_time_is_split_where_rows_and_channels_leave_the_gpu_empty(plan) -> None:
    assert plan(16, 16 * 2048, 4096, 16, 132).steps == 0
    assert plan(8, 8 * 2048, 2048, 16, 132).steps == 0
    assert plan(1, 1, 1536, 16, 132).steps == 0
    for length in (2048, 65536, 2**20):
        assert 0 < plan(1, length, 256, 16, 132).steps < length


@pytest.mark.parametrize("plan", [forward_split, backward_split])
@pytest.mark.parametrize("numbers", [1, 2, 5, 16, 32])
def test_plans_are_ones_the_kernels_take(plan, numbers: int) -> None:
    for sequences, length, channels in ((1, 100, 1), (1, 70000, 64), (64, 16, 4096), (3, 5000, 100)):
        split = plan(sequences, sequences * length, channels, numbers, 132)
        assert split.steps in (0, *SPANS)
        # Pieces begin where states are saved.
        assert split.steps % 32 == 0
        assert split.numbers & (split.numbers - 1) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "split", [Split(8, 0), Split(4, 0), Split(2, 0), Split(8, 64), Split(4, 128), Split(2, 64)], ids=str
)
@pytest.mark.parametrize(
    "case",
    [
        ScanCase("rows", batch=2, length=301, channels=72, initial=True),
        ScanCase("odd", batch=1, length=130, channels=37, initial=True),
        ScanCase("packed", lengths=(64, 0, 65, 3, 129), channels=40, initial=True),
        ScanCase("complex", batch=1, length=150, channels=24, complex=True, state=8, initial=True),
        ScanCase("groups", batch=1, length=150, channels=48, groups=3, state=32),
        ScanCase("constant", batch=2, length=150, channels=24, b="constant", c="constant"),
        ScanCase("many-states", batch=2, length=150, channels=40, state=72, initial=True),
        ScanCase("many-complex", batch=1, length=150, channels=24, complex=True, state=40, b="constant", initial=True),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_every_plan_gives_the_same(case: ScanCase, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    from longscan.ops.selective_scan import cuda

    monkeypatch.setattr(cuda, "forward_split", lambda *_: split)
    monkeypatch.setattr(cuda, "backward_split", lambda *_: Split(8, split.steps))
    inputs = make_inputs(case, "cuda", torch.float32)

    def scan(backend: str):
        return lambda **tensors: selective_scan(
            **tensors, dt_softplus=case.softplus, return_final_state=True, backend=backend
        )

    ours = outputs_and_gradients(scan("cuda"), inputs, NAMES)
    again = outputs_and_gradients(scan("cuda"), inputs, NAMES)
    truth = outputs_and_gradients(scan("reference"), in_float64(inputs), NAMES)
    assert_close(ours, truth, TOLERANCE[torch.float32])
    for name, value in ours.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).split(".")[1]
)
@pytest.mark.parametrize("length", [512, 3000])
def test_parameters_gradients_are_as_exact_as_float32(length: int, dtype: torch.dtype) -> None:
    """Whatever the activations are: sums over time of what has not been rounded. mamba-ssm's are off by 1.7e-6."""
    inputs = bench_inputs((2, length, 64, 16), dtype, "cuda", seed=0)
    names = ("A", "D", "dt_bias")

    def gradients(inputs: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in inputs.items()}
        y = selective_scan(**leaves, dt_softplus=True, backend=backend)
        assert isinstance(y, Tensor)
        return torch.autograd.grad(y, [leaves[name] for name in names], torch.ones_like(y))

    ours = gradients(inputs, "cuda")
    truth = gradients({name: tensor.double() for name, tensor in inputs.items()}, "reference")
    for name, own, expected in zip(names, ours, truth, strict=True):
        assert (own.double() - expected).norm() <= 1.7e-6 * expected.norm(), name


@pytest.mark.gpu
def test_views_that_begin_anywhere() -> None:
    """Parameters and states may lie in a larger tensor at any multiple of their own size."""
    inputs = make_inputs(ScanCase("mamba", initial=True), "cuda", torch.float32)
    whole = selective_scan(**inputs, dt_softplus=True, return_final_state=True, backend="cuda")

    def shifted(tensor: Tensor) -> Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        return room[1:].view(tensor.shape).copy_(tensor)

    views = {name: None if tensor is None else shifted(tensor) for name, tensor in inputs.items()}
    again = selective_scan(**views, dt_softplus=True, return_final_state=True, backend="cuda")
    for one, other in zip(whole, again, strict=True):
        assert_close({"": one}, {"": other}, 1e-6)
