// One token through a whole Mamba, for few sequences: one kernel, whose blocks stay on their multiprocessors from the embedding to
// the logits and meet after each product but `select`.
//
//   in      add, RMSNorm, in_proj; its rows of x go on through the convolution and SiLU
//   select  x_proj: dt's low rank, B and C
//   state   dt_proj, softplus, the state's step, the skip and the gate
//   out     out_proj
//   head    add, RMSNorm, the head
//
// What a token costs is the reading of the weights. Which of them a warp multiplies is known beforehand, so every warp asks for those
// of `in`, `out` and `head` many tiles ahead, through its part of the shared memory, across products and layers: the memory is not
// idle while blocks wait for one another, and nobody but the warp waits for what it asked for. The rest of what lies between two
// meetings is asked for before them, where it can be.
//
// These three products are tensor cores' products of 16 rows of weights with 8 columns: a sequence's vector is the sum of two or three
// columns of FORMAT, which together are nearly or wholly as precise as float32. All else is float32: what goes from block to block, vectors,
// A (times log2(e)), the residual stream, of which each block has a copy in its registers. Matrices and the convolution's state are of
// FORMAT, 1 or 2. Macros: FORMAT; ROWS sequences at most; BLOCKS, LAYERS; MODEL, INNER, STATES, RANK, WIDTH; TILES that a warp asks for
// ahead. The products and the meetings are in step_products.cuh, what lies between them is here.
#include "step_products.cuh"

// ---- The parts ----

// Adds hidden to this block's stream and leaves its norm in shared memory. Hidden is the token's embedding at first.
struct Norm {
    static constexpr int EACH = (MODEL + THREADS - 1) / THREADS;
    float scales[EACH], stream[ROWS][EACH];

    DEVICE void ask(const float* weight) {
#pragma unroll
        for (int i = 0; i < EACH; i++) scales[i] = weight[min(threadIdx.x + i * THREADS, MODEL - 1)];
    }

    DEVICE void run(const number* embedding, const i64* tokens, const float* hidden, number* vectors, float eps, int batch) {
        __shared__ float scratch[ROWS][WARPS];
        float values[ROWS][EACH];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            int row = min(r, batch - 1);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int column = min(threadIdx.x + i * THREADS, MODEL - 1);
                values[r][i] = embedding ? widen(embedding[tokens[row] * MODEL + column]) : __ldcg(hidden + row * MODEL + column);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float squares = 0.f;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                stream[r][i] = embedding ? values[r][i] : stream[r][i] + values[r][i];
                if (threadIdx.x + i * THREADS < MODEL) squares = fmaf(stream[r][i], stream[r][i], squares);
            }
            squares = sum_of_lanes<32>(squares);
            if (threadIdx.x % 32 == 0) scratch[r][threadIdx.x / 32] = squares;
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float scale = rsqrtf(sum_of_lanes<WARPS>(scratch[r][threadIdx.x % WARPS]) / MODEL + eps);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int column = threadIdx.x + i * THREADS;
                if (column < MODEL) put<MODEL>(vectors, r, column, stream[r][i] * scale * scales[i]);
            }
        }
        __syncthreads();
    }
};

DEVICE void take(const float* y, number* vectors, int batch) {
    constexpr int EACH = (INNER + THREADS - 1) / THREADS;
    float values[ROWS][EACH];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < EACH; i++) values[r][i] = __ldcg(y + min(r, batch - 1) * INNER + min(threadIdx.x + i * THREADS, INNER - 1));
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (threadIdx.x + i * THREADS < INNER) put<INNER>(vectors, r, threadIdx.x + i * THREADS, values[r][i]);
    __syncthreads();
}

// What a row of in_proj is finished with: for those of x, the convolution.
struct In {
    float taps[WIDTH], before[WIDTH], shift, conv_shift;

    DEVICE void ask(const Layer& layer, int row, int sequence, int batch) {
        if (row >= 2 * INNER) return;
        shift = layer.in_bias ? layer.in_bias[row] : 0.f;
        if (row >= INNER) return;
        const number* past = layer.past + min(sequence, batch - 1) * (i64)(WIDTH - 1) * INNER + row;
        conv_shift = layer.conv_bias ? layer.conv_bias[row] : 0.f;
#pragma unroll
        for (int tap = 0; tap < WIDTH; tap++) {
            taps[tap] = layer.taps[tap * INNER + row];
            if (tap < WIDTH - 1) before[tap] = widen(past[tap * INNER]);
        }
    }

    DEVICE void finish(const Layer& layer, int row, int sequence, float value, const Between& between) {
        value += shift;
        if (row >= INNER) {
            between.z[sequence * INNER + row - INNER] = value;
            return;
        }
        number* past = layer.past + sequence * (i64)(WIDTH - 1) * INNER + row;
        before[WIDTH - 1] = value;
        float total = conv_shift;
#pragma unroll
        for (int tap = 0; tap < WIDTH; tap++) {
            total = fmaf(taps[tap], before[tap], total);
            if (tap < WIDTH - 1) past[tap * INNER] = narrow(before[tap + 1]);
        }
        between.x[sequence * INNER + row] = silu(total);
    }
};

