"""Which backend serves which operator on which device here, and whether it gives the right numbers.

Each backend that should work is run, forward and backward, on a few of the operator's own test cases, and compared with
the reference in float64 on the CPU.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.diagnostics.machine import devices
from longscan.ops import backends, nvrtc
from longscan.ops.add_rms_norm import add_rms_norm
from longscan.ops.cauchy import cauchy
from longscan.ops.causal_conv1d import causal_conv1d
from longscan.ops.decay_attention import decay_attention
from longscan.ops.linear_cross_entropy import linear_cross_entropy
from longscan.ops.linear_scan import linear_scan
from longscan.ops.long_conv import long_conv
from longscan.ops.selective_scan import selective_scan
from longscan.ops.vandermonde import vandermonde, vandermonde_transpose

#: Largest error against float64 that passes, relative to the largest value of each output. Float32 and the shared
#: sums of these small cases stay two orders of magnitude below it.
TOLERANCE = 1e-4

#: Seconds after which no further case of a backend's test is started; the first one always runs.
BUDGET = 1.0


@dataclass(frozen=True)
class Check:
    """One backend of one operator on one kind of device.

    `reason` says why the backend does not serve it (None: it does). `chosen`: `auto` takes it. `error` is the largest
    relative error of outputs and gradients, `failure` what went wrong; both None if it was not run.
    """

    device: str
    operator: str
    backend: str
    reason: str | None = None
    chosen: bool = False
    error: float | None = None
    seconds: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Cache:
    """A folder in which compiled kernels are kept between processes."""

    name: str
    folder: Path
    writable: bool
    variable: str


def check_backends(where: list[torch.device] | None = None) -> list[Check]:
    """Tries every backend of every operator on `where` (default: every device of this machine)."""
    return [
        check
        for device in (devices() if where is None else where)
        for operator in backends.OPERATORS
        for check in _check_operator(operator, device)
    ]


def _check_operator(operator: str, device: torch.device) -> list[Check]:
    checks = []
    taken = False
    for name in backends.OPERATORS[operator]:
        reason, failure = _refusal(operator, name, device)
        if reason is None and name == "triton" and device.type == "cpu":
            reason = "in its interpreter (TRITON_INTERPRET=1) it serves by name only, for tests"
        chosen = not taken and reason is None and failure is None
        taken = taken or chosen
        error, seconds = None, None
        if reason is None and failure is None:
            error, seconds, failure = _self_test(operator, name, device)
        checks.append(Check(device.type, operator, name, reason, chosen, error, seconds, failure))
    return checks


def _refusal(operator: str, name: str, device: torch.device) -> tuple[str | None, str | None]:
    """Why a backend does not serve the operator's first test case, and what broke while asking."""
    cases = _cases(operator)
    inputs = cases.make_inputs(cases.CASES[0], device)
    tensors = [inputs.get(argument) for argument in cases.NAMES]
    if operator in ("selective_scan", "causal_conv1d"):
        tensors.append(None)  # cu_seqlens
    try:
        return backends.refusal(operator, name, device, _normalised(operator, tensors)), None
    except Exception as error:  # whatever breaks here is the finding
        return None, f"{type(error).__name__}: {error}"


def _self_test(operator: str, name: str, device: torch.device) -> tuple[float | None, float, str | None]:
    """Largest relative error against float64, the seconds it took, and what failed."""
    cases = _cases(operator)
    start = time.perf_counter()
    worst = 0.0
    try:
        for case in getattr(cases, "FEW", cases.CASES[:5]):
            inputs = cases.make_inputs(case)
            expected = _run(operator, case, "reference", {key: _widened(tensor) for key, tensor in inputs.items()})
            given = _run(operator, case, name, {k: None if t is None else t.to(device) for k, t in inputs.items()})
            for what, value in given.items():
                error = _relative_error(value, expected[what])
                if not error <= TOLERANCE:
                    seconds = time.perf_counter() - start
                    return error, seconds, f"case {case.name}: {what} is off by {error:.1e} (allowed: {TOLERANCE:.0e})"
                worst = max(worst, error)
            if time.perf_counter() - start > BUDGET:
                break
    except Exception as error:  # a backend that cannot even run is what the doctor is there to find
        return None, time.perf_counter() - start, f"{type(error).__name__}: {error}"
    return worst, time.perf_counter() - start, None


