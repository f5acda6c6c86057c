// What the CUDA kernels of the selective scan share: number formats, pointwise functions, tiles in shared memory, and how
// packed and batched sequences are numbered (as in longscan/ops/triton_utils.py).
//
// Everything is compiled for one configuration, given by macros:
//   FORMAT      of activations: 0 float32, 1 bfloat16, 2 float16
//   LANES       neighbouring lanes that share a channel, a power of two; STATES of them in each lane
//   COMPLEX     complex A, B, C and states
//   B_STEP, C_STEP   B and C per time step (else constant in time)
//   HAS_Z, SOFTPLUS, PACKED, ALIGNED (16-byte accesses are possible), WHOLE (LANES x STATES is the number of states)
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define DEVICE __device__ __forceinline__

constexpr int PLANES = COMPLEX ? 2 : 1;
// Channels of a warp. Lane = part * CHANNELS + channel, where a part is LANES-th of a channel's states.
constexpr int CHANNELS = 32 / LANES;
// States of a channel, padded.
constexpr int WIDTH = LANES * STATES;
// Real numbers of a lane's states.
constexpr int NUMBERS = STATES * PLANES;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr u32 ALL = 0xffffffffu;

// ---- Numbers ----

#if FORMAT == 0
typedef float number;
#else
typedef u16 number;
#endif

// Activations in 16 bytes.
constexpr int VECTOR = 16 / sizeof(number);

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
DEVICE void store_if(bool condition, number* at, float value) {
#if FORMAT == 0
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}" ::"r"((int)condition), "l"(at), "f"(value));
#else
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.b16 [%1], %2;\n}" ::"r"((int)condition), "l"(at), "h"(narrow(value)));
#endif
}

DEVICE void store_pair_if(bool condition, number* at, float2 value) {
#if FORMAT == 0
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.v2.f32 [%1], {%2, %3};\n}" ::"r"((int)condition), "l"(at), "f"(value.x), "f"(value.y));
#else
    u32 both;
#if FORMAT == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(value.y), "f"(value.x));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(value.y), "f"(value.x));
#endif
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"((int)condition), "l"(at), "r"(both));
#endif
}

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

template <int COUNT>
DEVICE void put_pair(float* at, float2 value) {
    if constexpr (COUNT == 2)
        *(float2*)at = value;
    else
        *at = value.x;
}

// ---- Functions ----

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log(1 + exp(x)), linear above 20. The fast logarithm loses small steps, which Mamba starts from: they are summed up.
DEVICE float softplus(float x) {
    float e = exp2_fast(x * LOG2E);
#if FORMAT == 0
    // log1p(e) = 2 atanh(e / (2 + e)), whose argument is at most 1/3 for e up to 1; larger ones are mirrored.
    float f = x > 0.f ? reciprocal(e) : e;
    float s = f / (2.f + f), q = s * s;
    float tail = 1.f / 15.f;
    tail = fmaf(tail, q, 1.f / 13.f);
    tail = fmaf(tail, q, 1.f / 11.f);
    tail = fmaf(tail, q, 1.f / 9.f);
    tail = fmaf(tail, q, 1.f / 7.f);
    tail = fmaf(tail, q, 1.f / 5.f);
    tail = fmaf(tail, q, 1.f / 3.f);
    float log1p = 2.f * s * fmaf(q, tail, 1.f);
    float sum = fmaxf(x, 0.f) + log1p;
#else
    float series = e * fmaf(e, fmaf(e, 0.33333333f, -0.5f), 1.f);
    float sum = e < 0.04f ? series : LN2 * log2_fast(1.f + e);
#endif
    return x > 20.f ? x : sum;
}

DEVICE float sigmoid(float x) { return reciprocal(1.f + exp2_fast(-x * LOG2E)); }

// ---- Sums over the lanes that share a channel ----

// values[i], i < LANES, summed over the lanes of a channel: lane part i gets the sum of values[i]. A transposition that adds.
DEVICE float sum_parts(float (&values)[LANES], int part) {
#pragma unroll
    for (int half = LANES / 2; half >= 1; half /= 2) {
        bool upper = part & half;
#pragma unroll
        for (int i = 0; i < half; i++) {
            float keep = upper ? values[i + half] : values[i];
            float send = upper ? values[i] : values[i + half];
            values[i] = keep + __shfl_xor_sync(ALL, send, half * CHANNELS);
        }
    }
    return values[0];
}

// ---- Copies to shared memory ----

