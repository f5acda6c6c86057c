// Forward pass of the selective scan: one warp walks CHANNELS channels of one sequence, or of one piece of it.
//
// A warp needs nobody: its tiles lie in its own part of shared memory. Work that is done once per channel and step (softplus,
// gate) is shared out among all lanes, two channels at a time; the scan itself gives a channel to LANES lanes, with STATES
// states each. Three tiles are under way at once, so that there is always something to issue: while one is scanned, the next
// one's steps are computed, the last one's outputs leave, and the one after the next is on its way to shared memory.
//
// More macros: TILE (steps), OUTPUT (else only the last state and the sum of the steps are found), CHUNKED, SAVE (every
// CHUNK steps, the states are kept for the backward pass), WARPS of a block, RESIDENT blocks of a multiprocessor.
#include "scan_common.cuh"

constexpr int PAIRS = CHANNELS >= 2 ? 2 : 1;       // channels that a lane takes at a time
constexpr int ACROSS = CHANNELS / PAIRS, ROW_STEP = 32 / ACROSS;
constexpr int ROUNDS = TILE / ROW_STEP;            // of a lane over a tile
constexpr int SUMS = TILE / LANES;                 // outputs of a lane in a tile
static_assert(ROUNDS * ROW_STEP == TILE && SUMS * LANES == TILE, "tiles are whole");

