// Backward pass of the selective scan. With G[t] the gradient of h[t] and u[t] = conj(a[t]) G[t] what flows to the step before,
//
//     G[t] = conj(C[t]) dy[t] + u[t+1]        (dy twice for complex A)
//
// and with q[t] = u[t] conj(h[t-1]):  dA += delta q, ddelta = Re(conj(A) q) + x Re(conj(B) G), dB = delta x G, dC = dy conj(h).
//
// WARPS warps of a block walk the same stretch of time, each over its own CHANNELS channels, backward in tiles of TILE steps.
// States between saved ones are computed again, SUB steps at a time, and stay in registers. Where time is split, scan_flow.cu
// has found what flows into each piece.
//
// dB and dC are sums over channels. Tensor cores make the first part of them: a register of a warp is an 8 x 4 matrix whose
// rows are four lanes each; times a matrix of zeros with ones in one column it gives the rows' sums in that column. So one
// m16n8k8 instruction takes two states of dB and of dC. TF32 keeps 11 bits; for float32 activations the rest goes through a
// second instruction. The sums of four lanes meet in shared memory, where those of all warps are added in a fixed order.
//
// More macros: TILE (the distance of saved states), SUB, CHUNKED, WARPS, RESIDENT blocks of a multiprocessor.
#include "scan_common.cuh"

constexpr int PAIRS = CHANNELS >= 2 ? 2 : 1;
constexpr int ITEMS = TILE * CHANNELS / PAIRS;
constexpr int ROUNDS = (ITEMS + 31) / 32;
constexpr int ACROSS = CHANNELS / PAIRS, ROW_STEP = 32 / ACROSS;
constexpr float TWICE = COMPLEX ? 2.f : 1.f;
static_assert(LANES <= 4 && NUMBERS <= 8 && SUB % LANES == 0 && TILE % SUB == 0, "layout");

// Adds, for every four lanes in a row, the sums of b0, c0 to the column that `pick0` marks and of b1, c1 to that of `pick1`:
// rows 0 to 7 of d are for b, 8 to 15 for c. A lane holds columns 2 (lane % 4) and the next of row lane / 4.
DEVICE void add_columns(float (&d)[4], float b0, float c0, float b1, float c1, float pick0, float pick1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(b0)), "r"(__float_as_uint(c0)), "r"(__float_as_uint(b1)), "r"(__float_as_uint(c1)),
          "r"(__float_as_uint(pick0)), "r"(__float_as_uint(pick1)));
}

