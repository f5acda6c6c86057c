// One token through a whole Mamba, for few sequences: one kernel, whose blocks stay on their multiprocessors from the embedding to
// the logits and meet after each product.
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
// ahead.
#define PACKED 0
#include "../cuda_common.cuh"

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int PER = 8;                                     // numbers of a chunk, which is what a lane moves at a time
constexpr int PARTS = ROWS <= 2 ? 3 : 2;                    // columns of a sequence
constexpr int COLUMNS = ROWS * PARTS;
constexpr int WIDEST = MODEL > INNER ? MODEL : INNER;
constexpr int SELECTED = RANK + 2 * STATES;
constexpr int TOGETHER = 4;                                // groups of 16 rows whose sums are brought together at once
constexpr int SHARE = THREADS / (16 * TOGETHER * ROWS);    // threads that bring a sum together
constexpr int TILE = 16 * 64 / PER;                        // chunks of a tile
static_assert(ROWS <= 4, "columns of all parts must fit into 8");
static_assert(MODEL % 256 == 0 && INNER % 256 == 0 && RANK % PER == 0, "tiles are 64 columns wide, and shared by 4 warps at least");

struct Layer {
    const float* norm;
    const number* in_proj;
    const float *in_bias, *taps, *conv_bias;  // taps (WIDTH, INNER)
    const number *x_proj, *dt_proj;
    const float *dt_bias, *A, *D;
    const number* out_proj;
    const float* out_bias;
    number* past;  // (batch, WIDTH - 1, INNER)
    float* state;  // (batch, INNER, STATES)
};

// (batch, ...) float32, written by all blocks and read by all.
struct Between {
    float *hidden, *x, *z, *selected, *y;
};

// How the warps of a block share a product of rows of `COUNT` numbers: teams take groups of 16 rows, warps of a team take tiles.
template <int COUNT>
struct Sharing {
    static constexpr int TILES_OF_ROW = COUNT / 64;
    static constexpr int TEAM = TILES_OF_ROW % 16 == 0 ? 16 : TILES_OF_ROW % 8 == 0 ? 8 : 4;
    static constexpr int EACH = TILES_OF_ROW / TEAM;  // tiles of a warp
    static constexpr int TEAMS = WARPS / TEAM;
    static constexpr int ROUNDS = TOGETHER / TEAMS;  // groups of a team whose sums are brought together at once
};

// Numbers between columns in shared memory: an odd number of 64 bytes, so that the lanes of a tile meet no bank twice.
__host__ __device__ constexpr int spaced(int count) { return (count + 63) / 64 * 64 + 32; }

constexpr int VECTORS = COLUMNS * spaced(WIDEST);
constexpr int PARTIAL = TOGETHER * 16 * 16 * COLUMNS;  // the most partial sums: of a team of 16
extern "C" __device__ const u32 step_bytes =
    VECTORS * sizeof(number) + PARTIAL * sizeof(float) + WARPS * TILES * TILE * 16 + LAYERS * sizeof(Layer);
extern __shared__ __align__(16) unsigned char shared[];

DEVICE float get(const uint4& chunk, int index) { return widen(((const number*)&chunk)[index]); }

DEVICE float silu(float x) { return x * sigmoid(x); }

template <int LANES>
DEVICE float sum_of_lanes(float value) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

// Weights that are read once, straight to registers.
DEVICE uint4 read(const number* at) {
    uint4 out;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(at));
    return out;
}

// sums += 16 rows of a times 8 columns of b, over 16 numbers.
DEVICE void multiply(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if FORMAT == 1
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// All blocks meet; what they have written before is seen by all behind. `meeting` never starts again: a launch adds a multiple of
// the number of blocks.
struct Meeting {
    unsigned long long *count, target;

    DEVICE explicit Meeting(unsigned long long* count) : count(count), target(0) {
        if (threadIdx.x == 0) {
            unsigned long long now = *(volatile unsigned long long*)count;
            target = now - now % BLOCKS;
        }
    }

    DEVICE void arrive() {
        __syncthreads();
        if (threadIdx.x == 0) {
            target += BLOCKS;
            asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(count) : "memory");
        }
    }

    DEVICE void wait() {
        if (threadIdx.x == 0) {
            unsigned long long now;
            do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(count) : "memory");
            while (now < target);
        }
        __syncthreads();
    }
};

