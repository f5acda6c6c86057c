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
    p.start = (p.piece - bounds.begin / PIECE - p.sequence) * PIECE;
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

extern "C" __global__ void __launch_bounds__(128) conv_backward(
    const number* dy, const number* dfinal, const number* x, const float* weight, const float* bias, const number* state,
    number* dx, number* dstate, float* dweight, float* dbias, const i64* offsets,
    i64 dy_row, i64 dy_step, i64 x_row, i64 x_step, i64 state_row, i64 state_step, i64 sequences, i64 length, i64 channels) {
    const Place p = locate(offsets, sequences, length, channels);
    if (!p.live) return;
    dweight += p.piece * WIDTH * channels + p.channel;
    dbias += p.piece * channels + p.channel;
    float2 w[WIDTH], dw[WIDTH], db = make_float2(0.f, 0.f);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) dw[k] = make_float2(0.f, 0.f);
    if (p.start == 0 || p.start < p.count) {
        const i64 row = PACKED ? 0 : p.sequence;
        dy += row * dy_row + p.first * dy_step + p.channel;
        x += row * x_row + p.first * x_step + p.channel;
        dx += (row * length + p.first) * channels + p.channel;
        dfinal += p.sequence * (WIDTH - 1) * channels + p.channel;
        if (state != nullptr) {
            state += p.sequence * state_row + p.channel;
            dstate += p.sequence * (WIDTH - 1) * channels + p.channel;
        }
#pragma unroll
        for (int k = 0; k < WIDTH; k++) w[k] = load_float(weight + p.channel * WIDTH + k, WIDTH);
        const float2 b = bias != nullptr ? load_float(bias + p.channel, 1) : make_float2(0.f, 0.f);
        // Inputs and gradients of the last steps, the newest last.
        float2 window[WIDTH], g[WIDTH];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) g[k] = make_float2(0.f, 0.f);
#pragma unroll
        for (int k = 0; k < WIDTH - 1; k++)
            window[k + 1] = input(x, x_step, state, state_step, p.start - (WIDTH - 1) + k, p.count);
        const i64 end = min(p.start + PIECE, p.count);
        // Outputs from `end` on belong to the next piece, but flow into this one's inputs.
        const int steps = (int)(end - p.start), more = steps + WIDTH - 1;
        for (int t = 0; t < more; t += AHEAD) {
            float2 inputs[AHEAD], outputs[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const i64 position = p.start + t + i;
                const bool inside = t + i < more && position < p.count;
                inputs[i] = inside ? load(x + position * x_step) : make_float2(0.f, 0.f);
                outputs[i] = inside ? load(dy + position * dy_step) : make_float2(0.f, 0.f);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (t + i < more) {
#pragma unroll
                    for (int k = 0; k < WIDTH - 1; k++) window[k] = window[k + 1], g[k] = g[k + 1];
                    window[WIDTH - 1] = inputs[i];
                    float2 now = outputs[i];
                    if (SILU) {
                        float2 total = b;
#pragma unroll
                        for (int k = 0; k < WIDTH; k++) total = add_product(w[k], window[k], total);
                        const float open = sigmoid(total.x), other = sigmoid(total.y);
                        now.x *= open * fmaf(total.x, 1.f - open, 1.f);
                        now.y *= other * fmaf(total.y, 1.f - other, 1.f);
                    }
                    g[WIDTH - 1] = now;
                    if (t + i < steps) {
                        db.x += now.x, db.y += now.y;
#pragma unroll
                        for (int k = 0; k < WIDTH; k++) dw[k] = add_product(now, window[k], dw[k]);
                    }
                    // What the outputs from `position` on give to it.
                    const i64 position = p.start + t + i - (WIDTH - 1);
                    if (position >= p.start || (p.start == 0 && state != nullptr)) {
                        float2 total = make_float2(0.f, 0.f);
                        const i64 kept = position - (p.count - (WIDTH - 1));
                        if (kept >= 0) total = load(dfinal + kept * channels);
#pragma unroll
                        for (int k = 0; k < WIDTH; k++) total = add_product(w[k], g[WIDTH - 1 - k], total);
                        if (position >= 0)
                            store(dx + position * channels, total);
                        else
                            store(dstate + (position + WIDTH - 1) * channels, total);
                    }
                }
        }
    }
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        dweight[k * channels] = dw[k].x;
        if (PAIR) dweight[k * channels + 1] = dw[k].y;
    }
    dbias[0] = db.x;
    if (PAIR) dbias[1] = db.y;
}
