// What flows out of each piece of time at its start when nothing flows in at its end, and the sum of its steps: the first pass
// backward where time is split. scan_backward.cu has the equations; scan_chain.cu joins the pieces.
//
// More macros: TILE (steps), WARPS of a block.
#include "scan_common.cuh"

constexpr int PAIRS = CHANNELS >= 2 ? 2 : 1;
constexpr int ITEMS = TILE * CHANNELS / PAIRS;
constexpr int ROUNDS = (ITEMS + 31) / 32;
constexpr int ACROSS = CHANNELS / PAIRS, ROW_STEP = 32 / ACROSS;
constexpr float TWICE = COMPLEX ? 2.f : 1.f;

struct Shared {
    alignas(16) float step[TILE][CHANNELS];
    alignas(16) float weight[TILE][CHANNELS];
    alignas(16) float c[C_STEP ? TILE : 1][RAW];
    alignas(16) number dt[2][TILE][CHANNELS];
    alignas(16) number dy[2][TILE][CHANNELS];
    alignas(16) number z[HAS_Z ? 2 : 1][TILE][CHANNELS];
    alignas(16) coefficient raw_c[C_STEP ? 2 : 1][TILE][RAW];
};
__device__ int scan_flow_bytes = WARPS * sizeof(Shared);

extern "C" __global__ void __launch_bounds__(32 * WARPS) scan_flow(
    const number* dy, const number* dt, const number* z, const float* A, const coefficient* C, const float* dt_bias,
    float* local, float* sums, const i64* offsets,
    i64 dy_row, i64 dy_step, i64 dt_row, i64 dt_step, i64 z_row, i64 z_step, i64 c_row, i64 c_step, i64 c_group,
    i64 sequences, i64 length, i64 channels, i64 states, i64 groups, i64 blocks, i64 c_share, i64 span, i64 items) {
    extern __shared__ __align__(16) char memory[];
    Shared& s = ((Shared*)memory)[threadIdx.x / 32];
    const int lane = threadIdx.x % 32, part = lane / CHANNELS, column = lane % CHANNELS;
    const i64 item = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (item >= items) return;
    const i64 piece = item / (groups * blocks), block = item % (groups * blocks);
    const i64 group = block / blocks, per_group = channels / groups;
    const int within = (int)(block % blocks) * CHANNELS;
    const i64 base = group * per_group + within;
    const int width = (int)min((i64)CHANNELS, per_group - within);
    const i64 sequence = sequence_of_piece(piece, offsets, sequences, length, span);
    const Sequence bounds = sequence_bounds(offsets, sequence, length);
    const i64 start = (piece - bounds.begin / span - sequence) * span;
    const int count = (int)min(bounds.count - start, span);
    const i64 here = bounds.first + start, row = PACKED ? 0 : sequence;
    const bool live = column < width;
    const i64 channel = base + column, state_size = states * PLANES;

    dy += row * dy_row + here * dy_step + base;
    dt += row * dt_row + here * dt_step + base;
    if (HAS_Z) z += row * z_row + here * z_step + base;
    if (C_STEP) C += row * c_row + here * c_step + group / c_share * c_group;
    Pair a[STATES], u[STATES], fixed_c[STATES];
    read_states(a, A + channel * state_size, part * STATES, states, live);
#pragma unroll
    for (int n = 0; n < STATES; n++) a[n].re *= LOG2E, u[n] = {0.f, 0.f};
    if (!C_STEP) read_states(fixed_c, (const float*)C + channel * state_size, part * STATES, states, live);
    const int pair = lane % ACROSS * PAIRS, first_row = lane / ACROSS;
    float bias[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (dt_bias != nullptr && pair + i < width) bias[i] = dt_bias[base + pair + i];
    float total = 0.f;

    const Copier<TILE, CHANNELS, 32, ALIGNED, number> copy_dt(dt, dt_step, width, lane), copy_dy(dy, dy_step, width, lane);
    const Copier<TILE, CHANNELS, 32, ALIGNED, number> copy_z(z, z_step, width, lane);
    const Copier<TILE, RAW, 32, ALIGNED, coefficient> copy_c(C, c_step, state_size, lane);
    auto prefetch = [&](int t, int half) {
        copy_dt(&s.dt[half][0][0], t, count);
        copy_dy(&s.dy[half][0][0], t, count);
        if constexpr (HAS_Z) copy_z(&s.z[half][0][0], t, count);
        if constexpr (C_STEP) copy_c(&s.raw_c[half][0][0], t, count);
        commit_copies();
    };

    int t = (count - 1) / TILE * TILE, half = 0;
    if (count > 0) prefetch(t, 0);
    for (; t >= 0 && count > 0; t -= TILE, half ^= 1) {
        if (t > 0) {
            prefetch(t - TILE, half ^ 1);
            await_copies<1>();
        } else {
            await_copies<0>();
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            int r = first_row + i * ROW_STEP;
            *(float2*)&s.step[r][pair] = step_pair(&s.dt[half][r][pair], bias, t + r < count);
            *(float2*)&s.weight[r][pair] = gate_weight(widen_pair(&s.dy[half][r][pair]), &s.z[HAS_Z ? half : 0][r][pair]);
        }
        if constexpr (C_STEP) widen_rows<TILE, 32>(&s.c[0][0], &s.raw_c[half][0][0], lane);
        __syncwarp();
#pragma unroll 8
        for (int r = TILE - 1; r >= 0; r--) {
            float step = s.step[r][column], weight = TWICE * s.weight[r][column];
            Share c;
            if (C_STEP) load_share(c, &s.c[r][part * STATES]);
            total += step;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                Pair cn = C_STEP ? of(c, n) : fixed_c[n], k = decay(step, a[n]);
                Pair g = {fmaf(weight, cn.re, u[n].re), COMPLEX ? fmaf(-weight, cn.im, u[n].im) : 0.f};
                u[n].re = COMPLEX ? fmaf(k.re, g.re, k.im * g.im) : k.re * g.re;
                u[n].im = COMPLEX ? fmaf(k.re, g.im, -k.im * g.re) : 0.f;
            }
        }
        __syncwarp();
    }
    write_states(u, local + (piece * channels + channel) * state_size, part * STATES, states, live);
    if (part == 0 && live) sums[piece * channels + channel] = total;
}
