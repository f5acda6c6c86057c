// What the CUDA kernels of the selective scan share: tiles in shared memory, states, sums over lanes.
//
// Everything is compiled for one configuration, given by macros:
//   FORMAT, PACKED   see cuda_common.cuh
//   LANES       neighbouring lanes that share a channel, a power of two; STATES of them in each lane
//   COMPLEX     complex A, B, C and states
//   B_STEP, C_STEP   B and C per time step (else constant in time)
//   HAS_Z, SOFTPLUS, ALIGNED (16-byte accesses are possible), WHOLE (LANES x STATES is the number of states)
//   PARTIAL     these are some of the states only: outputs are summands, in float32
#pragma once

#include "../cuda_common.cuh"

// What is written once per channel and step.
#if PARTIAL
typedef float result;
DEVICE result round_result(float value) { return value; }
#else
typedef number result;
DEVICE result round_result(float value) { return narrow(value); }
#endif

constexpr int PLANES = COMPLEX ? 2 : 1;
// Channels of a warp. Lane = part * CHANNELS + channel, where a part is LANES-th of a channel's states.
constexpr int CHANNELS = 32 / LANES;
// States of a channel, padded.
constexpr int WIDTH = LANES * STATES;
// Real numbers of a lane's states.
constexpr int NUMBERS = STATES * PLANES;

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

// Nothing happens without `wanted`, written as a predicate since the compiler moves nothing over a jump; zeros without `inside`.
template <int BYTES>
DEVICE void copy_async(void* to, const void* from, bool inside, bool wanted) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    const int bytes = inside ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\n@p cp.async.cg.shared.global [%0], [%1], 16, %2;\n}" ::"r"(address),
            "l"(from), "r"(bytes), "r"((int)wanted));
    else
        asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %4, 0;\n@p cp.async.ca.shared.global [%0], [%1], %2, %3;\n}" ::"r"(address),
            "l"(from), "n"(BYTES), "r"(bytes), "r"((int)wanted));
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int PENDING>
DEVICE void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING));
}

// Copies tiles of STEPS rows of COLUMNS elements, zeros where a row or column is not there: the first one begins at `first`, each
// next one lies ORDER (1 or -1) times STEPS rows further. `THREADS` threads copy together; without them waiting, and up to 16 bytes
// at a time, where rows are ALIGNED16, for which `columns` must be whole vectors.
template <int STEPS, int COLUMNS, int THREADS, bool ALIGNED16, typename T, int ORDER = 1>
struct Copier {
    static constexpr int ROW = COLUMNS * sizeof(T), BYTES = ROW < 16 ? ROW : 16;
    static constexpr bool FAST = ALIGNED16 && BYTES >= 4 && (BYTES & (BYTES - 1)) == 0 && ROW % BYTES == 0;
    static constexpr int EACH = FAST ? BYTES / sizeof(T) : 1, PER_ROW = COLUMNS / EACH, COUNT = STEPS * PER_ROW;
    static constexpr int ROUNDS = (COUNT + THREADS - 1) / THREADS, ROWS = THREADS / PER_ROW;
    const T* at;
    i64 stride;
    int row, place, limit;
    bool inside;

    DEVICE Copier(const T* from, i64 stride_, int columns, int thread, int first)
        : stride(stride_), row(FAST ? thread / PER_ROW : 0), place(thread * EACH), limit(columns) {
        const int column = FAST ? thread % PER_ROW * EACH : 0;
        at = from + (first + row) * stride + column;
        inside = column < columns && (COUNT % THREADS == 0 || thread < COUNT);
    }

    // The next tile, which begins at step t of `count`.
    DEVICE void operator()(T* to, int t, int count) {
        static_assert(THREADS % PER_ROW == 0 || ROUNDS == 1 || !FAST, "every round copies whole rows");
        if constexpr (FAST) {
#pragma unroll
            for (int i = 0; i < ROUNDS; i++)
                copy_async<BYTES>(
                    to + place + i * THREADS * EACH, at + i * ROWS * stride, inside && t + row + i * ROWS < count,
                    COUNT % THREADS == 0 || place + i * THREADS * EACH < COUNT * EACH);
        } else {
            for (int i = place; i < COUNT; i += THREADS) {
                const int r = i / COLUMNS, column = i % COLUMNS;
                to[i] = t + r < count && column < limit ? at[r * stride + column] : (T)0;
            }
        }
        at += ORDER * STEPS * stride;
    }
};

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

// The same in ROUNDS rounds, each of which loads and, later, stores.
template <int STEPS, int THREADS>
struct Widener {
    static constexpr int COUNT = STEPS * RAW / 2, ROUNDS = (COUNT + THREADS - 1) / THREADS;
    int thread;
    float2 value;

    DEVICE Widener(int thread_) : thread(thread_) {}
    DEVICE bool has(int i) const { return COUNT % THREADS == 0 || i < COUNT; }

    DEVICE void load(const coefficient* from, int round) {
        const int i = round * THREADS + thread;
        if (!has(i)) return;
#if COMPLEX
        value = *(const float2*)(from + 2 * i);
#else
        value = widen_pair(from + 2 * i);
#endif
    }

    DEVICE void store(float* to, int round) const {
        const int i = round * THREADS + thread;
        if (!has(i)) return;
#if COMPLEX
        const int row = i / WIDTH, state = i % WIDTH;
        to[row * RAW + state] = value.x;
        to[row * RAW + WIDTH + state] = value.y;
#else
        *(float2*)(to + 2 * i) = value;
#endif
    }
};

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
