"""Which backend serves which operator on which tensor.

Each operator is a folder of this package; each of its backends is a module of that folder. A backend module says by
`unsupported(*tensors)` why it cannot serve a call (`None`: it can). `auto` takes the first backend of the device's
order that can; a backend asked for by name never falls back. The choice depends on shapes, dtypes, strides and devices
alone, so that a traced graph and an eager run make the same one.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longscan.errors import ArgumentError, BackendError

#: The operators and the backends each of them has, slowest and surest last. The Vandermonde product's Triton kernels
#: come behind its matrix products, since nothing has been measured of them.
OPERATORS: dict[str, tuple[str, ...]] = {
    "selective_scan": ("cpu", "cuda", "triton", "reference"),
    "causal_conv1d": ("cpu", "cuda", "triton", "reference"),
    "add_rms_norm": ("cpu", "triton", "reference"),
    "linear_cross_entropy": ("triton", "reference"),
    "decay_attention": ("triton", "chunked", "reference"),
    "vandermonde": ("chunked", "triton", "reference"),
    "cauchy": ("cpu", "triton", "chunked", "reference"),
    "linear_scan": ("cpu", "triton", "chunked", "reference"),
    "long_conv": ("fft", "reference"),
}

#: Every name that `backend=`, `with backend(...)` and LONGSCAN_BACKEND take.
NAMES = ("auto", "reference", "chunked", "fft", "cpu", "cuda", "triton")

# Devices a backend can run on at all; those in plain PyTorch run on every device.
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "xpu")}

# What a backend imports.
_REQUIREMENTS = {"cpu": ("numba",), "cuda": ("cuda.core", "cuda.bindings"), "triton": ("triton",)}

_override: str = os.environ.get("LONGSCAN_BACKEND", "auto") or "auto"


def check_name(name: str, argument: str = "backend") -> str:
    """Returns `name` if it names a backend, else raises `ArgumentError`."""
    if name not in NAMES:
        raise ArgumentError(f"{argument}: got {name!r}; allowed are {', '.join(NAMES)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, every operator uses backend `name` unless a call names its own.

    Args:
        name: "auto", "reference", "chunked" (matrix products over chunks), "fft" (Fourier transforms), "cpu" (Numba),
            "cuda" or "triton". It holds for all threads of the process.

    Raises:
        ArgumentError: unknown name.
        BackendError: at the call, when the backend cannot serve it; there is no fallback from a name.
    """
    global _override
    before, _override = _override, check_name(name)
    try:
        yield
    finally:
        _override = before


def requested(name: str | None) -> str:
    """The backend a call asks for: its own `backend=`, else the surrounding override, else "auto"."""
    if name is not None:
        return check_name(name)
    return check_name(_override, "LONGSCAN_BACKEND")


@cache
def load(operator: str, name: str) -> ModuleType | str:
    """The module of one backend, or the reason why it cannot be imported here."""
    if name not in OPERATORS[operator]:
        return f"{operator} has no backend {name!r}"
    for requirement in _REQUIREMENTS.get(name, ()):
        try:
            importlib.import_module(requirement)
        except ImportError as error:
            return f"{requirement} cannot be imported ({error})"
    return importlib.import_module(f"longscan.ops.{operator}.{name}")


@cache
def triton_interprets() -> bool:
    """Whether Triton runs its kernels in its interpreter, which serves CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refusal(operator: str, name: str, device: torch.device, tensors: Sequence[Any]) -> str | None:
    """Why backend `name` cannot serve this call, in words; `None` when it can."""
    devices = _DEVICES.get(name)
    if devices is not None and device.type not in devices:
        interpreted = name == "triton" and device.type == "cpu" and triton_interprets()
        if not interpreted:
            return f"it runs on {' or '.join(devices)}, the tensors are on {device.type}"
    module = load(operator, name)
    if isinstance(module, str):
        return module
    reason: str | None = module.unsupported(*tensors)
    return reason


def resolve(operator: str, name: str, tensors: Sequence[Tensor | None]) -> ModuleType:
    """The backend module that serves a call.

    Args:
        operator: a key of `OPERATORS`.
        name: "auto", or a backend's name.
        tensors: the operator's tensors, in the order of its backends' `unsupported`; the first one is never None.

    Raises:
        BackendError: a named backend cannot serve the call, with the reason.
    """
    first = tensors[0]
    assert first is not None
    if name != "auto":
        reason = refusal(operator, name, first.device, tensors)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot serve this {operator}: {reason}; use backend='auto'")
        return _module(operator, name)
    for candidate in OPERATORS[operator]:
        # Interpreted Triton is for tests: it is served by name only.
        if candidate == "triton" and first.device.type == "cpu":
            continue
        if refusal(operator, candidate, first.device, tensors) is None:
            return _module(operator, candidate)
    raise BackendError(f"no backend serves this {operator} on {first.device}")


def _module(operator: str, name: str) -> ModuleType:
    module = load(operator, name)
    assert isinstance(module, ModuleType)
    return module