// ---- The vectors of a product, in shared memory ----

// Column `PARTS * sequence + part` has the part of the sequence's vector that the parts before leave.
template <int COUNT>
DEVICE void put(number* vectors, int sequence, int index, float value) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        number rounded = narrow(value);
        vectors[(sequence * PARTS + part) * spaced(COUNT) + index] = rounded;
        value -= widen(rounded);
    }
}

// ---- The weights that are asked for ahead ----

// A warp's way through its tiles (16 rows of 64 columns) of all `in`, `out` and `head`. In the shared memory a row of a tile is 8 chunks,
// and every other row has its halves the other way round: the lanes that read together meet no bank twice.
struct Ahead {
    const Layer* layers;
    const number *head, *matrix;
    int vocabulary, layer, rows, group, tile, slot;
    bool is_out;
    uint4* ring;

    DEVICE Ahead(const Layer* layers, const number* head, int vocabulary, uint4* ring)
        : layers(layers), head(head), vocabulary(vocabulary), layer(0), slot(0), is_out(false), ring(ring) {
        open();
        for (int i = 0; i < TILES; i++) ask();
    }

    template <int COUNT>
    static DEVICE int first_group() {
        using S = Sharing<COUNT>;
        return blockIdx.x * S::TEAMS + threadIdx.x / 32 / S::TEAM;
    }

    // Where in a tile a chunk of a row lies.
    static DEVICE int place(int row, int chunk) { return 8 * row + (chunk ^ row % 2 * 4); }

    // Stands before the first group of a product.
    DEVICE void open() {
        bool last = layer >= LAYERS;
        matrix = last ? head : is_out ? layers[layer].out_proj : layers[layer].in_proj;
        rows = last ? vocabulary : is_out ? MODEL : 2 * INNER;
        group = is_out ? first_group<INNER>() : first_group<MODEL>();
        tile = 0;
    }