def _widened(tensor: Tensor | None) -> Tensor | None:
    """The same numbers in double precision; integers as they are."""
    if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _run(operator: str, case: Any, name: str, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Outputs and gradients of one case, by name."""
    given = [(key, inputs.get(key)) for key in _cases(operator).NAMES]
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in given if tensor is not None}
    outputs = _PROBES[operator](case, {**inputs, **leaves}, name)
    results = {f"output {i}": output for i, output in enumerate(outputs)}
    total = torch.zeros((), device=outputs[0].device)
    for output in outputs:
        real = torch.view_as_real(output) if output.is_complex() else output
        # Every element enters the sum with a weight of its own, the same one whatever the dtype.
        weights = torch.linspace(-1, 1, real.numel(), device=real.device).to(real.dtype).view_as(real)
        total = total + (real * weights).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    results.update({f"gradient of {key}": grad for key, grad in zip(leaves, gradients, strict=True)})
    return results


def _relative_error(value: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    difference = float((value.detach().cpu().to(wide) - expected.detach()).abs().max())
    return difference / max(float(expected.detach().abs().max()), 1e-6)


def _cases(operator: str) -> Any:
    return importlib.import_module(f"longscan.ops.{operator}.cases")


def _normalised(operator: str, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """B and C as the backends of the scan get them: with an axis of groups."""
    if operator != "selective_scan":
        return tensors
    return [t.unsqueeze(2) if i in (3, 4) and t is not None and t.dim() == 3 else t for i, t in enumerate(tensors)]


def _probe_scan(case: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    result = selective_scan(**inputs, dt_softplus=case.softplus, return_final_state=True, backend=name)
    return tuple(result)


def _probe_conv(case: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    activation = "silu" if case.silu else None
    return tuple(causal_conv1d(**inputs, activation=activation, return_final_state=True, backend=name))


def _probe_norm(case: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    return tuple(add_rms_norm(**inputs, backend=name))


def _probe_loss(case: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    return (linear_cross_entropy(**inputs, vocab_size=case.vocabulary, backend=name),)


def _probe_decay(case: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    return tuple(decay_attention(**inputs, normalise=case.normalise, return_final_state=True, backend=name))


def _probe_vandermonde(case: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    kernel = vandermonde(**inputs, length=case.length, backend=name)
    return kernel, vandermonde_transpose(kernel.detach(), inputs["log_A_bar"], backend=name)


def _probe_cauchy(case: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    return (cauchy(**inputs, backend=name),)


def _probe_long_conv(case: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    return tuple(long_conv(**inputs, return_final_state=True, backend=name))


def _probe_linear(case: Any, inputs: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    return tuple(linear_scan(**inputs, return_final_state=True, backend=name))


# How to call each operator on one of its cases; one entry per key of `backends.OPERATORS`.
_PROBES: dict[str, Callable[[Any, dict[str, Any], str], tuple[Tensor, ...]]] = {
    "selective_scan": _probe_scan,
    "causal_conv1d": _probe_conv,
    "add_rms_norm": _probe_norm,
    "linear_cross_entropy": _probe_loss,
    "decay_attention": _probe_decay,
    "vandermonde": _probe_vandermonde,
    "cauchy": _probe_cauchy,
    "long_conv": _probe_long_conv,
    "linear_scan": _probe_linear,
}


def check_caches() -> list[Cache]:
    """Where compiled kernels are kept between processes, and whether they can be."""
    beside = Path(backends.__file__).resolve().parent / "selective_scan" / "__pycache__"
    numba = Path(os.environ["NUMBA_CACHE_DIR"]) if os.environ.get("NUMBA_CACHE_DIR") else beside
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    cuda = nvrtc.cache_folder()
    return [
        Cache("Numba (CPU kernels)", numba, _writable(numba), "NUMBA_CACHE_DIR"),
        Cache("Triton (GPU kernels)", triton, _writable(triton), "TRITON_CACHE_DIR"),
        Cache("CUDA (NVIDIA kernels)", cuda, _writable(cuda), "LONGSCAN_CUDA_CACHE_DIR"),
    ]


def _writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or, where it does not exist yet, in the nearest parent that does."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
