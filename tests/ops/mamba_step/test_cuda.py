"""The CUDA step: its kernels compile for every architecture (no GPU needed), and agree with float64 on one."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longscan.errors import ArgumentError, BackendError
from longscan.ops import mamba_step, nvrtc
from longscan.ops.mamba_step import CudaMambaDecoder, MambaStepWeights
from longscan.ops.mamba_step.cuda import FEW
from longscan.ops.mamba_step.decoder import State
from tests.ops.mamba_step.test_decoder import BY_NAME, CASES, Case, Model, assert_close, clone

FOLDER = Path(mamba_step.__file__).parent

#: Kernels of the model of 1.4 billion parameters.
SIZES = {"FORMAT": 1, "MODEL": 2048, "INNER": 4096, "STATES": 16, "RANK": 128, "WIDTH": 4, "LAYERS": 48, "BLOCKS": 132}
KERNELS = {
    "step": ("step.cu", {**SIZES, "ROWS": 1, "TILES": 5}),
    "batch": ("batch.cu", {**SIZES, "THREADS": 256, "LANES": 4, "SHORT": 0, "EVEN": 1}),
    "batch-short": ("batch.cu", {**SIZES, "THREADS": 256, "LANES": 2, "SHORT": 1, "EVEN": 1}),
}
OTHERS = {
    "four": ("step.cu", {**SIZES, "ROWS": 4, "TILES": 3}),
    "small": ("step.cu", {"FORMAT": 2, "MODEL": 768, "INNER": 256, "STATES": 5, "RANK": 8, "WIDTH": 1, "LAYERS": 1,
                          "BLOCKS": 2, "ROWS": 2, "TILES": 2}),
    "batch": ("batch.cu", {"FORMAT": 0, "MODEL": 27, "STATES": 3, "WIDTH": 1, "THREADS": 256,
                           "LANES": 1, "SHORT": 0, "EVEN": 0}),
}  # fmt: skip

needs_compiler = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is installed for tests on Linux only")


def compile_for(source: str, options: dict[str, int], arch: str) -> str:
    code, log = nvrtc.compile_source(FOLDER / source, nvrtc.macros(options), arch)
    assert code.startswith(b"\x7fELF")
    return log


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_and_spill_nothing(name: str, arch: str) -> None:
    log = compile_for(*KERNELS[name], arch)
    nothing = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert 0 < log.count(nothing) == log.count("spill stores"), log


@needs_compiler
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_options_compile(name: str) -> None:
    compile_for(*OTHERS[name], "sm_80")


def test_refuses_the_cpu_and_matrices_of_several_dtypes() -> None:
    model = Model(BY_NAME["mamba"])
    with pytest.raises(BackendError, match="runs on NVIDIA GPUs, they are on cpu"):
        CudaMambaDecoder(model.layers, embedding=model.embedding, final_norm=model.norm)


def on_gpu(weights: MambaStepWeights) -> MambaStepWeights:
    own = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights) if field.init}
    moved: dict[str, Any] = {name: value.cuda() for name, value in own.items() if isinstance(value, Tensor)}
    return dataclasses.replace(weights, **moved)


def decoder_of(model: Model) -> CudaMambaDecoder:
    return CudaMambaDecoder(
        [on_gpu(layer) for layer in model.layers],
        embedding=model.embedding.cuda(),
        final_norm=model.norm.cuda(),
        head=None if model.head is None else model.head.cuda(),
        head_bias=None if model.head_bias is None else model.head_bias.cuda(),
        eps=model.case.eps,
    )


def states_on_gpu(case: Case, states: list[State]) -> list[State]:
    return [(conv.to("cuda", case.dtype), ssm.cuda()) for conv, ssm in states]


#: What a product of a batch rounds: its activations are of the weights' dtype.
COARSE = {torch.float32: 5e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


#: Sizes that the one kernel serves; teams of 4, 8 and 16 warps, rows that do not fill a tile.
_EVEN = (
    Case("even-bfloat16", layers=3, d_model=256, d_inner=512, dt_rank=8, dtype=torch.bfloat16),
    Case("even-float16", d_model=512, d_inner=1024, dt_rank=16, dtype=torch.float16, biases=True, tied=False),
    Case("even-bare", d_model=512, d_inner=256, dt_rank=8, optional=False, d_conv=1, d_state=5, dtype=torch.bfloat16),
    Case("even-wide", d_model=768, d_inner=5120, d_state=40, dt_rank=264, dtype=torch.bfloat16),
    Case("even-narrow", d_model=2816, d_inner=256, dt_rank=8, vocabulary=5000, dtype=torch.bfloat16),
)
EVEN = [dataclasses.replace(case, state_dtype=case.dtype) for case in _EVEN]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 3, FEW - 1, FEW, FEW + 1, 33])
@pytest.mark.parametrize(
    "case", [*(case for case in CASES if case.dtype != torch.int8), *EVEN], ids=lambda case: case.name
)
def test_agrees_with_float64(case: Case, batch: int) -> None:
    model = Model(case)
    decoder, truth = decoder_of(model), model.states(batch)
    ours = states_on_gpu(case, truth)
    for t in range(3):
        tokens = (torch.arange(batch) * 7 + t) % case.vocabulary
        logits = decoder.step(tokens.cuda(), ours)
        expected, truth = model.step(tokens, truth)
        # One kernel has nearly the precision of float32 between products; what is kept of x has not.
        exact = t == 0 and decoder.in_one_kernel(batch)
        fine = 1e-4 if exact else COARSE[case.dtype]
        assert_close(logits.cpu(), expected, fine)
        for (conv, ssm), (conv_truth, ssm_truth) in zip(ours, truth, strict=True):
            assert_close(conv.cpu(), conv_truth, max(fine, 1e-4 if case.dtype == torch.float32 else 1e-2))
            assert_close(ssm.cpu(), ssm_truth, fine)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize("case", [case for case in EVEN if case.d_state in (5, 16, 40)], ids=lambda case: case.name)
def test_states_may_be_short(case: Case, batch: int) -> None:
    """States in the matrices' dtype: what they are rounded to is the only difference."""
    model = Model(case)
    decoder, truth = decoder_of(model), model.states(batch)
    ours = [(conv, ssm.to(case.dtype)) for conv, ssm in states_on_gpu(case, truth)]
    for t in range(3):
        tokens = (torch.arange(batch) * 7 + t) % case.vocabulary
        logits = decoder.step(tokens.cuda(), ours)
        expected, truth = model.step(tokens, truth)
        assert_close(logits.cpu(), expected, 2 * COARSE[case.dtype])
        for (_, ssm), (_, ssm_truth) in zip(ours, truth, strict=True):
            assert ssm.dtype == case.dtype
            assert_close(ssm.cpu(), ssm_truth, 2 * COARSE[case.dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, FEW])
def test_the_same_inputs_give_the_same_bits(batch: int) -> None:
    """Layers of real width: the kernels of neighbouring layers overlap in time."""
    case = Case("wide", layers=6, d_model=512, d_inner=1024, dt_rank=32, vocabulary=3000, dtype=torch.bfloat16)
    model = Model(case)
    decoder, first = decoder_of(model), states_on_gpu(case, model.states(batch))
    tokens = torch.arange(batch, device="cuda")
    results = []
    for _ in range(20):
        states = clone(first)
        results.append([decoder.step(tokens, states), *(t for state in states for t in state)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_refuses_what_does_not_fit() -> None:
    model = Model(BY_NAME["mamba"])
    decoder = decoder_of(model)
    with pytest.raises(ArgumentError, match="conv_state of layer 0"):
        decoder.step(torch.tensor([1], device="cuda"), model.states(1))
    mixed = [on_gpu(dataclasses.replace(layer, x_proj=layer.x_proj.bfloat16())) for layer in model.layers]
    with pytest.raises(BackendError, match="expected one dtype"):
        CudaMambaDecoder(mixed, embedding=model.embedding.cuda(), final_norm=model.norm.cuda())