struct Shared {
    alignas(16) float2 steps[2][TILE][CHANNELS];  // delta, delta x
    alignas(16) float y[OUTPUT ? TILE : 1][CHANNELS];
    alignas(16) float b[2][B_STEP ? TILE : 1][RAW];
    alignas(16) float c[2][C_STEP && OUTPUT ? TILE : 1][RAW];
    alignas(16) number x[4][TILE][CHANNELS];
    alignas(16) number dt[2][TILE][CHANNELS];
    alignas(16) number z[4][OUTPUT && HAS_Z ? TILE : 1][CHANNELS];
    alignas(16) coefficient raw_b[2][B_STEP ? TILE : 1][RAW];
    alignas(16) coefficient raw_c[2][C_STEP && OUTPUT ? TILE : 1][RAW];
};
__device__ int scan_forward_bytes = WARPS * sizeof(Shared);

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) scan_forward(
    const number* x, const number* dt, const number* z, const float* A, const coefficient* B, const coefficient* C,
    const float* D, const float* dt_bias, result* y, const float* initial, float* final, float* saved, float* carry,
    float* sums, const i64* offsets,
    i64 x_row, i64 x_step, i64 dt_row, i64 dt_step, i64 z_row, i64 z_step,
    i64 b_row, i64 b_step, i64 b_group, i64 c_row, i64 c_step, i64 c_group,
    i64 sequences, i64 length, i64 channels, i64 states, i64 groups, i64 blocks, i64 b_share, i64 c_share, i64 span,
    i64 items) {
    extern __shared__ __align__(16) char memory[];
    Shared& s = ((Shared*)memory)[threadIdx.x / 32];
    const int lane = threadIdx.x % 32, part = lane / CHANNELS, column = lane % CHANNELS;
    const i64 item = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (item >= items) return;

    // Which channels of which sequence, and which steps of it.
    const i64 piece = item / (groups * blocks), block = item % (groups * blocks);
    const i64 group = block / blocks, per_group = channels / groups;
    const int within = (int)(block % blocks) * CHANNELS;
    const i64 base = group * per_group + within;
    const int width = (int)min((i64)CHANNELS, per_group - within);
    const i64 sequence = CHUNKED ? sequence_of_piece(piece, offsets, sequences, length, span) : piece;
    const Sequence bounds = sequence_bounds(offsets, sequence, length);
    const i64 start = CHUNKED ? (piece - bounds.begin / span - sequence) * span : 0;
    const int count = (int)(CHUNKED ? min(bounds.count - start, span) : bounds.count);
    const i64 here = bounds.first + start, row = PACKED ? 0 : sequence;
    const bool live = column < width;
    const i64 channel = base + column;
    const i64 state_size = states * PLANES;

    x += row * x_row + here * x_step + base;
    dt += row * dt_row + here * dt_step + base;
    if (OUTPUT && HAS_Z) z += row * z_row + here * z_step + base;
    y += (row * length + here) * channels + base;
    if (B_STEP) B += row * b_row + here * b_step + group / b_share * b_group;
    if (C_STEP) C += row * c_row + here * c_step + group / c_share * c_group;

    Pair a[STATES], h[STATES], fixed_b[STATES], fixed_c[STATES];
    read_states(a, A + channel * state_size, part * STATES, states, live);
#pragma unroll
    for (int n = 0; n < STATES; n++) a[n].re *= LOG2E;
    // `initial` holds the states before each piece, which is the whole sequence unless time is split.
    read_states(h, initial + (piece * channels + channel) * state_size, part * STATES, states, live && initial != nullptr);
    if (!B_STEP) read_states(fixed_b, (const float*)B + channel * state_size, part * STATES, states, live);
    if (!C_STEP && OUTPUT) read_states(fixed_c, (const float*)C + channel * state_size, part * STATES, states, live);

    // What this lane does once per channel and step: channels `pair`, rows `first_row` + ROW_STEP i.
    const int pair = lane % ACROSS * PAIRS, first_row = lane / ACROSS;
    float bias[2] = {0.f, 0.f}, skip[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        bool inside = pair + i < width;
        bias[i] = dt_bias != nullptr && inside ? dt_bias[base + pair + i] : 0.f;
        skip[i] = D != nullptr && inside ? D[base + pair + i] : 0.f;
    }
    float total = 0.f;
    u32 places[ROUNDS];
#pragma unroll
    for (int i = 0; i < ROUNDS; i++) places[i] = (first_row + i * ROW_STEP) * (u32)channels + pair;

    // Tile `k` to shared memory; rows that are not there become zeros.
    const Copier<TILE, CHANNELS, 32, ALIGNED, number> copy_x(x, x_step, width, lane), copy_dt(dt, dt_step, width, lane);
    const Copier<TILE, CHANNELS, 32, ALIGNED, number> copy_z(z, z_step, width, lane);
    const Copier<TILE, RAW, 32, ALIGNED, coefficient> copy_b(B, b_step, state_size, lane), copy_c(C, c_step, state_size, lane);
    auto prefetch = [&](int k) {
        const int t = k * TILE;
        copy_x(&s.x[k & 3][0][0], t, count);
        copy_dt(&s.dt[k & 1][0][0], t, count);
        if constexpr (OUTPUT && HAS_Z) copy_z(&s.z[k & 3][0][0], t, count);
        if constexpr (B_STEP) copy_b(&s.raw_b[k & 1][0][0], t, count);
        if constexpr (C_STEP && OUTPUT) copy_c(&s.raw_c[k & 1][0][0], t, count);
        commit_copies();
    };
    float2 step_pairs[ROUNDS], drive_pairs[ROUNDS];
    auto prepare = [&](int k) {
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int r = first_row + i * ROW_STEP;
            const bool inside = k * TILE + r < count;
            float2 raw = load_pair<PAIRS>(&s.dt[k & 1][r][pair]), value = load_pair<PAIRS>(&s.x[k & 3][r][pair]);
            raw.x += bias[0], raw.y += bias[1];
            if (SOFTPLUS) raw = make_float2(softplus(raw.x), softplus(raw.y));
            step_pairs[i] = inside ? raw : make_float2(0.f, 0.f);
            drive_pairs[i] = make_float2(step_pairs[i].x * value.x, step_pairs[i].y * value.y);
        }
    };
    auto publish = [&](int k) {
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int r = first_row + i * ROW_STEP;
            float2* to = &s.steps[k & 1][r][pair];
            if constexpr (PAIRS == 2)
                *(float4*)to = make_float4(step_pairs[i].x, drive_pairs[i].x, step_pairs[i].y, drive_pairs[i].y);
            else
                *to = make_float2(step_pairs[i].x, drive_pairs[i].x);
        }
        if constexpr (B_STEP) widen_rows<TILE, 32>(&s.b[k & 1][0][0], &s.raw_b[k & 1][0][0], lane);
        if constexpr (C_STEP && OUTPUT) widen_rows<TILE, 32>(&s.c[k & 1][0][0], &s.raw_c[k & 1][0][0], lane);
    };
    auto finish = [&](int k) {
        result* to = y + (i64)k * TILE * channels;
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const int r = first_row + i * ROW_STEP;
            float2 out = get_pair<PAIRS>(&s.y[OUTPUT ? r : 0][pair]), value = load_pair<PAIRS>(&s.x[k & 3][r][pair]);
            out.x = fmaf(skip[0], value.x, (COMPLEX ? 2.f : 1.f) * out.x);
            out.y = fmaf(skip[1], value.y, (COMPLEX ? 2.f : 1.f) * out.y);
            if (HAS_Z) {
                float2 gate = load_pair<PAIRS>(&s.z[k & 3][OUTPUT && HAS_Z ? r : 0][pair]);
                out.x *= gate.x * sigmoid(gate.x);
                out.y *= gate.y * sigmoid(gate.y);
            }
            const bool inside = k >= 0 && k * TILE + r < count;
            result* at = to + places[i];
            if (PAIRS == 2 && ALIGNED) {
                store_pair_if(inside && pair < width, at, out);
            } else {
                store_if(inside && pair < width, at, out.x);
                if (PAIRS == 2) store_if(inside && pair + 1 < width, at + 1, out.y);
            }
        }
    };

    if (SAVE) saved += ((bounds.begin / CHUNK + sequence + start / CHUNK) * channels + channel) * state_size;
    const int tiles = (count + TILE - 1) / TILE;
    if (tiles > 0) {
        prefetch(0);
        prefetch(1);
        await_copies<1>();
        __syncwarp();
        prepare(0);
        publish(0);
        __syncwarp();
    }