// x_proj: a block for a row, whose threads share the columns.
struct Select {
    static constexpr int CHUNKS = INNER / PER, EACH = (CHUNKS + THREADS - 1) / THREADS;
    static constexpr int OWN = (SELECTED + BLOCKS - 1) / BLOCKS;  // rows of a block
    static constexpr int HELD = OWN * EACH <= 8 && OWN * ROWS <= 32 ? OWN : 1;  // of which so many are taken at a time
    uint4 weights[HELD][EACH];

    DEVICE void ask(const Layer& layer, int first) {
#pragma unroll
        for (int h = 0; h < HELD; h++)
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int row = min(first + h * BLOCKS, SELECTED - 1), index = min(threadIdx.x + i * THREADS, CHUNKS - 1);
                weights[h][i] = read(layer.x_proj + (i64)row * INNER + index * PER);
            }
    }

    DEVICE void run(const Layer& layer, const Between& between, int batch) {
        __shared__ float scratch[HELD][ROWS][WARPS];
        for (int first = blockIdx.x; first < SELECTED; first += HELD * BLOCKS) {
            if (first != blockIdx.x) ask(layer, first);
            float sums[HELD][ROWS] = {};
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    int index = threadIdx.x + i * THREADS;
                    bool live = index < CHUNKS;
                    const float4* x = (const float4*)(between.x + min(r, batch - 1) * INNER + min(index, CHUNKS - 1) * PER);
#pragma unroll
                    for (int part = 0; part < PER / 4; part++) {
                        float4 four = __ldcg(x + part);
                        if (!live) four = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                        for (int h = 0; h < HELD; h++) {
                            sums[h][r] = fmaf(get(weights[h][i], 4 * part), four.x, sums[h][r]);
                            sums[h][r] = fmaf(get(weights[h][i], 4 * part + 1), four.y, sums[h][r]);
                            sums[h][r] = fmaf(get(weights[h][i], 4 * part + 2), four.z, sums[h][r]);
                            sums[h][r] = fmaf(get(weights[h][i], 4 * part + 3), four.w, sums[h][r]);
                        }
                    }
                }
#pragma unroll
            for (int h = 0; h < HELD; h++)
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    float sum = sum_of_lanes<32>(sums[h][r]);
                    if (threadIdx.x % 32 == 0) scratch[h][r][threadIdx.x / 32] = sum;
                }
            __syncthreads();
            // Sixteen lanes for each row of each sequence.
            int task = threadIdx.x / WARPS, h = task / ROWS, r = task % ROWS, row = first + h * BLOCKS;
            if (threadIdx.x / 32 * 2 < HELD * ROWS) {
                float sum = sum_of_lanes<16>(scratch[min(h, HELD - 1)][r][threadIdx.x % WARPS]);
                if (h < HELD && row < SELECTED && r < batch && threadIdx.x % WARPS == 0) send(between.selected + r * SELECTED + row, sum, between.number);
            }
            if (OWN > HELD) __syncthreads();
        }
    }
};
static_assert(Select::HELD * ROWS <= THREADS / WARPS, "a group of lanes for each sum");

// Sixteen lanes have a channel: each a part of dt's row, and some of the states.
struct Step {
    static constexpr int LANES = 16, EACH = (STATES + LANES - 1) / LANES;
    static constexpr int CHUNKS = RANK / PER, PARTS_OF_RANK = (CHUNKS + LANES - 1) / LANES;
    uint4 weights[PARTS_OF_RANK];
    float decay[EACH], before[ROWS][EACH], shift, skip;

    static DEVICE int first() { return (blockIdx.x * THREADS + threadIdx.x) / LANES; }

