"""Functions of SIMD vectors: powers and exponentials, softplus, sigmoid, SiLU, sine and cosine.

Relative errors are the largest found on a dense grid; float32 itself rounds at 0.6e-7.
"""

# Kernels are typed by Numba.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from longscan.ops.jit import inline
from longscan.ops.simd import (
    AVX512,
    FLOATS,
    INTEGERS,
    WIDTH,
    absolute,
    build_fma,
    call,
    constant,
    fma,
    function,
    maximum,
    minimum,
    to_vector,
    vector,
)

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# 2^f = 1 + f q(f) on [-1/2, 1/2], minimax (0.9e-7). Exactly 1 at f = 0: the decays of a slow state are close to 1, and
# an error there would add up over its long memory.
_EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)

# log(1 + u) = 2 artanh(s) = 2 s + s^3 q(s^2), s = u / (2 + u), on 0 <= s <= 1/3.
_ARTANH = (0.666664183139801, 0.4002152681350708, 0.28001803159713745, 0.28011998534202576)

# sin(pi g) = g p(g^2), cos(pi g) = 1 + g^2 q(g^2) on [-1/2, 1/2].
_SINE = (3.141592502593994, -5.1677069664001465, 2.5500314235687256, -0.5980451703071594, 0.077220119535923)
_COSINE = (-4.934802055358887, 4.058709621429443, -1.3352160453796387, 0.23495392501354218, -0.02442069724202156)

# Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits of the sum.
_ROUND = 12582912.0


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    value = constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = build_fma(builder, value, x, constant(coefficient))
    return value


def _integers(number: int) -> Any:
    return ir.Constant(INTEGERS, [number] * WIDTH)


def power_of_product(builder: Any, a: Any, b: Any) -> Any:
    """2^(a b): the integer part of a b goes to the exponent, the rest, found exactly, through the polynomial."""
    if AVX512:
        every, nearest = ir.IntType(16)(0xFFFF), ir.IntType(32)(4)
        product = builder.fmul(a, b)
        name = "llvm.x86.avx512.mask.rndscale.ps.512"
        whole = call(builder, name, FLOATS, product, ir.IntType(32)(8), product, every, nearest)
    else:
        shifted = build_fma(builder, a, b, constant(_ROUND))
        whole = builder.fsub(shifted, constant(_ROUND))
    part = build_fma(builder, a, b, builder.fneg(whole))
    power = build_fma(builder, part, _polynomial(builder, part, _EXP2), constant(1.0))
    if AVX512:
        return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", FLOATS, power, whole, power, every, nearest)
    exponent = builder.shl(builder.bitcast(shifted, INTEGERS), _integers(23))
    scaled = builder.bitcast(builder.add(builder.bitcast(power, INTEGERS), exponent), FLOATS)
    in_range = builder.select(builder.fcmp_ordered(">", whole, constant(-127.0)), scaled, constant(0.0))
    product = builder.fadd(whole, part)
    beyond = builder.fmul(product, constant(float("inf")))
    return builder.select(builder.fcmp_ordered("<", product, constant(128.0)), in_range, beyond)


exp2_product = function(
    2,
    vector,
    power_of_product,
    """exp2_product(a, b) = 2^(a b) for finite a b, relative error 1.6e-7: for decays exp(dt A) = 2^(dt A log2 e).

    Overflow gives infinity, underflow zero (without AVX-512 already below 2^-126).
    """,
)


@intrinsic
def turn(typingctx: Any, a: Any, b: Any) -> Any:
    """turn(a, b) = (cos(pi a b), sin(pi a b)), absolute error 2e-7 beyond the rounding of a, for |a b| < 2^21."""

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        a, b = (to_vector(context, builder, v, k) for v, k in zip(values, sig.args, strict=True))
        shifted = build_fma(builder, a, b, constant(_ROUND))
        whole = builder.fsub(shifted, constant(_ROUND))
        part = build_fma(builder, a, b, builder.fneg(whole))
        square = builder.fmul(part, part)
        cosine = build_fma(builder, square, _polynomial(builder, square, _COSINE), constant(1.0))
        sine = builder.fmul(part, _polynomial(builder, square, _SINE))
        # An odd number of half turns flips both signs.
        flip = builder.shl(builder.bitcast(shifted, INTEGERS), _integers(31))
        signed = [builder.bitcast(builder.xor(builder.bitcast(v, INTEGERS), flip), FLOATS) for v in (cosine, sine)]
        return context.make_tuple(builder, sig.return_type, signed)

    return types.UniTuple(vector, 2)(a, b), generate


@inline
def exp2(x):
    """2^x, relative error 1.6e-7; 0 below -150 and infinity from 128 on; NaN is kept."""
    return exp2_product(maximum(-160.0, minimum(160.0, x)), 1.0)


@inline
def exp(x):
    """e^x; the error grows with |x| / 2^24, as the product x log2(e) is rounded."""
    return exp2(x * LOG2_E)


@inline
def softplus(x):
    """log(1 + e^x), relative error 3e-7, everywhere: e^x where x is very negative, x where it is large."""
    u = exp(-absolute(x))
    s = u / (u + 2.0)
    square = s * s
    tail = fma(fma(fma(_ARTANH[3], square, _ARTANH[2]), square, _ARTANH[1]), square, _ARTANH[0])
    return maximum(0.0, x) + fma(s * square, tail, s + s)


@inline
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exp(-x))


@inline
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + exp(-x))