#pragma unroll 1
    for (int k = 0; k < tiles; k++) {
        if (SAVE && k % (CHUNK / TILE) == 0)
            write_states(h, saved + k / (CHUNK / TILE) * channels * state_size, part * STATES, states, live);
        prefetch(k + 2);
        await_copies<1>();
        __syncwarp();
        prepare(k + 1);
        if (OUTPUT) finish(k - 1);

        float out[SUMS];
        const int half = k & 1;
#pragma unroll
        for (int first = 0; first < TILE; first += LANES) {
            float ys[LANES];
#pragma unroll
            for (int i = 0; i < LANES; i++) {
                const float2 both = s.steps[half][first + i][column];
                const float step = both.x, drive = both.y;
                Share b, c;
                if (B_STEP) load_share(b, &s.b[half][B_STEP ? first + i : 0][part * STATES]);
                if (C_STEP && OUTPUT) load_share(c, &s.c[half][C_STEP && OUTPUT ? first + i : 0][part * STATES]);
                if (!OUTPUT) total += step;
                ys[i] = 0.f;
#pragma unroll
                for (int n = 0; n < STATES; n++) {
                    Pair bn = B_STEP ? of(b, n) : fixed_b[n];
                    h[n] = advance(decay(step, a[n]), h[n], drive, bn);
                    if (OUTPUT) {
                        Pair cn = C_STEP ? of(c, n) : fixed_c[n];
                        ys[i] = fmaf(h[n].re, cn.re, ys[i]);
                        if (COMPLEX) ys[i] = fmaf(-h[n].im, cn.im, ys[i]);
                    }
                }
            }
            if (OUTPUT) out[first / LANES] = sum_parts(ys, part);
        }

        __syncwarp();
        if (OUTPUT)
#pragma unroll
            for (int i = 0; i < SUMS; i++) s.y[OUTPUT ? i * LANES + part : 0][column] = out[i];
        publish(k + 1);
        __syncwarp();
    }
    if (OUTPUT && tiles > 0) finish(tiles - 1);

    if (OUTPUT && !CHUNKED)
        write_states(h, final + (sequence * channels + channel) * state_size, part * STATES, states, live);
    if (!OUTPUT) {
        write_states(h, carry + (piece * channels + channel) * state_size, part * STATES, states, live);
        if (part == 0 && live) sums[piece * channels + channel] = total;
    }
}
