"""How this package compiles and runs Numba kernels: caching on disk and threads.

A kernel is a pair: `body(task, ...)`, which does one task, and a driver, which runs all tasks in parallel::

    @kernel
    def _body(task, ...): ...

    @parallel_kernel
    def _driver(tasks, ...):
        for task in prange(tasks):
            _body(task, ...)

    run(_driver, _body, tasks, ...)
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import torch
from numba import prange as prange
from numba import types
from numba.core import caching, ccallback
from numba.core import config as _config
from numba.np.ufunc import parallel as pool

# Its attributes are set at run time.
config: Any = _config

# Files whose functions are compiled into kernels of other files. Numba notices changes of a kernel's own file only.
_SHARED_SOURCES = ("jit.py", "simd.py", "simd_memory.py", "simd_math.py")

#: Turns a helper function into one that is inlined into every kernel that calls it.
inline: Callable[..., Any] = numba.njit(forceinline=True, error_model="numpy", nogil=True)


@cache
def _sources_digest(folder: Path) -> str:
    """Of the shared sources, and of all that stands beside a kernel."""
    shared = Path(__file__).parent
    digest = hashlib.sha256()
    for path in (*(shared / name for name in _SHARED_SOURCES), *sorted(folder.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _KernelCache(caching.FunctionCache):
    """Numba's cache on disk, with the sources in the key that a kernel is compiled from."""

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        folder = Path(self._py_func.__code__.co_filename).parent
        return (*super()._index_key(sig, codegen), _sources_digest(folder))


def _cached(function: Callable[..., Any], **options: Any) -> Any:
    dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
    # Where no folder can be written, every process compiles anew.
    with suppress(RuntimeError, OSError):
        dispatcher._cache = _KernelCache(function)
    return dispatcher


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles `function` at its first call, without the interpreter's lock, and keeps the code on disk."""
    return _cached(function)


def parallel_kernel(function: Callable[..., Any]) -> Any:
    """As `kernel`, for a driver with one `prange`; called through `run` only."""
    return _cached(function, parallel=True)


def c_function(function: Callable[..., Any], arguments: int) -> Any:
    """Compiles `function` of so many int64 to a C function: its `address` for a driver, its `ctypes` for Python.

    A driver that calls a large body by address compiles in a second; one that contains it optimises it twice over.
    """
    compiled: Any = ccallback.CFunc(
        function, (types.UniTuple(types.int64, arguments).types, types.void), {}, {"error_model": "numpy"}
    )
    with suppress(RuntimeError, OSError):
        compiled._cache = _KernelCache(function)
    compiled.compile()
    return compiled


_launch_lock = threading.Lock()
_run_lock = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked, _launch_lock, _run_lock
    _forked = True
    _launch_lock, _run_lock = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def _launch() -> bool:
    """Starts Numba's threads, on OpenMP where it can be had; returns whether several calls may run at a time.

    OpenMP's threads are those of torch, so kernels and matrix products in turn do not fight for the cores. Numba asks
    for a layer once in the life of a process; the user's own choice is left alone, and so is the setting.
    """
    with _launch_lock:
        chosen = config.THREADING_LAYER
        if chosen == "default":
            try:
                config.THREADING_LAYER = "omp"
                with suppress(ImportError, ValueError):
                    pool._launch_threads()
            finally:
                config.THREADING_LAYER = chosen
        pool._launch_threads()
        return bool(numba.threading_layer() != "workqueue")


def threads() -> int:
    """How many threads kernels use: as many as torch, and one in a forked process.

    A pool of OpenMP threads does not survive a fork, and GNU's runtime ends a process that tries to use it.
    """
    return 1 if _forked else min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)


def run(driver: Any, body: Any, tasks: int, *arguments: Any) -> None:
    """Runs `body(task, *arguments)` for every task in range(tasks), in parallel by `driver(tasks, *arguments)`."""
    count = threads()
    if count == 1 or tasks == 1:
        for task in range(tasks):
            body(task, *arguments)
        return
    reentrant = _launch()
    before = numba.get_num_threads()
    if before != count:
        numba.set_num_threads(count)
    try:
        if reentrant:
            driver(tasks, *arguments)
        else:
            with _run_lock:
                driver(tasks, *arguments)
    finally:
        if before != count:
            numba.set_num_threads(before)
