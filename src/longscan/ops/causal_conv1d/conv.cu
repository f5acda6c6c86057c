// The causal convolution, forward and backward. A thread owns two neighbouring channels of one piece of a sequence and walks
// its steps with the last WIDTH inputs in registers, so that every input is read once (and WIDTH - 1 more a piece).
//
// Backward, with g[t] the gradient of the filter's output before the activation,
//
//     dx[p] = sum_k w[k] g[p + WIDTH - 1 - k],    dw[k] = sum_t g[t] x[t - WIDTH + 1 + k],    dbias = sum_t g[t]
//
// a thread walks on for WIDTH - 1 steps after its piece, whose g its last inputs need. Positions before the sequence belong to
// the initial state, and the last WIDTH - 1 positions (the state's own, in a short sequence) to the final one.
//
// Macros: FORMAT, PACKED (cuda_common.cuh), WIDTH, SILU, PIECE (steps), PAIR (1 where two channels can be moved at once).
#include "../cuda_common.cuh"

constexpr int EACH = PAIR ? 2 : 1;   // channels of a thread
constexpr int AHEAD = 8;             // loads under way

DEVICE float2 load(const number* at) {
    if constexpr (PAIR)
        return widen_pair(at);
    else
        return make_float2(widen(*at), 0.f);
}

DEVICE void store(number* at, float2 value) {
    if constexpr (PAIR)
        store_pair_if(true, at, value);
    else
        *at = narrow(value.x);
}

DEVICE float2 load_float(const float* at, i64 apart) { return make_float2(at[0], PAIR ? at[apart] : 0.f); }

DEVICE float2 add_product(float2 a, float2 b, float2 c) { return make_float2(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)); }

struct Place {
    i64 piece, sequence, first, count, start, channel;
    bool live;
};

DEVICE Place locate(const i64* offsets, i64 sequences, i64 length, i64 channels) {
    Place p;
    const i64 across = (channels / EACH + 127) / 128;
    p.piece = blockIdx.x / across;
    p.channel = (blockIdx.x % across * 128 + threadIdx.x) * EACH;
    p.live = p.channel < channels;
    p.sequence = sequence_of_piece(p.piece, offsets, sequences, length, PIECE);
    const Sequence bounds = sequence_bounds(offsets, p.sequence, length);
    p.first = bounds.first, p.count = bounds.count;
    p.start = (p.piece - first_piece(offsets, p.sequence, length, PIECE)) * PIECE;
    return p;
}

// The input at a position, from the initial state (null: zeros) before the sequence.
DEVICE float2 input(const number* x, i64 x_step, const number* state, i64 state_step, i64 position, i64 count) {
    if (position >= count) return make_float2(0.f, 0.f);
    if (position >= 0) return load(x + position * x_step);
    return state != nullptr ? load(state + (position + WIDTH - 1) * state_step) : make_float2(0.f, 0.f);
}

extern "C" __global__ void __launch_bounds__(128) conv_forward(
    const number* x, const float* weight, const float* bias, const number* state, number* y, number* final,
    const i64* offsets, i64 x_row, i64 x_step, i64 state_row, i64 state_step, i64 sequences, i64 length, i64 channels) {
    const Place p = locate(offsets, sequences, length, channels);
    if (!p.live || (p.start > 0 && p.start >= p.count)) return;
    const i64 row = PACKED ? 0 : p.sequence;
    x += row * x_row + p.first * x_step + p.channel;
    y += (row * length + p.first) * channels + p.channel;
    if (state != nullptr) state += p.sequence * state_row + p.channel;
    float2 w[WIDTH], window[WIDTH];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) w[k] = load_float(weight + p.channel * WIDTH + k, WIDTH);
    const float2 b = bias != nullptr ? load_float(bias + p.channel, 1) : make_float2(0.f, 0.f);
#pragma unroll
    for (int k = 0; k < WIDTH - 1; k++)
        window[k + 1] = input(x, x_step, state, state_step, p.start - (WIDTH - 1) + k, p.count);
    const int steps = (int)min((i64)PIECE, p.count - p.start);
    const number* from = x + p.start * x_step;
    number* to = y + p.start * channels;
    for (int t = 0; t < steps; t += AHEAD) {
        float2 next[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            next[i] = t + i < steps ? load(from + (t + i) * x_step) : make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (t + i < steps) {
#pragma unroll
                for (int k = 0; k < WIDTH - 1; k++) window[k] = window[k + 1];
                window[WIDTH - 1] = next[i];
                float2 total = b;
#pragma unroll
                for (int k = 0; k < WIDTH; k++) total = add_product(w[k], window[k], total);
                if (SILU) total = make_float2(total.x * sigmoid(total.x), total.y * sigmoid(total.y));
                store(to + (t + i) * channels, total);
            }
    }
    if (p.start + PIECE >= p.count) {
        // The sequence ends here, and the window holds its last inputs.
        final += p.sequence * (WIDTH - 1) * channels + p.channel;
#pragma unroll
        for (int k = 0; k < WIDTH - 1; k++) store(final + k * channels, window[k + 1]);
    }
}

// What a thread of the backward pass has: the filter, its gradients, and inputs and gradients of the last steps, the newest last.
struct Filter {
    float2 w[WIDTH], b, dw[WIDTH], db, window[WIDTH], g[WIDTH];

