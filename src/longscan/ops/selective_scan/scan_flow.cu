// What flows out of each piece of time at its start when nothing flows in at its end, and the sum of its steps: the first pass
// backward where time is split. scan_backward.cu has the equations; scan_chain.cu joins the pieces. Tiles follow one another as in
// scan_forward.cu, from the last one to the first: while one is scanned, the next one's steps are computed.
//
// More macros: TILE (steps), AHEAD (as there), WARPS of a block, RESIDENT blocks of a multiprocessor.
#include "scan_common.cuh"

constexpr int PAIRS = CHANNELS >= 2 ? 2 : 1;
constexpr int ACROSS = CHANNELS / PAIRS, ROW_STEP = 32 / ACROSS;
constexpr int ROUNDS = TILE / ROW_STEP, WIDENINGS = Widener<TILE, 32>::ROUNDS;
constexpr float TWICE = COMPLEX ? 2.f : 1.f;
static_assert(ROUNDS * ROW_STEP == TILE, "tiles are whole");

struct Shared {
    alignas(16) float2 steps[2][TILE][CHANNELS];  // delta, and what reaches the scan of the gradient of its output
    alignas(16) float c[2][C_STEP ? TILE : 1][RAW];
    alignas(16) number dt[2][TILE][CHANNELS];
    alignas(16) number dy[2][TILE][CHANNELS];
    alignas(16) number z[2][HAS_Z ? TILE : 1][CHANNELS];
    alignas(16) coefficient raw_c[2][C_STEP ? TILE : 1][RAW];
};
__device__ int scan_flow_bytes = WARPS * sizeof(Shared);

// What one lane reads of one step.
struct Operands {
    float step, weight;
    Share c;
};

DEVICE Operands load_operands(const Shared& s, int half, int r, int column, int part) {
    Operands o;
    const float2 both = s.steps[half][r][column];
    o.step = both.x, o.weight = both.y;
    if (C_STEP) load_share(o.c, &s.c[half][C_STEP ? r : 0][part * STATES]);
    return o;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) scan_flow(
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
    const i64 start = (piece - first_piece(offsets, sequence, length, span)) * span;
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
    for (int i = 0; i < PAIRS; i++)
        if (dt_bias != nullptr && pair + i < width) bias[i] = dt_bias[base + pair + i];
    float total = 0.f;

    const int tiles = (count + TILE - 1) / TILE, last = (tiles - 1) * TILE;
    Copier<TILE, CHANNELS, 32, ALIGNED, number, -1> copy_dt(dt, dt_step, width, lane, last), copy_dy(dy, dy_step, width, lane, last);
    Copier<TILE, CHANNELS, 32, ALIGNED, number, -1> copy_z(z, z_step, width, lane, last);
    Copier<TILE, RAW, 32, ALIGNED, coefficient, -1> copy_c(C, c_step, state_size, lane, last);
    // Tile k from the end; before the first one there is nothing.
    auto prefetch = [&](int k) {
        const int t = k < tiles ? last - k * TILE : count;
        copy_dt(&s.dt[k & 1][0][0], t, count);
        copy_dy(&s.dy[k & 1][0][0], t, count);
        if constexpr (HAS_Z) copy_z(&s.z[k & 1][0][0], t, count);
        if constexpr (C_STEP) copy_c(&s.raw_c[k & 1][0][0], t, count);
        commit_copies();
    };
    float2 steps, weights;
    auto prepare = [&](int k, int i) {
        const int r = first_row + i * ROW_STEP;
        const bool inside = last - k * TILE + r < count;
        float2 raw = load_pair<PAIRS>(&s.dt[k & 1][r][pair]);
        raw.x += bias[0], raw.y += bias[1];
        if (SOFTPLUS) raw = softplus(raw);
        steps = inside ? raw : make_float2(0.f, 0.f);
        weights = load_pair<PAIRS>(&s.dy[k & 1][r][pair]);
        if (HAS_Z) {
            const float2 gate = silu(load_pair<PAIRS>(&s.z[k & 1][HAS_Z ? r : 0][pair]));
            weights.x *= gate.x, weights.y *= gate.y;
        }
    };
    auto publish = [&](int k, int i) {
        float2* to = &s.steps[k & 1][first_row + i * ROW_STEP][pair];
        if constexpr (PAIRS == 2)
            *(float4*)to = make_float4(steps.x, TWICE * weights.x, steps.y, TWICE * weights.y);
        else
            *to = make_float2(steps.x, TWICE * weights.x);
    };
    Widener<TILE, 32> widen_c(lane);

    if (tiles > 0) {
        prefetch(0);
        prefetch(1);
        await_copies<1>();
        __syncwarp();
        for (int i = 0; i < ROUNDS; i++) prepare(0, i), publish(0, i);
        if constexpr (C_STEP)
            for (int i = 0; i < WIDENINGS; i++) widen_c.load(&s.raw_c[0][0][0], i), widen_c.store(&s.c[0][0][0], i);
    }
#pragma unroll 1
    for (int k = 0; k < tiles; k++) {
        await_copies<0>();
        __syncwarp();
        const int half = k & 1;
        Operands ahead[AHEAD + 1];
        Pair decays[AHEAD][STATES];
        auto fetch = [&](int i) {
            if (i < TILE) ahead[i % (AHEAD + 1)] = load_operands(s, half, TILE - 1 - i, column, part);
        };
        auto decide = [&](int i) {
            if (i < TILE)
#pragma unroll
                for (int n = 0; n < STATES; n++) decays[i % AHEAD][n] = decay(ahead[i % (AHEAD + 1)].step, a[n]);
        };
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            fetch(i);
            if (i > 0) decide(i - 1);
        }
#pragma unroll
        for (int i = 0; i < TILE; i++) {
            const Operands now = ahead[i % (AHEAD + 1)];
            fetch(i + AHEAD);
            decide(i + AHEAD - 1);
            constexpr int EACH = TILE / ROUNDS, WIDE_EACH = TILE / WIDENINGS;
            if (i == 0) prefetch(k + 2);
            if (i % EACH == 0) prepare(k + 1, i / EACH);
            if constexpr (C_STEP) {
                if (i % WIDE_EACH == WIDE_EACH / 2) widen_c.load(&s.raw_c[half ^ 1][0][0], i / WIDE_EACH);
                if (i % WIDE_EACH == WIDE_EACH - 1) widen_c.store(&s.c[half ^ 1][0][0], i / WIDE_EACH);
            }
            if (i % EACH == EACH - 1) publish(k + 1, i / EACH);

            total += now.step;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                const Pair cn = C_STEP ? of(now.c, n) : fixed_c[n], d = decays[i % AHEAD][n];
                const Pair g = {fmaf(now.weight, cn.re, u[n].re), COMPLEX ? fmaf(-now.weight, cn.im, u[n].im) : 0.f};
                u[n].re = COMPLEX ? fmaf(d.re, g.re, d.im * g.im) : d.re * g.re;
                u[n].im = COMPLEX ? fmaf(d.re, g.im, -d.im * g.re) : 0.f;
            }
        }
    }
    write_states(u, local + (piece * channels + channel) * state_size, part * STATES, states, live);
    if (part == 0 && live) sums[piece * channels + channel] = total;
}
