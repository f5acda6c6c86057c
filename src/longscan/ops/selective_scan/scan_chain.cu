// Chains the chunks of each sequence: borders[c + 1] = exp(A sums[c]) borders[c] + local[c], one thread per number of state.
//
// The first border is `edge` (null: zero), and where the value past the last chunk is left. With REVERSE the chain runs
// from the last chunk to the first with the conjugate decay: that is how gradients flow.
#include "scan_common.cuh"

extern "C" __global__ void __launch_bounds__(128) scan_chain(
    const float* local, const float* sums, const float* A, float* borders, const float* edge, float* last,
    const i64* offsets, i64 sequences, i64 length, i64 channels, i64 states, i64 span) {
    const i64 index = (i64)blockIdx.x * 128 + threadIdx.x, row = channels * states;
    if (index >= sequences * row) return;
    const i64 sequence = index / row, within = index % row, channel = within / states;
    const Sequence bounds = sequence_bounds(offsets, sequence, length);
    const i64 pieces = (bounds.count + span - 1) / span, first = first_piece(offsets, sequence, length, span);
    Pair a = {A[within * PLANES] * LOG2E, COMPLEX ? A[within * PLANES + PLANES - 1] : 0.f};
    if (REVERSE) a.im = -a.im;
    Pair h = {0.f, 0.f};
    if (edge != nullptr) {
        h.re = edge[index * PLANES];
        if (COMPLEX) h.im = edge[index * PLANES + PLANES - 1];
    }
    constexpr int AHEAD = 8;
    for (i64 done = 0; done < pieces; done += AHEAD) {
        // Loads that do not wait for one another.
        Pair add[AHEAD];
        float step[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            bool inside = done + i < pieces;
            i64 piece = inside ? (REVERSE ? first + pieces - 1 - done - i : first + done + i) : first;
            const float* at = local + (piece * row + within) * PLANES;
            add[i] = {inside ? at[0] : 0.f, COMPLEX && inside ? at[PLANES - 1] : 0.f};
            step[i] = inside ? sums[piece * channels + channel] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (done + i < pieces) {
                i64 piece = REVERSE ? first + pieces - 1 - done - i : first + done + i;
                float* to = borders + (piece * row + within) * PLANES;
                to[0] = h.re;
                if (COMPLEX) to[PLANES - 1] = h.im;
                h = advance(decay(step[i], a), h, 1.f, add[i]);
            }
    }
    last[index * PLANES] = h.re;
    if (COMPLEX) last[index * PLANES + PLANES - 1] = h.im;
}
