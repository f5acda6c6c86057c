"""Atomic counters for threads that share one list of tasks.

A chain of small products has a barrier after each of them, and one parallel region per product would cost more than the
product. Instead the whole chain is one region: its tasks are numbered in order of dependence, each thread claims the
next number with an atomic add, and before it starts waits until the phases its task depends on are done. A thread that
waits has only older tasks before it, all of them claimed by running threads: so the chain ends with any number of
threads, one included, and a thread that is late costs no more than its share.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from longscan.ops.jit import inline
from longscan.ops.simd_memory import prefetch

_I64 = ir.IntType(64)
_X86, _ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")
_SPINS_BEFORE_YIELD = 4096
_CACHE_LINE = 64
# A good part of a core's own cache.
_FETCH_AHEAD = 1 << 18


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType())


@intrinsic
def fetch_add(_context: Any, address: Any, value: Any) -> Any:
    """Adds to the int64 at `address` and returns what it was, ordered before and after everything around it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def load_acquire(_context: Any, address: Any) -> Any:
    """The int64 at `address`; what its writer wrote before is visible after."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8, typ=_I64)

    return types.int64(types.int64), codegen


@intrinsic
def int64_pointer(_context: Any, address: Any) -> Any:
    """A pointer to int64, for `carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def pause(_context: Any) -> Any:
    """Tells the core that it is waiting."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nothing, hint = ir.VoidType(), ir.IntType(32)
        if platform.machine() in _X86:
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(nothing, []), "llvm.x86.sse2.pause"
            )
            builder.call(function, [])
        elif platform.machine() in _ARM:
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(nothing, [hint]), "llvm.aarch64.hint"
            )
            builder.call(function, [hint(1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_way(_context: Any) -> Any:
    """Lets the operating system run another thread: the one waited for may not be running."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.system() != "Windows":
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.IntType(32), []), "sched_yield"
            )
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_at(_context: Any, function: Any, thread: Any, a: Any, table: Any, states: Any, eps: Any) -> Any:
    """Calls the C function at address `function` with five int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 5)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@inline
def fetch(start, end):  # type: ignore[no-untyped-def]
    """Asks for memory that will be needed, and goes on."""
    while start < end:
        prefetch(start)
        start += _CACHE_LINE


@inline
def wait_until(counter, count, start, end):  # type: ignore[no-untyped-def]
    """Returns when the int64 at address `counter` has reached `count`; meanwhile fetches memory from `start` on."""
    end = min(end, start + _FETCH_AHEAD)
    spins = 0
    while load_acquire(counter) < count:
        if start < end:
            prefetch(start)
            start += _CACHE_LINE
        else:
            pause()
        spins += 1
        if spins % _SPINS_BEFORE_YIELD == 0:
            give_way()
