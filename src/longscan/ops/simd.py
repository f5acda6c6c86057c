"""Explicit SIMD vectors for Numba kernels.

Numba leaves vectorisation to LLVM, which cannot keep a small array of vectors in registers. Here a vector of `WIDTH`
float32 lanes is a Numba value of its own (LLVM `<WIDTH x float>`, a register), a `tile` is a small array of vectors on
the stack (LLVM turns it into registers where every index is known). Kernels then read like the mathematics::

    state = exp2(a * step[t]) * state + step_x[t] * b
    y[t] = fma(c, state, y[t])

Vectors support + - * / and comparisons with vectors and scalars (a scalar is rounded to float32 and repeated).
Comparisons give masks for `where`, which combine by & and |. LLVM may neither reassociate nor contract: what is to be
one `fma` says so. `simd_memory` loads and stores, `simd_math` has the functions. Import this module only where Numba is
needed.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

import operator
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core import config as _config
from numba.core.errors import TypingError
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

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

#: Whether loads and stores serve float16 (without the instructions LLVM would call library functions nobody links).
HAS_FLOAT16: bool = _ARM or "f16c" in _FEATURES

#: Whether the processor is AMD's (LLVM's names for them: znver4, bdver2, ...).
AMD: bool = llvm.get_host_cpu_name().startswith(("znver", "bdver", "btver"))

#: Bytes of a vector of float32.
VECTOR_BYTES: int = 4 * WIDTH

_i1, _i32, _i64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_f32 = ir.FloatType()
#: LLVM types of a vector of float32, and of its bits.
FLOATS, INTEGERS = ir.VectorType(_f32, WIDTH), ir.VectorType(_i32, WIDTH)
_BITS = ir.VectorType(_i1, WIDTH)


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
