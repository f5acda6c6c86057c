// What all CUDA kernels share: formats of activations, pointwise functions, and how packed and batched sequences are numbered
// (as in triton_utils.py). Macros: FORMAT of activations (0 float32, 1 bfloat16, 2 float16), PACKED sequences.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define DEVICE __device__ __forceinline__

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr u32 ALL = 0xffffffffu;

// ---- Numbers ----

#if FORMAT == 0
typedef float number;
#else
typedef u16 number;
#endif

DEVICE float widen(number bits) {
#if FORMAT == 0
    return bits;
#elif FORMAT == 1
    return __uint_as_float((u32)bits << 16);
#else
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
#endif
}

DEVICE number narrow(float value) {
#if FORMAT == 0
    return value;
#elif FORMAT == 1
    u16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
#else
    u16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
#endif
}

// Two neighbouring activations: what the work that is done once per channel and step moves at a time.
DEVICE float2 widen_pair(const number* at) {
#if FORMAT == 0
    return *(const float2*)at;
#else
    u32 both = *(const u32*)at;
#if FORMAT == 1
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
#else
    return make_float2(widen((u16)both), widen((u16)(both >> 16)));
#endif
#endif
}

// Stores under a predicate. Written as an `if`, they would be jumps, over which the compiler moves nothing.
DEVICE void store_if(bool condition, float* at, float value) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}" ::"r"((int)condition), "l"(at), "f"(value));
}

DEVICE void store_pair_if(bool condition, float* at, float2 value) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.v2.f32 [%1], {%2, %3};\n}" ::"r"((int)condition), "l"(at), "f"(value.x), "f"(value.y));
}

#if FORMAT != 0
DEVICE void store_if(bool condition, number* at, float value) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.b16 [%1], %2;\n}" ::"r"((int)condition), "l"(at), "h"(narrow(value)));
}

DEVICE void store_pair_if(bool condition, number* at, float2 value) {
    u32 both;
#if FORMAT == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(value.y), "f"(value.x));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(value.y), "f"(value.x));
#endif
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"((int)condition), "l"(at), "r"(both));
}
#endif

// One or two neighbouring channels, as pairs; what is missing is zero.
template <int COUNT>
DEVICE float2 load_pair(const number* at) {
    if constexpr (COUNT == 2)
        return widen_pair(at);
    else
        return make_float2(widen(*at), 0.f);
}

template <int COUNT>
DEVICE float2 get_pair(const float* at) {
    if constexpr (COUNT == 2)
        return *(const float2*)at;
    else
        return make_float2(*at, 0.f);
}

// ---- Functions ----

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log(1 + exp(x)), to float32's precision relative to itself: Mamba starts from steps of a thousandth, and what they are off by is what
// the gradients of A and of the steps are off by. With e = exp(-|x|) and s = 2 e / (2 + e), at most 2/3, log(1 + e) = 2 atanh(s / 2);
// the polynomial is (2 atanh(s / 2) / s - 1) / q over q = s^2, off by 2e-8 of the result at most.
DEVICE float softplus_tail(float x, float s) {
    float q = s * s;
    float tail = fmaf(fmaf(fmaf(5.2475589e-4f, q, 2.2057786e-3f), q, 1.2502397e-2f), q, 8.33333e-2f);
    return fmaf(s, fmaf(q, tail, 1.f), fmaxf(x, 0.f));
}

DEVICE float softplus(float x) {
    float e = exp2_fast(-fabsf(x) * LOG2E);
    return softplus_tail(x, e * reciprocal(fmaf(0.5f, e, 1.f)));
}

DEVICE float sigmoid(float x) { return reciprocal(1.f + exp2_fast(-x * LOG2E)); }

// Two at a time, which share a reciprocal: the special-function unit is what the scan waits for most. A NaN of one is one of both.
DEVICE float2 reciprocals(float2 x) {
    const float both = reciprocal(x.x * x.y);
    return make_float2(both * x.y, both * x.x);
}

DEVICE float2 softplus(float2 x) {
    const float2 e = make_float2(exp2_fast(-fabsf(x.x) * LOG2E), exp2_fast(-fabsf(x.y) * LOG2E));
    const float2 r = reciprocals(make_float2(fmaf(0.5f, e.x, 1.f), fmaf(0.5f, e.y, 1.f)));
    return make_float2(softplus_tail(x.x, e.x * r.x), softplus_tail(x.y, e.y * r.y));
}

// x sigmoid(x). Below -41 it is x 2^-60 rather than less, so that no product overflows.
DEVICE float2 silu(float2 x) {
    const float2 e = make_float2(exp2_fast(fminf(-x.x * LOG2E, 60.f)), exp2_fast(fminf(-x.y * LOG2E, 60.f)));
    const float2 r = reciprocals(make_float2(1.f + e.x, 1.f + e.y));
    return make_float2(x.x * r.x, x.y * r.y);
}

// ---- Sequences ----

struct Sequence {
    i64 begin;  // its first token, rows laid end to end
    i64 first;  // its first step inside its row
    i64 count;  // its steps
};

DEVICE Sequence sequence_bounds(const i64* offsets, i64 sequence, i64 length) {
    Sequence out;
    if (PACKED) {
        out.begin = offsets[sequence];
        out.first = out.begin;
        out.count = offsets[sequence + 1] - out.begin;
    } else {
        out.begin = sequence * length;
        out.first = 0;
        out.count = length;
    }
    return out;
}

// The number of a sequence's first piece of `size` steps. Packed sequences have room for one piece more than they may need, since
// only the kernels know where they begin; rows of one length do not: pieces with nothing in them would leave the multiprocessors
// that they fall to idle.
DEVICE i64 first_piece(const i64* offsets, i64 sequence, i64 length, i64 size) {
    return PACKED ? offsets[sequence] / size + sequence : sequence * max((length + size - 1) / size, (i64)1);
}

// The sequence that owns a piece: the last one whose first piece does not come after it.
DEVICE i64 sequence_of_piece(i64 piece, const i64* offsets, i64 sequences, i64 length, i64 size) {
    i64 low = 0, high = sequences - 1;
    while (low < high) {
        i64 middle = (low + high + 1) / 2;
        if (first_piece(offsets, middle, length, size) <= piece)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}
