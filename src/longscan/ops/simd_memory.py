"""Memory of Numba kernels, by byte address (int64): vectors and single numbers, in several formats.

Vectors are those of `simd`; in memory their lanes may be float32, bfloat16, float16 or int8. `read` and `write` take a
number of lanes, and touch nothing behind them.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from longscan.ops.jit import inline
from longscan.ops.simd import (
    FLOATS,
    HAS_FLOAT16,
    INTEGERS,
    VECTOR_BYTES,
    WIDTH,
    call,
    splat,
    to_vector,
    vector,
)

#: Formats of numbers in memory.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

_i16, _i32 = ir.IntType(16), ir.IntType(32)
_f32 = ir.FloatType()
_BYTES, _SHORTS = (ir.VectorType(kind, WIDTH) for kind in (ir.IntType(8), _i16))
_LANES = ir.Constant(INTEGERS, list(range(WIDTH)))


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _address(context: Any, builder: Any, value: Any, kind: Any) -> Any:
    return context.cast(builder, value, kind, types.int64)


def _first_lanes(builder: Any, count: Any) -> Any:
    return builder.icmp_signed("<", _LANES, splat(builder, builder.trunc(count, _i32)))


def _read(builder: Any, address: Any, kind: Any, count: Any) -> Any:
    """Loads a vector of LLVM type `kind`; with a count, its first lanes, and zeros."""
    pointer, size = _pointer(builder, address, kind), kind.element.get_abi_size(_LAYOUT)
    if count is None:
        return builder.load(pointer, align=size)
    name = f"llvm.masked.load.{_mangled(kind)}.p0"
    return call(builder, name, kind, pointer, _i32(size), _first_lanes(builder, count), ir.Constant(kind, None))


def _write(builder: Any, value: Any, address: Any, count: Any) -> None:
    pointer, size = _pointer(builder, address, value.type), value.type.element.get_abi_size(_LAYOUT)
    if count is None:
        builder.store(value, pointer, align=size)
        return
    name = f"llvm.masked.store.{_mangled(value.type)}.p0"
    call(builder, name, ir.VoidType(), value, pointer, _i32(size), _first_lanes(builder, count))


_LAYOUT = llvm.create_target_data("e")


def _mangled(kind: Any) -> str:
    return f"v{WIDTH}" + ("f32" if kind == FLOATS else f"i{kind.element.width}")


def _widen(builder: Any, address: Any, number_format: int, count: Any) -> Any:
    """Loads numbers of a format as float32."""
    if number_format == FLOAT32:
        return _read(builder, address, FLOATS, count)
    bits = _read(builder, address, _SHORTS, count)
    if number_format == BFLOAT16:
        shifted = builder.shl(builder.zext(bits, INTEGERS), ir.Constant(INTEGERS, [16] * WIDTH))
        return builder.bitcast(shifted, FLOATS)
    return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), WIDTH)), FLOATS)


def _narrow(builder: Any, value: Any, number_format: int) -> Any:
    """float32 to a format, rounded to the nearest, ties to even."""
    if number_format == FLOAT32:
        return value
    if number_format == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), WIDTH)), _SHORTS)
    bits = builder.bitcast(value, INTEGERS)
    sixteen, one = ir.Constant(INTEGERS, [16] * WIDTH), ir.Constant(INTEGERS, [1] * WIDTH)
    odd = builder.and_(builder.lshr(bits, sixteen), one)
    rounded = builder.add(bits, builder.add(odd, ir.Constant(INTEGERS, [0x7FFF] * WIDTH)))
    # Rounding up could turn a NaN into an infinity.
    quiet = builder.or_(bits, ir.Constant(INTEGERS, [0x400000] * WIDTH))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, sixteen), _SHORTS)


def _by_format(builder: Any, number_format: Any, emit: Callable[[int], Any], result: Any | None) -> Any:
    """Emits code for the three formats; which one runs is decided at run time."""
    end = builder.append_basic_block("format.end")
    switch = builder.switch(number_format, end)
    arrivals = [(ir.Constant(result, None), builder.block)] if result is not None else []
    choices = (FLOAT32, BFLOAT16, FLOAT16) if HAS_FLOAT16 else (FLOAT32, BFLOAT16)
    for choice in choices:
        block = builder.append_basic_block("format")
        switch.add_case(ir.IntType(64)(choice), block)
        builder.position_at_end(block)
        arrivals.append((emit(choice), builder.block))
        builder.branch(end)
    builder.position_at_end(end)
    if result is None:
        return None
    phi = builder.phi(result)
    for value, block in arrivals:
        phi.add_incoming(value, block)
    return phi


def _loading(context: Any, builder: Any, sig: Any, values: Any) -> Any:
    address, *rest = (_address(context, builder, v, k) for v, k in zip(values, sig.args, strict=True))
    count = rest[1] if len(rest) > 1 else None
    if not rest:
        return _read(builder, address, FLOATS, None)
    return _by_format(builder, rest[0], lambda choice: _widen(builder, address, choice, count), FLOATS)


@intrinsic
def load(typingctx: Any, address: Any) -> Any:
    """load(address): `WIDTH` consecutive float32."""
    return vector(address), _loading


@intrinsic
def load_format(typingctx: Any, address: Any, number_format: Any) -> Any:
    """load_format(address, format): `WIDTH` consecutive numbers of a format, as float32."""
    return vector(address, number_format), _loading


@intrinsic
def load_part(typingctx: Any, address: Any, number_format: Any, count: Any) -> Any:
    """load_part(address, format, count): the first `count` of `WIDTH` numbers; the other lanes are zero."""
    return vector(address, number_format, count), _loading


def _storing(context: Any, builder: Any, sig: Any, values: Any) -> Any:
    value = to_vector(context, builder, values[0], sig.args[0])
    address, *rest = (_address(context, builder, v, k) for v, k in zip(values[1:], sig.args[1:], strict=True))
    count = rest[1] if len(rest) > 1 else None
    if not rest:
        _write(builder, value, address, None)
    else:
        _by_format(
            builder, rest[0], lambda choice: _write(builder, _narrow(builder, value, choice), address, count), None
        )
    return context.get_dummy_value()


@intrinsic
def store(typingctx: Any, value: Any, address: Any) -> Any:
    """store(v, address): as float32."""
    return types.none(value, address), _storing


@intrinsic
def store_format(typingctx: Any, value: Any, address: Any, number_format: Any) -> Any:
    """store_format(v, address, format): rounded to nearest, ties to even."""
    return types.none(value, address, number_format), _storing


@intrinsic
def store_part(typingctx: Any, value: Any, address: Any, number_format: Any, count: Any) -> Any:
    """store_part(v, address, format, count): the first `count` lanes; the other numbers stay as they are."""
    return types.none(value, address, number_format, count), _storing


def _loading_int8(context: Any, builder: Any, sig: Any, values: Any) -> Any:
    address, *count = (_address(context, builder, v, k) for v, k in zip(values, sig.args, strict=True))
    numbers = _read(builder, address, _BYTES, count[0] if count else None)
    return builder.sitofp(builder.sext(numbers, INTEGERS), FLOATS)


@intrinsic
def load_int8(typingctx: Any, address: Any) -> Any:
    """load_int8(address): `WIDTH` consecutive int8, as float32."""
    return vector(address), _loading_int8


@intrinsic
def load_int8_part(typingctx: Any, address: Any, count: Any) -> Any:
    """load_int8_part(address, count): the first `count` of `WIDTH` int8; the other lanes are zero."""
    return vector(address, count), _loading_int8


@intrinsic
def load_scalar(typingctx: Any, address: Any) -> Any:
    """load_scalar(address): one float32."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        return builder.load(_pointer(builder, _address(context, builder, values[0], sig.args[0]), _f32), align=4)

    return types.float32(address), generate