// What TF32 leaves out.
DEVICE float rest(float x) { return x - __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// TF32 cuts numbers off rather than rounding them: by this much on average.
constexpr float CUT = FORMAT == 0 ? 1.f : 1.f + 3.5e-4f;

// Lanes of four whose columns of the sums hold numbers, two each.
constexpr int QUARTERS = (NUMBERS + 1) / 2;

struct Warp {
    alignas(16) float2 steps[TILE][CHANNELS];  // delta, delta x
    alignas(16) float weight[TILE][CHANNELS];
    float starts[TILE / SUB][NUMBERS][32];
    alignas(16) number x[2][TILE][CHANNELS];
    alignas(16) number dt[2][TILE][CHANNELS];
    alignas(16) number dy[2][TILE][CHANNELS];
    alignas(16) number z[2][HAS_Z ? TILE : 1][CHANNELS];
};

struct Shared {
    Warp warps[WARPS];
    alignas(16) float b[B_STEP ? TILE : 1][RAW];
    alignas(16) float c[C_STEP ? TILE : 1][RAW];
    alignas(16) coefficient raw_b[B_STEP ? 2 : 1][TILE][RAW];
    alignas(16) coefficient raw_c[C_STEP ? 2 : 1][TILE][RAW];
    alignas(16) float4 sums[2][WARPS][SUB][8][QUARTERS];
};
__device__ int scan_backward_bytes = sizeof(Shared);

// What one lane reads of one step.
struct Step {
    float step, drive, weight;
    Share b, c;
};

DEVICE void put_sums(float4 (&to)[8][QUARTERS], const float (&d)[4], int lane) {
    if (QUARTERS == 4 || lane % 4 < QUARTERS) to[lane / 4][lane % 4 % QUARTERS] = make_float4(d[0], d[1], d[2], d[3]);
}

DEVICE Step load_step(const Warp& w, const Shared& s, int r, int column, int part, bool all) {
    Step o;
    const float2 both = w.steps[r][column];
    o.step = both.x, o.drive = both.y, o.weight = all ? w.weight[r][column] : 0.f;
    if (B_STEP) load_share(o.b, &s.b[B_STEP ? r : 0][part * STATES]);
    if (C_STEP && all) load_share(o.c, &s.c[C_STEP ? r : 0][part * STATES]);
    return o;
}

// Sums over time are of stretches of so many steps first, then of those: long sequences are rounded no more often than short ones.
constexpr int STRETCH = 8 * TILE;

// Adds a stretch's sums to those in memory and begins anew. No thread but this one adds to these places, so that the order is fixed.
DEVICE void move_sums(Pair (&sums)[STATES], float* to, int first, i64 states, bool live) {
#pragma unroll
    for (int n = 0; n < STATES; n++) {
        if (live && (WHOLE || first + n < states)) {
            float* at = to + (first + n) * PLANES;
            asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at), "f"(sums[n].re) : "memory");
            if (COMPLEX) asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at + PLANES - 1), "f"(sums[n].im) : "memory");
        }
        sums[n] = {0.f, 0.f};
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) scan_backward(
    const number* dy, const number* x, const number* dt, const number* z, const float* A, const coefficient* B,
    const coefficient* C, const float* D, const float* dt_bias, const float* saved, const float* dfinal,
    result* dx, result* ddt, result* dz, float* dA, float* dB, float* dC, float* dD, float* dbias, float* dinitial,
    const i64* offsets,
    i64 dy_row, i64 dy_step, i64 x_row, i64 x_step, i64 dt_row, i64 dt_step, i64 z_row, i64 z_step,
    i64 b_row, i64 b_step, i64 b_group, i64 c_row, i64 c_step, i64 c_group,
    i64 sequences, i64 length, i64 channels, i64 states, i64 groups, i64 blocks, i64 b_share, i64 c_share, i64 span,
    i64 tokens) {
    extern __shared__ __align__(16) char memory[];
    Shared& s = *(Shared*)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane / CHANNELS, column = lane % CHANNELS;
    Warp& w = s.warps[warp];
    const i64 item = blockIdx.x;
    const i64 piece = item / (groups * blocks), block = item % (groups * blocks);
    const i64 group = block / blocks, per_group = channels / groups;
    const int within = (int)(block % blocks) * (CHANNELS * WARPS) + warp * CHANNELS;
    const i64 base = group * per_group + within;
    // A warp beyond the group's channels goes along with nothing to do.
    const int width = (int)max((i64)0, min((i64)CHANNELS, per_group - within));
    const i64 sequence = CHUNKED ? sequence_of_piece(piece, offsets, sequences, length, span) : piece;
    const Sequence bounds = sequence_bounds(offsets, sequence, length);
    const i64 start = CHUNKED ? (piece - first_piece(offsets, sequence, length, span)) * span : 0;
    const int count = (int)(CHUNKED ? min(bounds.count - start, span) : bounds.count);
    const i64 here = bounds.first + start, row = PACKED ? 0 : sequence;
    const bool live = column < width;
    const i64 channel = base + column, state_size = states * PLANES;

    dy += row * dy_row + here * dy_step + base;
    x += row * x_row + here * x_step + base;
    dt += row * dt_row + here * dt_step + base;
    if (HAS_Z) z += row * z_row + here * z_step + base;
    if (B_STEP) B += row * b_row + here * b_step + group / b_share * b_group;
    if (C_STEP) C += row * c_row + here * c_step + group / c_share * c_group;
    const i64 token = row * length + here;
    const i64 out = token * channels + base - warp * CHANNELS;
    dx += out, ddt += out;
    if (HAS_Z) dz += out;
    const u32 stride = (u32)channels, place = warp * CHANNELS + column;
    const i64 b_groups = groups / b_share, c_groups = groups / c_share;
    if (B_STEP) dB += ((block % (b_share * blocks) * tokens + token) * b_groups + group / b_share) * RAW;
    if (C_STEP) dC += ((block % (c_share * blocks) * tokens + token) * c_groups + group / c_share) * RAW;
    saved += (bounds.begin / TILE + sequence + start / TILE) * channels * state_size + channel * state_size;

    Pair a[STATES], u[STATES], da[STATES], next[STATES];
    Pair fixed_b[STATES], fixed_c[STATES], db[STATES], dc[STATES];
    read_states(a, A + channel * state_size, part * STATES, states, live);
    const i64 end = CHUNKED ? piece : sequence;
    read_states(u, dfinal + (end * channels + channel) * state_size, part * STATES, states, live);
#pragma unroll
    for (int n = 0; n < STATES; n++) a[n].re *= LOG2E, da[n] = db[n] = dc[n] = {0.f, 0.f};
    const i64 own = (piece * channels + channel) * state_size;
    write_states(da, dA + own, part * STATES, states, live);
    if (!B_STEP) write_states(db, dB + own, part * STATES, states, live);
    if (!C_STEP) write_states(dc, dC + own, part * STATES, states, live);
    if (!B_STEP) read_states(fixed_b, (const float*)B + channel * state_size, part * STATES, states, live);
    if (!C_STEP) read_states(fixed_c, (const float*)C + channel * state_size, part * STATES, states, live);
    const int pair = lane % ACROSS * PAIRS, first_row = lane / ACROSS;
    float bias[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (dt_bias != nullptr && pair + i < width) bias[i] = dt_bias[base + pair + i];
    const float skip = D != nullptr && live ? D[channel] : 0.f;
    const float own_bias = dt_bias != nullptr && live ? dt_bias[channel] : 0.f;
    float dskip = 0.f, dshift = 0.f;
    float dskip_total = 0.f, dshift_total = 0.f;
    float pick[NUMBERS + NUMBERS % 2];
#pragma unroll
    for (int n = 0; n < NUMBERS + NUMBERS % 2; n++) pick[n] = lane / 4 == n ? 1.f : 0.f;

    int t = (count - 1) / TILE * TILE, half = 0, parity = 0;
    Copier<TILE, CHANNELS, 32, ALIGNED, number, -1> copy_dy(dy, dy_step, width, lane, t), copy_x(x, x_step, width, lane, t);
    Copier<TILE, CHANNELS, 32, ALIGNED, number, -1> copy_dt(dt, dt_step, width, lane, t), copy_z(z, z_step, width, lane, t);
    Copier<TILE, RAW, 32 * WARPS, ALIGNED, coefficient, -1> copy_b(B, b_step, state_size, threadIdx.x, t);
    Copier<TILE, RAW, 32 * WARPS, ALIGNED, coefficient, -1> copy_c(C, c_step, state_size, threadIdx.x, t);
    auto prefetch = [&](int t, int half) {
        copy_dy(&w.dy[half][0][0], t, count);
        copy_x(&w.x[half][0][0], t, count);
        copy_dt(&w.dt[half][0][0], t, count);
        if constexpr (HAS_Z) copy_z(&w.z[half][0][0], t, count);
        if constexpr (B_STEP) copy_b(&s.raw_b[half][0][0], t, count);
        if constexpr (C_STEP) copy_c(&s.raw_c[half][0][0], t, count);
        commit_copies();
    };

    dx += t * channels, ddt += t * channels;
    if (HAS_Z) dz += t * channels;
    if (B_STEP) dB += t * b_groups * RAW;
    if (C_STEP) dC += t * c_groups * RAW;
    if (count > 0) {
        prefetch(t, 0);
        read_states(next, saved + t / TILE * channels * state_size, part * STATES, states, live);
    }
    for (; t >= 0 && count > 0; t -= TILE, half ^= 1) {
        // Every copy of this tile has landed, and everyone has left the last tile's B and C.
        await_copies<0>();
        __syncthreads();
        if (t > 0) prefetch(t - TILE, half ^ 1);
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            int r = first_row + i * ROW_STEP;
            float2 step = step_pair(&w.dt[half][r][pair], bias, t + r < count), value = widen_pair(&w.x[half][r][pair]);
            *(float4*)&w.steps[r][pair] = make_float4(step.x, step.x * value.x, step.y, step.y * value.y);
            *(float2*)&w.weight[r][pair] = gate_weight(widen_pair(&w.dy[half][r][pair]), &w.z[half][HAS_Z ? r : 0][pair]);
        }
        if constexpr (B_STEP) widen_rows<TILE, 32 * WARPS>(&s.b[0][0], &s.raw_b[half][0][0], threadIdx.x);
        if constexpr (C_STEP) widen_rows<TILE, 32 * WARPS>(&s.c[0][0], &s.raw_c[half][0][0], threadIdx.x);
        __syncthreads();

        // Forward: the states before each SUB steps.
        {
            Pair h[STATES];
#pragma unroll
            for (int n = 0; n < STATES; n++) h[n] = next[n];
            if (t > 0)
                read_states(next, saved + (t / TILE - 1) * channels * state_size, part * STATES, states, live);
#pragma unroll 1
            for (int sub = 0; sub < TILE / SUB; sub++) {
#pragma unroll
                for (int n = 0; n < STATES; n++) {
                    w.starts[sub][n][lane] = h[n].re;
                    if (COMPLEX) w.starts[sub][NUMBERS - STATES + n][lane] = h[n].im;
                }
                if (sub == TILE / SUB - 1) break;
#pragma unroll
                for (int i = 0; i < SUB; i++) {
                    const Step o = load_step(w, s, sub * SUB + i, column, part, false);
#pragma unroll
                    for (int n = 0; n < STATES; n++)
                        h[n] = advance(decay(o.step, a[n]), h[n], o.drive, B_STEP ? of(o.b, n) : fixed_b[n]);
                }
            }
        }

        // Backward.
#pragma unroll 1
        for (int sub = TILE / SUB - 1; sub >= 0; sub--, parity ^= 1) {
            Pair k[SUB][STATES], h[SUB][STATES], before[STATES];
#pragma unroll
            for (int n = 0; n < STATES; n++)
                before[n] = {w.starts[sub][n][lane], COMPLEX ? w.starts[sub][NUMBERS - STATES + n][lane] : 0.f};
#pragma unroll
            for (int i = 0; i < SUB; i++) {
                const Step o = load_step(w, s, sub * SUB + i, column, part, false);
#pragma unroll
                for (int n = 0; n < STATES; n++) {
                    k[i][n] = decay(o.step, a[n]);
                    h[i][n] = advance(k[i][n], i > 0 ? h[i > 0 ? i - 1 : 0][n] : before[n], o.drive, B_STEP ? of(o.b, n) : fixed_b[n]);
                }
            }
            // Operands are loaded, and sums stored, a step away from where they are used.
            Step next = load_step(w, s, sub * SUB + SUB - 1, column, part, true);
            float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int first = SUB - LANES; first >= 0; first -= LANES) {
                float read[LANES], into_drive[LANES], into_step[LANES];
                // The step that this lane finishes; its slope is ready when the sums are.
                const int r = sub * SUB + first + part;
                const float slope = SOFTPLUS ? sigmoid(widen(w.dt[half][r][column]) + own_bias) : 1.f;
#pragma unroll
                for (int j = LANES - 1; j >= 0; j--) {
                    const int i = first + j;
                    const Step o = next;
                    if (i > 0) next = load_step(w, s, sub * SUB + i - 1, column, part, true);
                    if ((B_STEP || C_STEP) && i < SUB - 1)
                        put_sums(s.sums[parity][warp][i + 1], d, lane);
                    const float weight = TWICE * o.weight;
                    float y = 0.f, p = 0.f, q_re = 0.f, q_im = 0.f, to_b[NUMBERS + 1], to_c[NUMBERS + 1];
                    to_b[NUMBERS] = to_c[NUMBERS] = 0.f;
#pragma unroll
                    for (int n = 0; n < STATES; n++) {
                        const Pair bn = B_STEP ? of(o.b, n) : fixed_b[n], cn = C_STEP ? of(o.c, n) : fixed_c[n];
                        const Pair now = h[i][n], past = i > 0 ? h[i > 0 ? i - 1 : 0][n] : before[n];
                        const Pair g = {fmaf(weight, cn.re, u[n].re), COMPLEX ? fmaf(-weight, cn.im, u[n].im) : 0.f};
                        if (HAS_Z) y = fmaf(now.re, cn.re, y);
                        p = fmaf(g.re, bn.re, p);
                        to_b[n] = o.drive * g.re, to_c[n] = weight * now.re;
                        if (COMPLEX) {
                            if (HAS_Z) y = fmaf(-now.im, cn.im, y);
                            p = fmaf(g.im, bn.im, p);
                            u[n].re = fmaf(k[i][n].re, g.re, k[i][n].im * g.im);
                            u[n].im = fmaf(k[i][n].re, g.im, -k[i][n].im * g.re);
                            const float qr = fmaf(u[n].re, past.re, u[n].im * past.im);
                            const float qi = fmaf(u[n].im, past.re, -u[n].re * past.im);
                            q_re = fmaf(a[n].re, qr, q_re);
                            q_im = fmaf(a[n].im, qi, q_im);
                            da[n].re = fmaf(o.step, qr, da[n].re);
                            da[n].im = fmaf(o.step, qi, da[n].im);
                            to_b[NUMBERS - STATES + n] = o.drive * g.im, to_c[NUMBERS - STATES + n] = -weight * now.im;
                        } else {
                            u[n].re = k[i][n].re * g.re;
                            const float qr = u[n].re * past.re;
                            q_re = fmaf(a[n].re, qr, q_re);
                            da[n].re = fmaf(o.step, qr, da[n].re);
                        }
                        if (!B_STEP) {
                            db[n].re += to_b[n];
                            if (COMPLEX) db[n].im += to_b[NUMBERS - STATES + n];
                        }
                        if (!C_STEP) {
                            dc[n].re += to_c[n];
                            if (COMPLEX) dc[n].im += to_c[NUMBERS - STATES + n];
                        }
                    }
                    if (B_STEP || C_STEP) {
#pragma unroll
                        for (int m = 0; m < 4; m++) d[m] = 0.f;
#pragma unroll
                        for (int n = 0; n < NUMBERS; n += 2) {
                            add_columns(d, to_b[n], to_c[n], to_b[n + 1], to_c[n + 1], pick[n], pick[n + 1]);
                            if (FORMAT == 0)
                                add_columns(
                                    d, rest(to_b[n]), rest(to_c[n]), rest(to_b[n + 1]), rest(to_c[n + 1]), pick[n], pick[n + 1]);
                        }
                    }
                    read[j] = y, into_drive[j] = p;
                    into_step[j] = fmaf(LN2, q_re, q_im);
                }
                // This lane has the whole sums of one step of its channel.
                const float y = HAS_Z ? TWICE * sum_parts(read, part) : 0.f;
                const float p = sum_parts(into_drive, part), q = sum_parts(into_step, part);
                const bool inside = t + r < count && live;
                const float step = w.steps[r][column].x, weight = w.weight[r][column];
                const float value = widen(w.x[half][r][column]);
                float dstep = slope * fmaf(value, p, q);
                float dgate = 0.f;
                if (HAS_Z) {
                    const float gate = widen(w.z[half][HAS_Z ? r : 0][column]), open = sigmoid(gate);
                    dgate = widen(w.dy[half][r][column]) * fmaf(skip, value, y) * open * fmaf(gate, 1.f - open, 1.f);
                }
                if (!inside) dstep = 0.f;
                dshift += dstep;
                dskip = fmaf(weight, value, dskip);
                const u32 at = r * stride + place;
                if (inside) {
                    dx[at] = round_result(fmaf(weight, skip, step * p));
                    ddt[at] = round_result(dstep);
                    if (HAS_Z) dz[at] = round_result(dgate);
                }
            }
            if (B_STEP || C_STEP) {
                put_sums(s.sums[parity][warp][0], d, lane);
                // The other buffer was read before the last barrier.
                __syncthreads();
                // One number of one step each, from all lanes of its part, of every warp.
                constexpr int EACH = QUARTERS * 4 * LANES;
#pragma unroll
                for (int first = 0; first < SUB * EACH; first += 32 * WARPS) {
                    const int i = first + threadIdx.x;
                    const int member = i % 4, quarter = i / 4 % QUARTERS, own = i / (4 * QUARTERS) % LANES, r = i / EACH;
                    const int at = sub * SUB + r, index = quarter * 2 + member % 2;
                    if (SUB * EACH % (32 * WARPS) == 0 || r < SUB) {
                        float sum = 0.f;
#pragma unroll
                        for (int v = 0; v < WARPS; v++)
#pragma unroll
                            for (int m = 0; m < CHANNELS / 4; m++)
                                sum += ((const float*)&s.sums[parity][v][r][own * (CHANNELS / 4) + m][quarter])[member];
                        const u32 to = index / STATES * WIDTH + own * STATES + index % STATES;
                        if (t + at < count && index < NUMBERS) {
                            if (B_STEP && member < 2) dB[at * (u32)(b_groups * RAW) + to] = sum * CUT;
                            if (C_STEP && member >= 2) dC[at * (u32)(c_groups * RAW) + to] = sum * CUT;
                        }
                    }
                }
            }
        }
        if (t % STRETCH == 0) {
            move_sums(da, dA + own, part * STATES, states, live);
            if (!B_STEP) move_sums(db, dB + own, part * STATES, states, live);
            if (!C_STEP) move_sums(dc, dC + own, part * STATES, states, live);
            dskip_total += dskip, dshift_total += dshift, dskip = dshift = 0.f;
        }
        dx -= TILE * channels, ddt -= TILE * channels;
        if (HAS_Z) dz -= TILE * channels;
        if (B_STEP) dB -= TILE * b_groups * RAW;
        if (C_STEP) dC -= TILE * c_groups * RAW;
    }

    if (!CHUNKED) write_states(u, dinitial + own, part * STATES, states, live);
#pragma unroll
    for (int other = CHANNELS; other < 32; other *= 2) {
        dskip_total += __shfl_xor_sync(ALL, dskip_total, other);
        dshift_total += __shfl_xor_sync(ALL, dshift_total, other);
    }
    if (part == 0 && live) {
        dD[piece * channels + channel] = dskip_total;
        dbias[piece * channels + channel] = dshift_total;
    }
}