    template <int COUNT>
    DEVICE void ask_in() {
        using S = Sharing<COUNT>;
        int lane = threadIdx.x % 32, column = (threadIdx.x / 32 % S::TEAM * S::EACH + tile) * 64 + lane % 8 * PER;
        u32 to = (u32)__cvta_generic_to_shared(ring + slot * TILE);
#pragma unroll
        for (int part = 0; part < 4; part++) {
            int row = 4 * part + lane / 8;
            const number* from = matrix + (i64)min(16 * group + row, rows - 1) * COUNT + column;
            asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to + 16 * place(row, lane % 8)), "l"(from) : "memory");
        }
        if (++tile == S::EACH) tile = 0, group += BLOCKS * S::TEAMS;
    }

    // Asks for the next tile, to where the oldest was. There is a commit for every call, be it empty.
    DEVICE void ask() {
        // Few products have no group for a warp; one does not follow another.
        while (16 * group >= rows && layer < LAYERS) {
            if (is_out) layer++;
            is_out = !is_out && layer < LAYERS;
            open();
        }
        if (16 * group < rows) {
            if (is_out)
                ask_in<INNER>();
            else
                ask_in<MODEL>();
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        slot = slot + 1 == TILES ? 0 : slot + 1;
    }

    // The product of the matrix that is next with the vectors: finish(row, sequence, value, first) in one thread for each. `first`:
    // of the rows that this thread finishes, this is the first. All threads of a block take part.
    template <int COUNT, typename Finish>
    DEVICE void product(const number* vectors, float* partial, int rows, Finish finish) {
        using S = Sharing<COUNT>;
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const uint4* own = (const uint4*)(vectors + min(lane / 4, COLUMNS - 1) * spaced(COUNT) + lane % 4 * PER) + warp % S::TEAM * S::EACH * 8;
        for (int start = 0; 16 * (start + (int)blockIdx.x) * S::TEAMS < rows; start += BLOCKS * S::ROUNDS) {
#pragma unroll
            for (int round = 0; round < S::ROUNDS; round++) {
                if (16 * (start * S::TEAMS + round * BLOCKS * S::TEAMS + first_group<COUNT>()) >= rows) break;
                float even[4] = {}, odd[4] = {};
#pragma unroll 1
                for (int tile = 0; tile < S::EACH; tile++) {
                    asm volatile("cp.async.wait_group %0;" ::"n"(TILES - 1) : "memory");
                    __syncwarp();
                    const uint4* from = ring + slot * TILE;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint4 top = from[place(lane / 4, 4 * half + lane % 4)], bottom = from[place(lane / 4 + 8, 4 * half + lane % 4)];
                        uint4 vector = own[8 * tile + 4 * half];
                        multiply(even, top.x, bottom.x, top.y, bottom.y, vector.x, vector.y);
                        multiply(odd, top.z, bottom.z, top.w, bottom.w, vector.z, vector.w);
                    }
                    __syncwarp();
                    ask();
                }
                float* at = partial + ((round * WARPS + warp) * 16 + lane / 4) * COLUMNS + lane % 4 * 2;
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (lane % 4 * 2 + i < COLUMNS) at[8 * half * COLUMNS + i] = even[2 * half + i] + odd[2 * half + i];
            }
            __syncthreads();
            int sequence, row = row_of_thread<COUNT>(start, sequence);
            int which = threadIdx.x / SHARE / (16 * ROWS), round = which / S::TEAMS, team = which % S::TEAMS;
            float sum = 0.f;
            if (row < rows) {
                const float* at = partial + ((round * WARPS + team * S::TEAM) * 16 + row % 16) * COLUMNS + sequence * PARTS;
#pragma unroll
                for (int other = 0; other < S::TEAM; other += SHARE)
#pragma unroll
                    for (int part = 0; part < PARTS; part++) {
                        int from = other + threadIdx.x % SHARE;
                        if (S::TEAM >= SHARE || from < S::TEAM) sum += at[from * 16 * COLUMNS + part];
                    }
            }
            sum = sum_of_lanes<SHARE>(sum);
            if (row < rows && threadIdx.x % SHARE == 0) finish(row, sequence, sum, start == 0);
            __syncthreads();
        }
    }

    // The row and the sequence that a thread finishes of the groups from `start` on.
    template <int COUNT>
    static DEVICE int row_of_thread(int start, int& sequence) {
        using S = Sharing<COUNT>;
        int sum = threadIdx.x / SHARE, which = sum / (16 * ROWS), round = which / S::TEAMS, team = which % S::TEAMS;
        sequence = sum % ROWS;
        return 16 * ((start + round * BLOCKS + blockIdx.x) * S::TEAMS + team) + sum / ROWS % 16;
    }
};

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
                if (h < HELD && row < SELECTED && r < batch && threadIdx.x % WARPS == 0) between.selected[r * SELECTED + row] = sum;
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
            selected[index / SELECTED][index % SELECTED] = __ldcg(between.selected + index);
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
    float* hidden, float* x, float* z, float* selected, float* y, float* logits, unsigned long long* count, i64 batch_size,
    i64 vocabulary, i64 layer_eps, i64 head_eps) {
    number* vectors = (number*)shared;
    float* partial = (float*)(vectors + VECTORS);
    uint4* ring = (uint4*)(partial + PARTIAL);
    Layer* layers = (Layer*)(ring + WARPS * TILES * TILE);
    for (int i = threadIdx.x; i < LAYERS * sizeof(Layer) / 8; i += THREADS) ((i64*)layers)[i] = ((const i64*)table)[i];
    __syncthreads();
    int batch = (int)batch_size, sequence, first_row = Ahead::row_of_thread<MODEL>(0, sequence);
    Between between = {hidden, x, z, selected, y};
    Ahead ahead(layers, head, (int)vocabulary, ring + threadIdx.x / 32 * (TILES * TILE));
    Meeting meeting(count);
    Norm add_norm;
    for (int index = 0; index < LAYERS; index++) {
        const Layer& layer = layers[index];
        add_norm.ask(layer.norm);
        In in;
        in.ask(layer, first_row, sequence, batch);
        if (index) meeting.wait();
        add_norm.run(index ? nullptr : embedding, tokens, hidden, vectors, __int_as_float((int)layer_eps), batch);
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
        meeting.arrive();
        meeting.wait();
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
