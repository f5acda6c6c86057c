// What lies between the matrix products of one token through a Mamba layer, for many sequences: the products are the BLAS library's.
//
//   batch_norm   add and RMSNorm
//   batch_conv   the convolution's step and SiLU
//   batch_state  softplus, the state's step, the skip and the gate
//
// Activations are of FORMAT, for the products' sake; the residual stream, vectors and A (times log2(e)) are float32, and so are the
// states unless SHORT, which keeps them in FORMAT too: they are most of what moves. Macros: FORMAT, SHORT, MODEL, STATES, WIDTH, THREADS,
// LANES of a channel, EVEN: two neighbouring channels lie at addresses that can be moved at once.
#define PACKED 0
#include "../cuda_common.cuh"

constexpr int EACH = (STATES + LANES - 1) / LANES;  // states of a lane

#if SHORT
typedef number kept;
DEVICE float from_kept(kept value) { return widen(value); }
DEVICE kept to_kept(float value) { return narrow(value); }
#else
typedef float kept;
DEVICE float from_kept(kept value) { return value; }
DEVICE kept to_kept(float value) { return value; }
#endif

// Whether a lane's states are 16 bytes, which move at once.
constexpr bool VECTOR = EACH * sizeof(kept) == 16 && STATES % EACH == 0;

DEVICE float silu(float x) { return x * sigmoid(x); }

// A block for each sequence: hidden, stream (batch, MODEL) to normed and sum.
extern "C" __global__ void __launch_bounds__(THREADS) batch_norm(
    const number* hidden, const float* stream, const float* weight, number* normed, float* sum, i64 eps_bits) {
    __shared__ float scratch[THREADS / 32];
    constexpr int EACH = (MODEL + THREADS - 1) / THREADS;
    i64 first = blockIdx.x * (i64)MODEL;
    float values[EACH], scales[EACH], squares = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int column = min(threadIdx.x + i * THREADS, MODEL - 1);
        values[i] = widen(hidden[first + column]) + (stream ? stream[first + column] : 0.f);
        scales[i] = weight[column];
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int column = threadIdx.x + i * THREADS;
        if (column >= MODEL) continue;
        sum[first + column] = values[i];
        squares = fmaf(values[i], values[i], squares);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) squares += __shfl_xor_sync(ALL, squares, step);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; warp++) squares += scratch[warp];
    float scale = rsqrtf(squares / MODEL + __int_as_float((int)eps_bits));
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int column = threadIdx.x + i * THREADS;
        if (column < MODEL) normed[first + column] = narrow(values[i] * scale * scales[i]);
    }
}

// A thread for each two channels (one, where they cannot be moved together): xz (batch, 2 inner) to x (batch, inner); state
// (batch, WIDTH - 1, inner) moves on.
template <int COUNT>
DEVICE void convolve(const number* xz, const float* taps, const float* bias, number* state, number* x, i64 inner, i64 channel, i64 row) {
    number* past = state + row * (WIDTH - 1) * inner + channel;
    float2 total = bias ? get_pair<COUNT>(bias + channel) : make_float2(0.f, 0.f), window[WIDTH];
#pragma unroll
    for (int tap = 0; tap < WIDTH - 1; tap++) window[tap] = load_pair<COUNT>(past + tap * inner);
    window[WIDTH - 1] = load_pair<COUNT>(xz + row * 2 * inner + channel);
#pragma unroll
    for (int tap = 0; tap < WIDTH; tap++) {
        float2 own = get_pair<COUNT>(taps + tap * inner + channel);
        total.x = fmaf(own.x, window[tap].x, total.x), total.y = fmaf(own.y, window[tap].y, total.y);
    }
    auto keep = [](number* at, float2 value) {
        if constexpr (COUNT == 2)
            store_pair_if(true, at, value);
        else
            *at = narrow(value.x);
    };
#pragma unroll
    for (int tap = 0; tap < WIDTH - 1; tap++) keep(past + tap * inner, window[tap + 1]);
    keep(x + row * inner + channel, make_float2(silu(total.x), silu(total.y)));
}

extern "C" __global__ void __launch_bounds__(THREADS) batch_conv(
    const number* xz, const float* taps, const float* bias, number* state, number* x, i64 inner) {
    constexpr int COUNT = EVEN ? 2 : 1;
    i64 channel = (blockIdx.x * (i64)THREADS + threadIdx.x) * COUNT;
    if (channel < inner) convolve<COUNT>(xz, taps, bias, state, x, inner, channel, blockIdx.y);
}

// LANES threads for each channel: selected (batch, rank + 2 STATES), dt, x (batch, inner) and the gate, the second half of xz, to y.
extern "C" __global__ void __launch_bounds__(THREADS) batch_state(
    const number* selected, const number* dt, const number* x, const number* xz, const float* dt_bias, const float* A, const float* D,
    kept* state, number* y, i64 inner, i64 rank) {
    int lane = threadIdx.x % LANES;
    i64 channel = (blockIdx.x * (i64)THREADS + threadIdx.x) / LANES, row = blockIdx.y;
    bool live = channel < inner;
    channel = live ? channel : inner - 1;
    i64 at = row * inner + channel;
    const number* B = selected + row * (rank + 2 * STATES) + rank;
    kept* own = state + at * STATES + lane * EACH;
    const float* rates = A + channel * STATES + lane * EACH;
    alignas(16) kept before[EACH];
    alignas(16) float h[EACH], decay[EACH];
    if constexpr (VECTOR) {
        *(uint4*)before = *(const uint4*)own;
#pragma unroll
        for (int i = 0; i < EACH; i += 4) *(float4*)(decay + i) = *(const float4*)(rates + i);
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            bool inside = lane * EACH + i < STATES;
            before[i] = inside ? own[i] : (kept)0;
            decay[i] = inside ? rates[i] : 0.f;
        }
    }
    float step = softplus(widen(dt[at]) + dt_bias[channel]), u = widen(x[at]), sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int n = lane * EACH + i;
        if (n >= STATES) continue;
        h[i] = fmaf(exp2_fast(step * decay[i]), from_kept(before[i]), step * u * widen(B[n]));
        sum = fmaf(h[i], widen(B[STATES + n]), sum);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) before[i] = to_kept(h[i]);
    if constexpr (VECTOR) {
        if (live) *(uint4*)own = *(const uint4*)before;
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (live && lane * EACH + i < STATES) own[i] = before[i];
    }
#pragma unroll
    for (int move = 1; move < LANES; move *= 2) sum += __shfl_xor_sync(ALL, sum, move);
    if (live && lane == 0) y[at] = narrow((sum + (D ? D[channel] : 0.f) * u) * silu(widen(xz[row * 2 * inner + inner + channel])));
}
