// What the parts of step.cu stand on: how a model lies in memory, how blocks meet, and the products of `in`, `out` and `head` with the
// weights that are asked for ahead. Macros and terms: step.cu.
#pragma once
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

// A float32, and above it the number of the layer it is of, which is never the same again: whoever reads it sees whether it has come.
typedef unsigned long long Message;

// (batch, ...) float32, written by all blocks and read by all; a message where they do not meet in between, which has the number.
struct Between {
    float *hidden, *x, *z;
    Message* selected;
    float* y;
    u32 number;
};

DEVICE void send(Message* to, float value, u32 number) {
    Message message = (Message)number << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(message) : "memory");
}

// Waits for it.
DEVICE float receive(const Message* from, u32 number) {
    Message message;
    do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(message) : "l"(from) : "memory");
    while (message >> 32 != number);
    return __uint_as_float((u32)message);
}

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

// All blocks meet; what they have written before is seen by all behind. The count never starts again: a launch adds a multiple of
// the number of blocks.
struct Meeting {
    unsigned long long *count, target;

    DEVICE explicit Meeting(unsigned long long* count) : count(count) {
        unsigned long long now = *(volatile unsigned long long*)count;
        target = now - now % BLOCKS;
    }

    // How many there have been before this launch.
    DEVICE u32 past() const { return (u32)(target / BLOCKS); }

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
