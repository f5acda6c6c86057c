// Forward pass of the selective scan: a team of warps walks COLUMNS channels of one sequence, or of one piece of it.
//
// A team is one warp where the GPU is full: it needs nobody, its tiles lie in its own part of shared memory. Where a warp takes
// few channels, the warps of a block are a team, which moves whole memory transactions and widens B and C once for all.
// Work that is done once per channel and step (softplus, gate) is shared out among all lanes, two channels at a time; the scan
// itself gives a channel to LANES lanes, with STATES states each. Four tiles are under way at once: one is scanned, and beside
// its steps the next one's steps are computed, the last one's outputs leave, and the one after the next is copied to shared
// memory. So there is always something to issue, and the special-function unit, which the scan waits for most, never rests long.
//
// More macros: TILE (steps), AHEAD (steps of which a lane has the operands), OUTPUT (else only the last state and the sum of the
// steps are found), CHUNKED, SAVE (every CHUNK steps, the states are kept for the backward pass), WARPS of a block, TEAM of them
// (1 or all), RESIDENT blocks of a multiprocessor.
#include "scan_common.cuh"

constexpr int COLUMNS = CHANNELS * TEAM, THREADS = 32 * TEAM;
constexpr int PAIRS = CHANNELS >= 2 ? 2 : 1;       // channels that a lane takes at a time
constexpr int ACROSS = COLUMNS / PAIRS, ROW_STEP = THREADS / ACROSS;
constexpr int ROUNDS = TILE / ROW_STEP;            // of a lane over a tile
constexpr int WIDENINGS = Widener<TILE, THREADS>::ROUNDS;
constexpr int Y_HALVES = TEAM == 1 ? 1 : 2;
static_assert(ROUNDS * ROW_STEP == TILE && ROW_STEP % LANES == 0, "tiles are whole");
static_assert(TEAM == 1 || TEAM == WARPS, "a team meets as a block does");

struct Shared {
    alignas(16) float2 steps[2][TILE][COLUMNS];  // delta, delta x
    alignas(16) float y[OUTPUT ? Y_HALVES : 1][OUTPUT ? TILE : 1][TEAM][LANES][CHANNELS];  // each part's summands
    alignas(16) float b[2][B_STEP ? TILE : 1][RAW];
    alignas(16) float c[2][C_STEP && OUTPUT ? TILE : 1][RAW];
    alignas(16) number x[4][TILE][COLUMNS];
    alignas(16) number dt[2][TILE][COLUMNS];
    alignas(16) number z[4][OUTPUT && HAS_Z ? TILE : 1][COLUMNS];
    alignas(16) coefficient raw_b[2][B_STEP ? TILE : 1][RAW];
    alignas(16) coefficient raw_c[2][C_STEP && OUTPUT ? TILE : 1][RAW];
};
__device__ int scan_forward_bytes = WARPS / TEAM * sizeof(Shared);

// The team's warps wait for one another, and see what each has written.
DEVICE void meet() {
    if constexpr (TEAM == 1)
        __syncwarp();
    else
        __syncthreads();
}

// Where a warp keeps the summands of a part in a row: not always in the same banks, since lanes that read a part read it of several
// rows and warps.
DEVICE int place_of(int part, int warp, int r) { return part ^ ((warp + TEAM * r) & (LANES - 1)); }

// What one lane reads of one step.
struct Operands {
    float step, drive;
    Share b, c;
};

