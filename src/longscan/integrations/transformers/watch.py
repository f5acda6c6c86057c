"""Whether a model is still what it was when its weights were laid out for a compiled step.

A step made for a model keeps the addresses of its matrices and copies of its vectors. Between two tokens anything may
happen to the model: a training step, new weights in the old memory or in other memory, an adapter put around a layer, a
hook. Looking takes some hundred microseconds a token; what it looks at is the list below.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from longscan.errors import ArgumentError, BackendError
from longscan.nn.linear import StepProjection

# Layers whose matrices a step reads where they lie, so that what changes in them it sees by itself.
_READ_IN_PLACE = (nn.Linear, nn.Embedding, StepProjection)

_compare = (ctypes.CDLL("msvcrt") if os.name == "nt" else ctypes.CDLL(None)).memcmp
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Step(Protocol):
    """What is made of a model."""

    def reads_in_place(self) -> frozenset[int]:
        """Addresses of parameters that it reads where they lie."""


S = TypeVar("S", bound=Step)


class Steps(Generic[S]):
    """The compiled steps of models: made when first asked for, and anew when a model is no longer what it was.

    Args:
        build: the step of a model; raises BackendError (or ArgumentError) where it cannot serve.
    """

    def __init__(self, build: Callable[[Any], S]) -> None:
        self._build = build
        self._kept: weakref.WeakKeyDictionary[nn.Module, tuple[S | None, Watch, threading.Lock]]
        self._kept = weakref.WeakKeyDictionary()

    @contextmanager
    def borrow(self, model: nn.Module) -> Iterator[S | None]:
        """The step of a model for one call; None where there is none, or while somebody else has it."""
        kept = self._kept.get(model)
        if kept is None or not kept[1].holds():
            step: S | None = None
            with suppress(BackendError, ArgumentError):
                step = self._build(model)
            watch = Watch(model, contents=step is not None, in_place=step.reads_in_place() if step else frozenset())
            kept = self._kept[model] = (step if watch.holds() else None, watch, threading.Lock())
        step, _, lock = kept
        if step is None or not lock.acquire(blocking=False):
            yield None
            return
        try:
            yield step
        finally:
            lock.release()


class Watch:
    """Remembers a model's modules, their types and parameters, where each lies, and the contents of its vectors.

    Args:
        model: on the CPU, if ``contents``.
        contents: whether contents matter; they do not where no step could be made.
        in_place: addresses of parameters whose contents do not matter either.
    """

    def __init__(self, model: nn.Module, contents: bool = True, in_place: frozenset[int] = frozenset()) -> None:
        self._modules: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._parameters: list[tuple[dict[str, Any], str, Any, int]] = []
        self._contents: list[tuple[int, int, int]] = []
        self._copies: list[Tensor] = []
        # Whether every vector lies in memory as its copy does; if not, none can be compared and nothing ever holds.
        self._comparable = True
        for module in model.modules():
            for name, child in module._modules.items():
                if child is not None:
                    self._modules.append((module._modules, name, child, type(child)))
            for name, parameter in module._parameters.items():
                self._parameters.append(
                    (module._parameters, name, parameter, 0 if parameter is None else parameter.data_ptr())
                )
                if not contents or parameter is None or parameter.data_ptr() in in_place:
                    continue
                if not (type(module) in _READ_IN_PLACE and name == "weight"):
                    self._copy(parameter)

    def _copy(self, parameter: Tensor) -> None:
        self._comparable &= parameter.is_contiguous()
        size = parameter.numel() * parameter.element_size()
        copy = parameter.detach().clone(memory_format=torch.contiguous_format)
        self._copies.append(copy)
        self._contents.append((parameter.data_ptr(), copy.data_ptr(), size))

    def holds(self) -> bool:
        """Whether nothing has changed that a step made at this object's beginning would miss."""
        if not self._comparable or torch.nn.modules.module._has_any_global_hook():
            return False
        for children, name, child, kind in self._modules:
            if id(children.get(name)) != id(child) or type(child) is not kind:
                return False
            if child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__:
                return False
        for parameters, name, parameter, address in self._parameters:
            if parameters.get(name) is not parameter:
                return False
            if parameter is not None and parameter.data_ptr() != address:
                return False
        return not any(_compare(here, copy, size) for here, copy, size in self._contents)