    DEVICE void ask(const Layer& layer, int channel, int batch) {
        channel = min(channel, INNER - 1);
        int lane = threadIdx.x % LANES;
#pragma unroll
        for (int i = 0; i < PARTS_OF_RANK; i++)
            if (lane + i * LANES < CHUNKS) weights[i] = read(layer.dt_proj + (i64)channel * RANK + (lane + i * LANES) * PER);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int n = lane * EACH + i;
            decay[i] = n < STATES ? layer.A[channel * STATES + n] : 0.f;
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                before[r][i] = r < batch && n < STATES ? layer.state[((i64)r * INNER + channel) * STATES + n] : 0.f;
        }
        shift = layer.dt_bias[channel], skip = layer.D ? layer.D[channel] : 0.f;
    }

    DEVICE void run(const Layer& layer, const Between& between, int batch) {
        // Everyone reads it: once from the second cache, then from here.
        __shared__ __align__(16) float selected[ROWS][(SELECTED + 3) / 4 * 4];
        for (int index = threadIdx.x; index < batch * SELECTED; index += THREADS)
            selected[index / SELECTED][index % SELECTED] = receive(between.selected + index, between.number);
        float u[ROWS], gate[ROWS];
        meet(between, first(), batch, u, gate);
        __syncthreads();
        int lane = threadIdx.x % LANES;
        // Neighbouring groups of lanes end together, so that sums find all lanes of a warp.
        for (int channel = first(); channel - (int)(threadIdx.x % 32) / LANES < INNER; channel += BLOCKS * THREADS / LANES) {
            if (channel != first()) ask(layer, channel, batch), meet(between, channel, batch, u, gate);
            bool live = channel < INNER;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (r >= batch) break;
                float dt = 0.f, sum = 0.f;
#pragma unroll
                for (int i = 0; i < PARTS_OF_RANK; i++) {
                    if (lane + i * LANES >= CHUNKS) continue;
#pragma unroll
                    for (int j = 0; j < PER; j++) dt = fmaf(get(weights[i], j), selected[r][(lane + i * LANES) * PER + j], dt);
                }
                dt = softplus(sum_of_lanes<LANES>(dt) + shift);
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    int n = lane * EACH + i;
                    if (n >= STATES) continue;
                    float h = fmaf(exp2_fast(dt * decay[i]), before[r][i], dt * u[r] * selected[r][RANK + n]);
                    if (live) layer.state[((i64)r * INNER + channel) * STATES + n] = h;
                    sum = fmaf(h, selected[r][RANK + STATES + n], sum);
                }
                sum = fmaf(skip, u[r], sum_of_lanes<LANES>(sum));
                if (live && lane == 0) between.y[r * INNER + channel] = sum * silu(gate[r]);
            }
        }
    }

    DEVICE void meet(const Between& between, int channel, int batch, float (&u)[ROWS], float (&gate)[ROWS]) {
        channel = min(channel, INNER - 1);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            int row = min(r, batch - 1);
            u[r] = __ldcg(between.x + row * INNER + channel), gate[r] = __ldcg(between.z + row * INNER + channel);
        }
    }
};

// tokens (batch,), the layers' addresses, room between products, the meetings' count, to logits (batch, vocabulary).
extern "C" __global__ void __launch_bounds__(THREADS, 1) step(
    const i64* tokens, const Layer* table, const number* embedding, const float* norm, const number* head, const float* head_bias,
    float* hidden, float* x, float* z, Message* selected, float* y, float* logits, unsigned long long* count, i64 batch_size,
    i64 vocabulary, i64 layer_eps, i64 head_eps) {
    number* vectors = (number*)shared;
    float* partial = (float*)(vectors + VECTORS);
    uint4* ring = (uint4*)(partial + PARTIAL);
    Layer* layers = (Layer*)(ring + WARPS * TILES * TILE);
    for (int i = threadIdx.x; i < LAYERS * sizeof(Layer) / 8; i += THREADS) ((i64*)layers)[i] = ((const i64*)table)[i];
    __syncthreads();
    int batch = (int)batch_size, sequence, first_row = Ahead::row_of_thread<MODEL>(0, sequence);
    Ahead ahead(layers, head, (int)vocabulary, ring + threadIdx.x / 32 * (TILES * TILE));
    Meeting meeting(count);
    Between between = {hidden, x, z, selected, y, meeting.past()};
    Norm add_norm;
    for (int index = 0; index < LAYERS; index++) {
        const Layer& layer = layers[index];
        add_norm.ask(layer.norm);
        In in;
        in.ask(layer, first_row, sequence, batch);
        if (index) meeting.wait();
        add_norm.run(index ? nullptr : embedding, tokens, hidden, vectors, __int_as_float((int)layer_eps), batch);
        between.number++;
        ahead.product<MODEL>(vectors, partial, 2 * INNER, [&](int row, int sequence, float value, bool first) {
            if (sequence >= batch) return;
            if (!first) in.ask(layer, row, sequence, batch);
            in.finish(layer, row, sequence, value, between);
        });
        meeting.arrive();
        Select select;
        select.ask(layer, blockIdx.x);
        Step step;
        step.ask(layer, Step::first(), batch);
        meeting.wait();
        select.run(layer, between, batch);
        // No meeting: everyone waits for the few numbers themselves. Nobody writes to what is still read, before the next one.
        step.run(layer, between, batch);
        meeting.arrive();
        meeting.wait();
        take(y, vectors, batch);
        ahead.product<INNER>(vectors, partial, MODEL, [&](int row, int sequence, float value, bool) {
            if (sequence < batch) hidden[sequence * MODEL + row] = value + (layer.out_bias ? layer.out_bias[row] : 0.f);
        });
        meeting.arrive();
    }
    add_norm.ask(norm);
    meeting.wait();
    add_norm.run(nullptr, tokens, hidden, vectors, __int_as_float((int)head_eps), batch);
    ahead.product<MODEL>(vectors, partial, (int)vocabulary, [&](int row, int sequence, float value, bool) {
        if (sequence < batch) logits[sequence * vocabulary + row] = value + (head_bias ? head_bias[row] : 0.f);
    });
}
