// Adds up what the blocks of the backward pass have left of the gradients that are sums over channels or time: of A, D and the dt
// bias one summand for each piece of time, of B and C one for each block of channels (of constant ones, for each piece). Always in
// the same order. One thread takes VECTOR neighbouring numbers.
//
// More macros: VECTOR (4, where every gradient is whole vectors; else 1).
#include "scan_common.cuh"

typedef float vector[VECTOR];

// The sum of `parts` vectors that lie `apart` numbers from one another.
DEVICE void add_parts(vector& sum, const float* at, i64 apart, i64 parts) {
    // Loads that do not wait for one another, and short chains of sums.
    constexpr int AHEAD = 8;
    vector own[AHEAD] = {};
    for (i64 first = 0; first < parts; first += AHEAD) {
        vector next[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const bool inside = first + i < parts;
            const float* from = at + (inside ? (first + i) * apart : 0);
            if constexpr (VECTOR == 4) {
                const float4 four = *(const float4*)from;
                next[i][0] = four.x, next[i][1] = four.y, next[i][2] = four.z, next[i][3] = four.w;
            } else {
                next[i][0] = *from;
            }
#pragma unroll
            for (int v = 0; v < VECTOR; v++) next[i][v] = inside ? next[i][v] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int v = 0; v < VECTOR; v++) own[i][v] += next[i][v];
    }
#pragma unroll
    for (int half = AHEAD / 2; half >= 1; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++)
#pragma unroll
            for (int v = 0; v < VECTOR; v++) own[i][v] += own[i + half][v];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) sum[v] = own[0][v];
}

DEVICE void put_vector(float* to, const vector& sum) {
#pragma unroll
    for (int v = 0; v < VECTOR; v++) to[v] = sum[v];
}

// The gradient of B or C per step, from number `at` of its rows, which are padded and have the planes apart.
DEVICE void put_row(coefficient* to, i64 at, i64 states, const vector& sum) {
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        const i64 row = (at + v) / RAW;
        const int within = (int)((at + v) % RAW), plane = within / WIDTH, state = within % WIDTH;
#if COMPLEX
        if (state < states) to[(row * states + state) * PLANES + plane] = sum[v];
#else
        if (state < states) to[row * states + state] = narrow(sum[v]);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(128) scan_collect(
    const float* dA, const float* dB, const float* dC, const float* dD, const float* dbias,
    float* A, coefficient* B, coefficient* C, float* D, float* bias,
    i64 pieces, i64 b_parts, i64 c_parts, i64 b_count, i64 c_count, i64 channels, i64 states) {
    const i64 count = channels * states * PLANES;
    i64 at = ((i64)blockIdx.x * 128 + threadIdx.x) * VECTOR;
    vector sum;
    if (at < b_count) {
        add_parts(sum, dB + at, b_count, b_parts);
        B_STEP ? put_row(B, at, states, sum) : put_vector((float*)B + at, sum);
        return;
    }
    at -= b_count;
    if (at < c_count) {
        add_parts(sum, dC + at, c_count, c_parts);
        C_STEP ? put_row(C, at, states, sum) : put_vector((float*)C + at, sum);
        return;
    }
    at -= c_count;
    if (at < count) {
        add_parts(sum, dA + at, count, pieces);
        put_vector(A + at, sum);
        return;
    }
    at -= count;
    if (at < channels) {
        if (D != nullptr) {
            add_parts(sum, dD + at, channels, pieces);
            put_vector(D + at, sum);
        }
        if (bias != nullptr) {
            add_parts(sum, dbias + at, channels, pieces);
            put_vector(bias + at, sum);
        }
    }
}