@intrinsic
def store_scalar(typingctx: Any, value: Any, address: Any) -> Any:
    """store_scalar(number, address): one float32."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        number = context.cast(builder, values[0], sig.args[0], types.float32)
        builder.store(number, _pointer(builder, _address(context, builder, values[1], sig.args[1]), _f32), align=4)
        return context.get_dummy_value()

    return types.none(value, address), generate


@intrinsic
def load_scalar_format(typingctx: Any, address: Any, number_format: Any) -> Any:
    """load_scalar_format(address, format): one number as float32."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        address, choice = (_address(context, builder, v, k) for v, k in zip(values, sig.args, strict=True))

        def emit(number_format: int) -> Any:
            if number_format == FLOAT32:
                return builder.load(_pointer(builder, address, _f32), align=4)
            bits = builder.load(_pointer(builder, address, _i16), align=2)
            if number_format == BFLOAT16:
                return builder.bitcast(builder.shl(builder.zext(bits, _i32), _i32(16)), _f32)
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), _f32)

        return _by_format(builder, choice, emit, _f32)

    return types.float32(address, number_format), generate


def _prefetch(builder: Any, context: Any, sig: Any, values: Any, locality: int) -> Any:
    pointer = _pointer(builder, _address(context, builder, values[0], sig.args[0]), ir.IntType(8))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _i32(0), _i32(locality), _i32(1))
    return context.get_dummy_value()


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """prefetch(address): brings a cache line near; any address is allowed."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        return _prefetch(builder, context, sig, values, 3)

    return types.none(address), generate


@intrinsic
def prefetch_second(typingctx: Any, address: Any) -> Any:
    """prefetch_second(address): brings a cache line to the second cache, which takes more of them at a time."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        return _prefetch(builder, context, sig, values, 2)

    return types.none(address), generate


@inline
def read(address, number_format, lanes):
    """The first `lanes` numbers of a format as float32, zeros behind them."""
    if lanes == WIDTH:
        return load_format(address, number_format)
    return load_part(address, number_format, lanes)


@inline
def write(value, address, number_format, lanes):
    """The first `lanes` lanes to a format; what lies behind them stays."""
    if lanes == WIDTH:
        store_format(value, address, number_format)
    else:
        store_part(value, address, number_format, lanes)


@inline
def aligned(size):
    """Scratch for `size` vectors: (an array to keep alive, its first address on a vector's border)."""
    array = np.empty((size + 1) * WIDTH, dtype=np.float32)
    return array, (array.ctypes.data + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES
