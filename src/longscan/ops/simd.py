"""Explicit SIMD vectors for Numba kernels.

Numba leaves vectorisation to LLVM, which cannot keep a small array of vectors in registers. Here a vector of `WIDTH`
float32 lanes is a Numba value of its own (LLVM `<WIDTH x float>`, a register), a `tile` is a small array of vectors on
the stack (LLVM turns it into registers where every index is known), and memory is reached by byte address. Kernels
then read like the mathematics::

    state = exp2(a * step[t]) * state + step_x[t] * b
    y[t] = fma(c, state, y[t])

Vectors support + - * / and comparisons with vectors and scalars (a scalar is rounded to float32 and repeated).
Comparisons give masks for `where`, which combine by & and |. LLVM may neither reassociate nor contract: what is to be
one `fma` says so. `simd_math` has the functions. Import this module only where Numba is needed.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

import operator
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core import config as _config
from numba.core.errors import TypingError
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from longscan.ops.jit import inline

# Its attributes are set at run time.
config: Any = _config


def _features() -> frozenset[str]:
    """Features of the processor that Numba compiles for: the host's, unless NUMBA_CPU_NAME or _FEATURES say else."""
    if config.CPU_FEATURES is not None:
        return frozenset(f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+"))
    if config.CPU_NAME == "generic":
        return frozenset()
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


_FEATURES = _features()
_ARM = platform.machine().lower() in ("arm64", "aarch64")
#: Whether vectors are AVX-512 registers.
AVX512: bool = {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= _FEATURES
_FMA = _ARM or "fma" in _FEATURES

#: Lanes of a vector: 16 with AVX-512, 8 with AVX2, else 4.
WIDTH: int = 16 if AVX512 else 8 if {"avx2", "fma"} <= _FEATURES else 4

#: Whether `load`/`store` serve float16 (without the instructions LLVM would call library functions nobody links).
HAS_FLOAT16: bool = _ARM or "f16c" in _FEATURES

#: Bytes of a vector of float32.
VECTOR_BYTES: int = 4 * WIDTH

#: Formats of numbers in memory, for `load` and `store`.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

_i1, _i16, _i32, _i64 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_f32 = ir.FloatType()
#: LLVM types of a vector of float32, and of its bits.
FLOATS, INTEGERS = ir.VectorType(_f32, WIDTH), ir.VectorType(_i32, WIDTH)
_BYTES, _SHORTS, _BITS = (ir.VectorType(kind, WIDTH) for kind in (ir.IntType(8), _i16, _i1))
_LANES = ir.Constant(INTEGERS, list(range(WIDTH)))


class VectorType(types.Type):
    """A vector of `WIDTH` lanes: float32, or of truth values (a mask)."""

    def __init__(self, name: str) -> None:
        super().__init__(name=f"{name}x{WIDTH}")


class TileType(types.Type):
    """`count` vectors on the stack; getitem and setitem by integer."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"tile{count}(float32x{WIDTH})")


vector = VectorType("float32")
mask = VectorType("mask")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: VectorType) -> None:
        super().__init__(manager, kind, FLOATS if kind == vector else _BITS)


@register_model(TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: TileType) -> None:
        super().__init__(manager, kind, ir.ArrayType(FLOATS, kind.count).as_pointer())


# ---- Building blocks: each returns an LLVM value ----


def splat(builder: Any, scalar: Any) -> Any:
    """All lanes = `scalar`, an LLVM value."""
    kind = ir.VectorType(scalar.type, WIDTH)
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _i32(0))
    return builder.shuffle_vector(lane, ir.Constant(kind, ir.Undefined), ir.Constant(INTEGERS, [0] * WIDTH))


def constant(number: float) -> Any:
    """All lanes = `number`, rounded to float32."""
    return ir.Constant(FLOATS, [number] * WIDTH)


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Calls an LLVM intrinsic function."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def to_vector(context: Any, builder: Any, value: Any, kind: Any) -> Any:
    if kind == vector:
        return value
    return splat(builder, context.cast(builder, value, kind, types.float32))


def _is_operand(kind: Any) -> bool:
    return kind == vector or isinstance(kind, types.Number)


def function(operands: int, result: Any, build: Callable[..., Any], doc: str) -> Any:
    """An intrinsic of `operands` vectors or scalars; build(builder, *vectors) gives the result."""

    def typed(*kinds: Any) -> Any:
        if not all(_is_operand(k) for k in kinds):
            raise TypingError(f"vectors or numbers expected, got {kinds}")

        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            return build(builder, *(to_vector(context, builder, v, k) for v, k in zip(values, sig.args, strict=True)))

        return result(*kinds), generate

    def unary(typingctx: Any, a: Any) -> Any:
        return typed(a)

    def binary(typingctx: Any, a: Any, b: Any) -> Any:
        return typed(a, b)

    def ternary(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
        return typed(a, b, c)

    made = intrinsic((unary, binary, ternary)[operands - 1])
    made.__doc__ = doc
    return made


def build_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once where the processor can."""
    if _FMA:
        return call(builder, f"llvm.fma.v{WIDTH}f32", FLOATS, a, b, c)
    return builder.fadd(builder.fmul(a, b), c)


def _select(builder: Any, condition: str, a: Any, b: Any) -> Any:
    # Written so that x86 has one instruction for it, and a NaN in b is kept.
    return builder.select(builder.fcmp_ordered(condition, a, b), a, b)


def _compare(condition: str) -> Callable[..., Any]:
    return lambda builder, a, b: builder.fcmp_ordered(condition, a, b)


def _horizontal(builder: Any, v: Any) -> Any:
    """Sum of the lanes by halves: a fixed order."""
    lanes = WIDTH
    while lanes > 1:
        lanes //= 2
        low = ir.Constant(ir.VectorType(_i32, lanes), list(range(lanes)))
        high = ir.Constant(ir.VectorType(_i32, lanes), list(range(lanes, 2 * lanes)))
        v = builder.fadd(builder.shuffle_vector(v, v, low), builder.shuffle_vector(v, v, high))
    return builder.extract_element(v, _i32(0))


broadcast = function(1, vector, lambda builder, a: a, "broadcast(scalar): all lanes = scalar.")
fma = function(3, vector, build_fma, "fma(a, b, c) = a b + c.")
minimum = function(2, vector, lambda b, x, y: _select(b, "<", x, y), "The smaller; NaN of the second operand is kept.")
maximum = function(2, vector, lambda b, x, y: _select(b, ">", x, y), "The larger; NaN of the second operand is kept.")
total = function(1, types.float32, _horizontal, "total(v): sum of the lanes, by halves.")
absolute = function(1, vector, lambda b, x: call(b, f"llvm.fabs.v{WIDTH}f32", FLOATS, x), "absolute(v)")
square_root = function(1, vector, lambda b, x: call(b, f"llvm.sqrt.v{WIDTH}f32", FLOATS, x), "square_root(v)")


@intrinsic
def where(typingctx: Any, condition: Any, a: Any, b: Any) -> Any:
    """where(mask, a, b), lane by lane; a and b are vectors or scalars."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        chosen = [to_vector(context, builder, v, k) for v, k in zip(values[1:], sig.args[1:], strict=True)]
        return builder.select(values[0], *chosen)

    return vector(condition, a, b), generate


# ---- Operators ----


def _operator(symbol: Any, operand: Any, result: Any, build: Callable[..., Any], arity: int = 2) -> None:
    """Types and lowers an operator of vectors and numbers (or of masks)."""

    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) != arity or operand not in args:
                return None
            if all(a == operand or (operand == vector and isinstance(a, types.Number)) for a in args):
                return signature(result, *args)
            return None

    infer_global(symbol)(Template)

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        if operand == mask:
            return build(builder, *values)
        return build(builder, *(to_vector(context, builder, v, k) for v, k in zip(values, sig.args, strict=True)))

    kinds: list[Any] = [(operand,)] if arity == 1 else [(operand, operand)]
    if arity == 2 and operand == vector:
        kinds += [(operand, types.Number), (types.Number, operand)]
    for kind in kinds:
        lower_builtin(symbol, *kind)(generate)


_operator(operator.add, vector, vector, lambda builder, a, b: builder.fadd(a, b))
_operator(operator.sub, vector, vector, lambda builder, a, b: builder.fsub(a, b))
_operator(operator.mul, vector, vector, lambda builder, a, b: builder.fmul(a, b))
_operator(operator.truediv, vector, vector, lambda builder, a, b: builder.fdiv(a, b))
_operator(operator.neg, vector, vector, lambda builder, a: builder.fneg(a), arity=1)
_operator(operator.lt, vector, mask, _compare("<"))
_operator(operator.le, vector, mask, _compare("<="))
_operator(operator.gt, vector, mask, _compare(">"))
_operator(operator.ge, vector, mask, _compare(">="))
_operator(operator.eq, vector, mask, _compare("=="))
_operator(operator.and_, mask, mask, lambda builder, a, b: builder.and_(a, b))
_operator(operator.or_, mask, mask, lambda builder, a, b: builder.or_(a, b))


# ---- Tiles ----


def tile_slot(builder: Any, pointer: Any, index: int) -> Any:
    """Pointer to a vector of a tile, for intrinsics that take tiles."""
    return builder.gep(pointer, [_i32(0), _i32(index)], inbounds=True)


@intrinsic
def tile(typingctx: Any, count: Any) -> Any:
    """tile(count): `count` vectors on the stack, not initialised; count is a constant. Never return one."""
    if not isinstance(count, types.IntegerLiteral):
        raise TypingError("tile(count): count must be a constant")
    kind = TileType(count.literal_value)

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        return cgutils.alloca_once(builder, ir.ArrayType(FLOATS, kind.count))

    return kind(count), generate


@infer_global(operator.getitem)
class _TileGet(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if isinstance(args[0], TileType) and isinstance(args[1], types.Integer):
            return signature(vector, *args)
        return None


@infer_global(operator.setitem)
class _TileSet(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if isinstance(args[0], TileType) and isinstance(args[1], types.Integer) and _is_operand(args[2]):
            return signature(types.none, *args)
        return None


@lower_builtin(operator.getitem, TileType, types.Integer)
def _tile_get(context: Any, builder: Any, sig: Any, values: Any) -> Any:
    return builder.load(cgutils.gep_inbounds(builder, values[0], 0, values[1]))


@lower_builtin(operator.setitem, TileType, types.Integer, types.Any)
def _tile_set(context: Any, builder: Any, sig: Any, values: Any) -> Any:
    value = to_vector(context, builder, values[2], sig.args[2])
    builder.store(value, cgutils.gep_inbounds(builder, values[0], 0, values[1]))
    return context.get_dummy_value()


# ---- Memory, by byte address (int64) ----


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
        switch.add_case(_i64(choice), block)
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