DEVICE void copy_async(void* to, const void* from, bool inside) {
    u32 address = (u32)__cvta_generic_to_shared(to);
    int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int PENDING>
DEVICE void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// Copies tiles of STEPS rows of COLUMNS elements, one tile after the other, zeros where a row or column is not there.
// `THREADS` threads copy together, 16 bytes at a time where `ALIGNED16`, for which `columns` must be whole vectors.
template <int STEPS, int COLUMNS, int THREADS, bool ALIGNED16, typename T>
struct Copier {
    static constexpr bool FAST = ALIGNED16 && (COLUMNS * sizeof(T)) % 16 == 0;
    static constexpr int EACH = FAST ? 16 / sizeof(T) : 1, PER_ROW = COLUMNS / EACH, COUNT = STEPS * PER_ROW;
    static constexpr int ROUNDS = (COUNT + THREADS - 1) / THREADS;
    const T* from;
    i64 stride;
    int first, column, place, limit;
    bool inside;

    DEVICE Copier(const T* from_, i64 stride_, int columns, int thread)
        : from(from_), stride(stride_), first(thread / PER_ROW), column(thread % PER_ROW * EACH), limit(columns) {
        inside = column < columns && (COUNT % THREADS == 0 || thread < COUNT);
        place = thread * EACH;
    }

    // Tile that begins at step t of `count`.
    DEVICE void operator()(T* to, int t, int count) const {
        static_assert(THREADS % PER_ROW == 0 || ROUNDS == 1 || !FAST, "every round copies whole rows");
        if constexpr (FAST) {
            const T* at = from + (t + first) * stride + column;
#pragma unroll
            for (int i = 0; i < ROUNDS; i++) {
                constexpr int ROWS = THREADS / PER_ROW;
                bool here = inside && t + first + i * ROWS < count;
                if (COUNT % THREADS == 0 || place + i * THREADS * EACH < COUNT * EACH)
                    copy_async(to + place + i * THREADS * EACH, here ? at + i * ROWS * stride : from, here);
            }
        } else {
            for (int i = place; i < COUNT; i += THREADS) {
                int row = i / COLUMNS, at = i % COLUMNS;
                to[i] = t + row < count && at < limit ? from[(t + row) * stride + at] : (T)0;
            }
        }
    }
};

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

// The sequence that owns a piece of `size` steps: the last one whose first piece does not come after it.
DEVICE i64 sequence_of_piece(i64 piece, const i64* offsets, i64 sequences, i64 length, i64 size) {
    i64 low = 0, high = sequences - 1;
    while (low < high) {
        i64 middle = (low + high + 1) / 2;
        i64 begin = PACKED ? offsets[middle] : middle * length;
        if (begin / size + middle <= piece)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// ---- Complex or real numbers: one state of a channel ----

struct Pair {
    float re, im;
};

DEVICE Pair decay(float step, Pair a) {
    // a.re holds A log2(e).
    float size = exp2_fast(step * a.re);
    Pair out;
    out.re = size;
    out.im = 0.f;
    if (COMPLEX) {
        // Reduced to one turn first: the fast functions are exact near zero only.
        float angle = step * a.im, sine, cosine;
        float turns = rintf(angle * 0.15915494309189535f);
        angle = fmaf(turns, -6.2831854820251465f, angle);
        angle = fmaf(turns, 1.7484555e-7f, angle);
        asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine) : "f"(angle));
        asm("cos.approx.ftz.f32 %0, %1;" : "=f"(cosine) : "f"(angle));
        out.re = size * cosine;
        out.im = size * sine;
    }
    return out;
}

// a h + v b
DEVICE Pair advance(Pair a, Pair h, float v, Pair b) {
    Pair out;
    if (COMPLEX) {
        out.re = fmaf(a.re, h.re, fmaf(-a.im, h.im, v * b.re));
        out.im = fmaf(a.re, h.im, fmaf(a.im, h.re, v * b.im));
    } else {
        out.re = fmaf(a.re, h.re, v * b.re);
        out.im = 0.f;
    }
    return out;
}

// One lane's share of B or C, or of parameters in memory.
struct Share {
    float re[STATES];
#if COMPLEX
    float im[STATES];
#endif
};

// From shared memory, where planes lie WIDTH apart; `at` is a multiple of STATES numbers.
DEVICE void load_plane(float (&out)[STATES], const float* at) {
    if constexpr (STATES % 4 == 0) {
#pragma unroll
        for (int n = 0; n < STATES; n += 4) {
            float4 four = *(const float4*)(at + n);
            out[n] = four.x, out[n + 1] = four.y, out[n + 2] = four.z, out[n + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int n = 0; n < STATES; n++) out[n] = at[n];
    }
}

DEVICE void load_share(Share& out, const float* at) {
    load_plane(out.re, at);
#if COMPLEX
    load_plane(out.im, at + WIDTH);
#endif
}

// States of a lane, (channel, state) in memory, complex numbers as pairs; `first` is the lane's first state. With WHOLE,
// every lane has all of its STATES, and they move 16 bytes at a time.
constexpr bool WIDE = WHOLE && NUMBERS % 4 == 0;

DEVICE void read_states(Pair (&out)[STATES], const float* at, int first, i64 states, bool live) {
    if constexpr (WIDE) {
        float flat[NUMBERS];
#pragma unroll
        for (int i = 0; i < NUMBERS; i += 4) {
            float4 four = live ? *(const float4*)(at + first * PLANES + i) : make_float4(0.f, 0.f, 0.f, 0.f);
            flat[i] = four.x, flat[i + 1] = four.y, flat[i + 2] = four.z, flat[i + 3] = four.w;
        }
#pragma unroll
        for (int n = 0; n < STATES; n++) out[n] = {flat[n * PLANES], COMPLEX ? flat[n * PLANES + PLANES - 1] : 0.f};
    } else {
#pragma unroll
        for (int n = 0; n < STATES; n++) {
            bool inside = live && first + n < states;
            out[n].re = inside ? at[(first + n) * PLANES] : 0.f;
            out[n].im = COMPLEX && inside ? at[(first + n) * PLANES + PLANES - 1] : 0.f;
        }
    }
}

DEVICE void write_states(const Pair (&in)[STATES], float* at, int first, i64 states, bool live) {
    if constexpr (WIDE) {
        float flat[NUMBERS];
#pragma unroll
        for (int n = 0; n < STATES; n++) {
            flat[n * PLANES] = in[n].re;
            if (COMPLEX) flat[n * PLANES + PLANES - 1] = in[n].im;
        }
#pragma unroll
        for (int i = 0; i < NUMBERS; i += 4)
            if (live) *(float4*)(at + first * PLANES + i) = make_float4(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]);
    } else {
#pragma unroll
        for (int n = 0; n < STATES; n++)
            if (live && first + n < states) {
                at[(first + n) * PLANES] = in[n].re;
                if (COMPLEX) at[(first + n) * PLANES + PLANES - 1] = in[n].im;
            }
    }
}

// B or C as they lie in memory: activations, or pairs of float32 when complex.
#if COMPLEX
typedef float coefficient;
#else
typedef number coefficient;
#endif
constexpr int RAW = WIDTH * PLANES;

// Raw rows of B or C to float32 with the planes apart. `STEPS` rows, by `THREADS` threads; loads first, then stores.
template <int STEPS, int THREADS>
DEVICE void widen_rows(float* to, const coefficient* from, int thread) {
    constexpr int COUNT = STEPS * RAW / 2, BATCH = 8;
    static_assert(COUNT * 2 == STEPS * RAW, "rows come in pairs");
    for (int begin = 0; begin < COUNT; begin += THREADS * BATCH) {
        float2 values[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            int i = begin + j * THREADS + thread;
            if (begin + j * THREADS < COUNT && i < COUNT) {
#if COMPLEX
                values[j] = *(const float2*)(from + 2 * i);
#else
                values[j] = widen_pair(from + 2 * i);
#endif
            }
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            int i = begin + j * THREADS + thread;
            if (begin + j * THREADS < COUNT && i < COUNT) {
#if COMPLEX
                int row = i / WIDTH, state = i % WIDTH;
                to[row * RAW + state] = values[j].x;
                to[row * RAW + WIDTH + state] = values[j].y;
#else
                *(float2*)(to + 2 * i) = values[j];
#endif
            }
        }
    }
}

DEVICE Pair of(const Share& share, int n) {
#if COMPLEX
    return {share.re[n], share.im[n]};
#else
    return {share.re[n], 0.f};
#endif
}

// ---- Once per channel and step, two channels at a time ----

// What reaches the scan of the gradient of its output.
DEVICE float2 gate_weight(float2 dy, const number* z) {
    if (HAS_Z) {
        float2 gate = widen_pair(z);
        dy.x *= gate.x * sigmoid(gate.x);
        dy.y *= gate.y * sigmoid(gate.y);
    }
    return dy;
}

DEVICE float2 step_pair(const number* dt, const float (&bias)[2], bool inside) {
    float2 raw = widen_pair(dt);
    raw.x += bias[0], raw.y += bias[1];
    if (SOFTPLUS) raw = make_float2(softplus(raw.x), softplus(raw.y));
    return inside ? raw : make_float2(0.f, 0.f);
}