DEVICE Operands load_operands(const Shared& s, int half, int r, int column, int part) {
    Operands o;
    const float2 both = s.steps[half][r][column];
    o.step = both.x, o.drive = both.y;
    if (B_STEP) load_share(o.b, &s.b[half][B_STEP ? r : 0][part * STATES]);
    if (C_STEP && OUTPUT) load_share(o.c, &s.c[half][C_STEP && OUTPUT ? r : 0][part * STATES]);
    return o;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) scan_forward(
    const number* x, const number* dt, const number* z, const float* A, const coefficient* B, const coefficient* C,
    const float* D, const float* dt_bias, result* y, const float* initial, float* final, float* saved, float* carry,
    float* sums, const i64* offsets,
    i64 x_row, i64 x_step, i64 dt_row, i64 dt_step, i64 z_row, i64 z_step,
    i64 b_row, i64 b_step, i64 b_group, i64 c_row, i64 c_step, i64 c_group,
    i64 sequences, i64 length, i64 channels, i64 states, i64 groups, i64 blocks, i64 b_share, i64 c_share, i64 span,
    i64 items) {
    extern __shared__ __align__(16) char memory[];
    Shared& s = ((Shared*)memory)[threadIdx.x / THREADS];
    const int thread = threadIdx.x % THREADS, warp = thread / 32, lane = thread % 32;
    const int part = lane / CHANNELS, own = lane % CHANNELS, column = warp * CHANNELS + own;
    const i64 item = (i64)blockIdx.x * (WARPS / TEAM) + threadIdx.x / THREADS;
    if (item >= items) return;

    // Which channels of which sequence, and which steps of it.
    const i64 piece = item / (groups * blocks), block = item % (groups * blocks);
    const i64 group = block / blocks, per_group = channels / groups;
    const int within = (int)(block % blocks) * COLUMNS;
    const i64 base = group * per_group + within;
    const int width = (int)min((i64)COLUMNS, per_group - within);
    const i64 sequence = CHUNKED ? sequence_of_piece(piece, offsets, sequences, length, span) : piece;
    const Sequence bounds = sequence_bounds(offsets, sequence, length);
    const i64 start = CHUNKED ? (piece - first_piece(offsets, sequence, length, span)) * span : 0;
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
    const int pair = thread % ACROSS * PAIRS, first_row = thread / ACROSS;
    float bias[2] = {0.f, 0.f}, skip[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        bool inside = pair + i < width;
        bias[i] = dt_bias != nullptr && inside ? dt_bias[base + pair + i] : 0.f;
        skip[i] = D != nullptr && inside ? D[base + pair + i] : 0.f;
    }
    float total = 0.f;

    // Tiles of the inputs to shared memory, one after the other; rows that are not there become zeros.
    Copier<TILE, COLUMNS, THREADS, ALIGNED, number> copy_x(x, x_step, width, thread, 0), copy_dt(dt, dt_step, width, thread, 0);
    Copier<TILE, COLUMNS, THREADS, ALIGNED, number> copy_z(z, z_step, width, thread, 0);
    Copier<TILE, RAW, THREADS, ALIGNED, coefficient> copy_b(B, b_step, state_size, thread, 0), copy_c(C, c_step, state_size, thread, 0);
    auto prefetch = [&](int k) {
        const int t = k * TILE;
        copy_x(&s.x[k & 3][0][0], t, count);
        copy_dt(&s.dt[k & 1][0][0], t, count);
        if constexpr (OUTPUT && HAS_Z) copy_z(&s.z[k & 3][0][0], t, count);
        if constexpr (B_STEP) copy_b(&s.raw_b[k & 1][0][0], t, count);
        if constexpr (C_STEP && OUTPUT) copy_c(&s.raw_c[k & 1][0][0], t, count);
        commit_copies();
    };
    // The steps of round i of tile k: computed, and kept for the scan.
    float2 steps, drives;
    auto prepare = [&](int k, int i) {
        const int r = first_row + i * ROW_STEP;
        const bool inside = k * TILE + r < count;
        float2 raw = load_pair<PAIRS>(&s.dt[k & 1][r][pair]), value = load_pair<PAIRS>(&s.x[k & 3][r][pair]);
        raw.x += bias[0], raw.y += bias[1];
        if (SOFTPLUS) raw = softplus(raw);
        steps = inside ? raw : make_float2(0.f, 0.f);
        drives = make_float2(steps.x * value.x, steps.y * value.y);
    };
    auto publish = [&](int k, int i) {
        float2* to = &s.steps[k & 1][first_row + i * ROW_STEP][pair];
        if constexpr (PAIRS == 2)
            *(float4*)to = make_float4(steps.x, drives.x, steps.y, drives.y);
        else
            *to = make_float2(steps.x, drives.x);
    };
    // Outputs of round i of tile k: computed, and written.
    float2 outputs;
    result* to = y + (i64)(first_row - TILE) * channels + pair;
    auto finish = [&](int k, int i) {
        const int r = first_row + i * ROW_STEP;
        const int of_warp = pair / CHANNELS;
        float2 out = make_float2(0.f, 0.f);
        const float2 value = load_pair<PAIRS>(&s.x[k & 3][r][pair]);
#pragma unroll
        for (int p = 0; p < LANES; p++) {
            const int place = place_of(p, of_warp, first_row);
            const float2 more = get_pair<PAIRS>(&s.y[k & (Y_HALVES - 1)][OUTPUT ? r : 0][of_warp][place][pair % CHANNELS]);
            out.x += more.x, out.y += more.y;
        }
        out.x = fmaf(skip[0], value.x, (COMPLEX ? 2.f : 1.f) * out.x);
        out.y = fmaf(skip[1], value.y, (COMPLEX ? 2.f : 1.f) * out.y);
        if (HAS_Z) {
            const float2 gate = silu(load_pair<PAIRS>(&s.z[k & 3][OUTPUT && HAS_Z ? r : 0][pair]));
            out.x *= gate.x, out.y *= gate.y;
        }
        outputs = out;
    };
    auto emit = [&](int k, int i) {
        const bool inside = k >= 0 && k * TILE + first_row + i * ROW_STEP < count;
        result* at = to + i * ROW_STEP * channels;
        if (PAIRS == 2 && ALIGNED) {
            store_pair_if(inside && pair < width, at, outputs);
        } else {
            store_if(inside && pair < width, at, outputs.x);
            if (PAIRS == 2) store_if(inside && pair + 1 < width, at + 1, outputs.y);
        }
    };
    Widener<TILE, THREADS> widen_b(thread), widen_c(thread);

    if (SAVE) saved += ((bounds.begin / CHUNK + sequence + start / CHUNK) * channels + channel) * state_size;
    const int tiles = (count + TILE - 1) / TILE;
    if (tiles > 0) {
        prefetch(0);
        prefetch(1);
        await_copies<1>();
        meet();
        for (int i = 0; i < ROUNDS; i++) prepare(0, i), publish(0, i);
        for (int i = 0; i < WIDENINGS; i++) {
            if constexpr (B_STEP) widen_b.load(&s.raw_b[0][0][0], i), widen_b.store(&s.b[0][0][0], i);
            if constexpr (C_STEP && OUTPUT) widen_c.load(&s.raw_c[0][0][0], i), widen_c.store(&s.c[0][0][0], i);
        }
    }
#pragma unroll 1
    for (int k = 0; k < tiles; k++) {
        if (SAVE && k % (CHUNK / TILE) == 0)
            write_states(h, saved + k / (CHUNK / TILE) * channels * state_size, part * STATES, states, live);
        await_copies<0>();
        meet();
        const int half = k & 1;
        // Operands are loaded AHEAD steps before they are used, and decays computed one step later.
        Operands ahead[AHEAD + 1];
        Pair decays[AHEAD][STATES];
        auto fetch = [&](int i) {
            if (i < TILE) ahead[i % (AHEAD + 1)] = load_operands(s, half, i, column, part);
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
            // Beside the step: a part of the work for the tiles before and after. What a round computes is stored some steps later,
            // since a load does not move over a store that might be to the same place, and a store waits for its value.
            if (i == 0) prefetch(k + 2);
            constexpr int EACH = TILE / ROUNDS, WIDE_EACH = TILE / WIDENINGS;
            if (OUTPUT && i % EACH == 0) {
                finish(k - 1, i / EACH);
                if (Y_HALVES == 1) meet();
            }
            if (i % EACH == EACH / 4) prepare(k + 1, i / EACH);
            if (i % WIDE_EACH == WIDE_EACH / 2) {
                if constexpr (B_STEP) widen_b.load(&s.raw_b[half ^ 1][0][0], i / WIDE_EACH);
                if constexpr (C_STEP && OUTPUT) widen_c.load(&s.raw_c[half ^ 1][0][0], i / WIDE_EACH);
            }
            if (i % WIDE_EACH == WIDE_EACH - 1) {
                if constexpr (B_STEP) widen_b.store(&s.b[half ^ 1][0][0], i / WIDE_EACH);
                if constexpr (C_STEP && OUTPUT) widen_c.store(&s.c[half ^ 1][0][0], i / WIDE_EACH);
            }
            if (i % EACH == EACH - 1) {
                publish(k + 1, i / EACH);
                if (OUTPUT) emit(k - 1, i / EACH);
            }

            if (!OUTPUT) total += now.step;
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                Pair bn = B_STEP ? of(now.b, n) : fixed_b[n];
                h[n] = advance(decays[i % AHEAD][n], h[n], now.drive, bn);
                if (OUTPUT) {
                    Pair cn = C_STEP ? of(now.c, n) : fixed_c[n];
                    sum = fmaf(h[n].re, cn.re, sum);
                    if (COMPLEX) sum = fmaf(-h[n].im, cn.im, sum);
                }
            }
            if (OUTPUT) s.y[k & (Y_HALVES - 1)][OUTPUT ? i : 0][warp][place_of(part, warp, i)][own] = sum;
        }
        to += TILE * channels;
    }
    if (OUTPUT && tiles > 0) {
        meet();
        for (int i = 0; i < ROUNDS; i++) finish(tiles - 1, i), emit(tiles - 1, i);
    }

    if (OUTPUT && !CHUNKED)
        write_states(h, final + (sequence * channels + channel) * state_size, part * STATES, states, live);
    if (!OUTPUT) {
        write_states(h, carry + (piece * channels + channel) * state_size, part * STATES, states, live);
        if (part == 0 && live) sums[piece * channels + channel] = total;
    }
}