    // The step of the filter's output whose newest input is `x`; `counts`: it is one of this piece.
    DEVICE void step(float2 x, float2 dy, bool counts) {
#pragma unroll
        for (int k = 0; k < WIDTH - 1; k++) window[k] = window[k + 1], g[k] = g[k + 1];
        window[WIDTH - 1] = x;
        if (SILU) {
            float2 total = b;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) total = add_product(w[k], window[k], total);
            const float open = sigmoid(total.x), other = sigmoid(total.y);
            dy.x *= open * fmaf(total.x, 1.f - open, 1.f);
            dy.y *= other * fmaf(total.y, 1.f - other, 1.f);
        }
        g[WIDTH - 1] = dy;
        if (counts) {
            db.x += dy.x, db.y += dy.y;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) dw[k] = add_product(dy, window[k], dw[k]);
        }
    }

    // What the outputs of the last WIDTH steps give to the input of the first of them, besides `total`.
    DEVICE float2 into_input(float2 total) const {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) total = add_product(w[k], g[WIDTH - 1 - k], total);
        return total;
    }
};

// A whole piece, whose sequence neither starts with a state of its own nor ends soon: nothing to look out for, and always the next
// AHEAD steps under way. x, dy and dx lie at the piece's first step.
DEVICE void walk_inside(Filter& f, const number* x, const number* dy, number* dx, i64 x_step, i64 dy_step, i64 channels) {
    static_assert(PIECE % AHEAD == 0 && WIDTH - 1 <= AHEAD, "the steps behind the piece are those of one turn");
    float2 inputs[AHEAD], outputs[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) inputs[i] = load(x + i * x_step), outputs[i] = load(dy + i * dy_step);
    dx -= (WIDTH - 1) * channels;
#pragma unroll 1
    for (int t = 0; t < PIECE; t += AHEAD) {
        float2 in[AHEAD], out[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) in[i] = inputs[i], out[i] = outputs[i];
        x += AHEAD * x_step, dy += AHEAD * dy_step;
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (i < WIDTH - 1 || t + AHEAD < PIECE) inputs[i] = load(x + i * x_step), outputs[i] = load(dy + i * dy_step);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            f.step(in[i], out[i], true);
            // The first inputs of the window belong to the piece before.
            const float2 total = f.into_input(make_float2(0.f, 0.f));
            if (PAIR)
                store_pair_if(t + i >= WIDTH - 1, dx + i * channels, total);
            else
                store_if(t + i >= WIDTH - 1, dx + i * channels, total.x);
        }
        dx += AHEAD * channels;
    }
#pragma unroll
    for (int i = 0; i < WIDTH - 1; i++) {
        f.step(inputs[i], outputs[i], false);
        store(dx + i * channels, f.into_input(make_float2(0.f, 0.f)));
    }
}

extern "C" __global__ void __launch_bounds__(128) conv_backward(
    const number* dy, const number* dfinal, const number* x, const float* weight, const float* bias, const number* state,
    number* dx, number* dstate, float* dweight, float* dbias, const i64* offsets, i64 dy_row, i64 dy_step, i64 x_row, i64 x_step,
    i64 state_row, i64 state_step, i64 dx_row, i64 dx_step, i64 sequences, i64 length, i64 channels) {
    const Place p = locate(offsets, sequences, length, channels);
    if (!p.live) return;
    dweight += p.piece * WIDTH * channels + p.channel;
    dbias += p.piece * channels + p.channel;
    Filter f;
    f.db = make_float2(0.f, 0.f);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) f.dw[k] = make_float2(0.f, 0.f);
    if (p.start == 0 || p.start < p.count) {
        const i64 row = PACKED ? 0 : p.sequence;
        dy += row * dy_row + p.first * dy_step + p.channel;
        x += row * x_row + p.first * x_step + p.channel;
        dx += row * dx_row + p.first * dx_step + p.channel;
        if (dfinal != nullptr) dfinal += p.sequence * (WIDTH - 1) * channels + p.channel;
        if (state != nullptr) {
            state += p.sequence * state_row + p.channel;
            dstate += p.sequence * (WIDTH - 1) * channels + p.channel;
        }
        f.b = bias != nullptr ? load_float(bias + p.channel, 1) : make_float2(0.f, 0.f);
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
            f.w[k] = load_float(weight + p.channel * WIDTH + k, WIDTH);
            f.g[k] = make_float2(0.f, 0.f);
            if (k < WIDTH - 1) f.window[k + 1] = input(x, x_step, state, state_step, p.start - (WIDTH - 1) + k, p.count);
        }
        const i64 end = min(p.start + PIECE, p.count);
        // Outputs from `end` on belong to the next piece, but flow into this one's inputs.
        const int steps = (int)(end - p.start), more = steps + WIDTH - 1;
        const bool starts = p.start == 0 && state != nullptr;
        if (!starts && steps == PIECE && end + WIDTH - 1 <= p.count) {
            walk_inside(f, x + p.start * x_step, dy + p.start * dy_step, dx + p.start * dx_step, x_step, dy_step, dx_step);
        } else {
#pragma unroll 1
            for (int t = 0; t < more; t++) {
                const i64 newest = p.start + t;
                const bool inside = newest < p.count;
                f.step(
                    inside ? load(x + newest * x_step) : make_float2(0.f, 0.f),
                    inside ? load(dy + newest * dy_step) : make_float2(0.f, 0.f), t < steps);
                const i64 position = newest - (WIDTH - 1);
                if (position >= p.start || starts) {
                    const i64 kept = position - (p.count - (WIDTH - 1));
                    const bool flows = kept >= 0 && dfinal != nullptr;
                    const float2 total = f.into_input(flows ? load(dfinal + kept * channels) : make_float2(0.f, 0.f));
                    if (position >= 0)
                        store(dx + position * dx_step, total);
                    else
                        store(dstate + (position + WIDTH - 1) * channels, total);
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        dweight[k * channels] = f.dw[k].x;
        if (PAIR) dweight[k * channels + 1] = f.dw[k].y;
    }
    dbias[0] = f.db.x;
    if (PAIR) dbias[1] = f.db.y;
}
