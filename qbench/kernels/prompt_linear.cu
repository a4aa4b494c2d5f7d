// y = x W^T + b for prompts, hundreds of rows of x and more, where the tensor cores are the limit; 4-bit codes; compiled at
// run time.
//
// Compile-time switches: those of codes.cuh, INPUT_SCALE 0|1, GROUPS (warpgroups along the rows of the weight, 64 each), NB
// (8-row blocks of x: 16, 24 or 32), X_STAGES (of 64 columns of x in flight) and W_STAGES (of 128 columns of the weight).
//
// wgmma takes the weights as A from registers and x as B from shared memory. A weight is finished in registers, t
// included, while the products of the unit before are under way, so that x is read as it is: no kernel in front, and
// W in 16 bits exists nowhere. What a warp issues beside wgmma is hardly hidden, so the warps that multiply do no more than
// five instructions for two weights: three others turn scales, zeros and t into 16-bit floats, once for the block.
// x arrives by box copies, in the order of its columns; a word of the packed weight holds eight adjacent columns, so each of
// the four lanes that share rows reads all four words, and takes its field of each. Each
// block of a cluster fetches a share of the rows of x and sends it to all of them; their rows of the weight differ.
// Blocks stay and take one tile of y after the other: the next tile's operands arrive while the last one's sums are
// written. Where the last wave would leave half of them idle, its tiles are halved, along the rows of x: `whole` says which
// are not. Every sum is made by one thread in one order.
//
// TOGETHER: that many weights of the same columns in one launch, of which each has its own rows of tiles.

#include "prompt.cuh"

#define UNDER_WAY 3                                // units of 32 columns that are being multiplied while one is made
#define REGISTERS (GROUPS == 3 ? 152 : 232)        // of a thread that multiplies; the other warpgroup gives up its own
#define X_BYTES (8 * NB * 128)                     // 64 columns
#define ROWS_AT (STRIPS * CHUNK + 256)             // of a stage of the weight: behind its strips and t, 128 columns,
#define FACTORS_AT (ROWS_AT + STRIPS * PER_CHUNK * 128)  // what is made of scales and zeros, 8 bytes a row and group, and of t
#define W_BYTES (FACTORS_AT + 256)

struct Problem {
  Weight each[TOGETHER];  // of the same columns, multiplied with the same x
  const float* codebook;  // [16] or null
  int M, chunks;
  int row_blocks, x_blocks;  // tiles of y: clusters of blocks along N, blocks along M
  int whole, clusters;       // tiles that are not halved; clusters at work
};

// What a cluster multiplies next: a tile, or half of one.
struct Work {
  int tile, half;  // half: -1 for all rows of x, else 0 or 1
  int place;
  const int whole, places, clusters;
  __device__ __forceinline__ Work(const Problem& p, int cluster)
      : place(cluster - p.clusters), whole(p.whole), places(2 * p.row_blocks * p.x_blocks - p.whole), clusters(p.clusters) {}
  __device__ __forceinline__ bool more() const { return place + clusters < places; }
  __device__ __forceinline__ bool next() {
    if (!more()) return false;
    place += clusters;
    const int behind = place - whole;
    tile = behind < 0 ? place : whole + behind / 2, half = behind < 0 ? -1 : behind % 2;
    return true;
  }
  __device__ __forceinline__ int row(const Problem& p) const {  // of x
    return tile % p.x_blocks * (8 * NB) + (half > 0 ? 4 * NB : 0);
  }
};

// Of one row and group, in shared memory: scale and rest as 16-bit floats, and the code that is subtracted, as the float that
// `field` makes of it, twice.
struct Ready { u32 scale_rest, center; };

// What lanes that share rows hold of 64 columns: {even unit of 32: row g, row g + 8, odd unit: row g, row g + 8} of each.
struct Words {
  uint4 of[4];
  template <int U> __device__ __forceinline__ u32 get(int lane, int r) const {
    return U % 2 ? r ? of[lane].w : of[lane].z : r ? of[lane].y : of[lane].x;
  }
};

// Unit U of 32 columns as the A operands of two products, of which this lane's columns are 8 i + 2 tig and the next.
template <int U>
__device__ __forceinline__ void weights_of(const Words& words, const Ready (&rows)[2], uint4 t, const Table& table, int tig,
                                           u32 (&a)[2][4]) {
  const u32 factor[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const u32 scale = __byte_perm(rows[r].scale_rest, 0, 0x1010), rest = __byte_perm(rows[r].scale_rest, 0, 0x3232);
    u32 v[4];
#if CODEBOOK  // a pair is a byte
    const u32 pick = tig | (4 + tig) << 4;
    const u32 pairs = __byte_perm(__byte_perm(words.get<U>(0, r), words.get<U>(1, r), pick),
                                  __byte_perm(words.get<U>(2, r), words.get<U>(3, r), pick), 0x5410);
    look_up(table, pairs, v[0], v[1]), look_up(table, pairs >> 16, v[2], v[3]);
#else         // a pair is a nibble of either half
#pragma unroll
    for (int i = 0; i < 4; i++)
      v[i] = minus2(select_or<0x000f000fu>(words.get<U>(i, r) >> (4 * tig), power(0)), rows[r].center);
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 weight = fma2(v[i], scale, rest);
      a[i / 2][i % 2 * 2 + r] = INPUT_SCALE ? times2(weight, factor[i]) : weight;
    }
  }
}

// A third of a stage's scales and zeros, and the last warp all of its t, as `weights_of` takes them.
__device__ __forceinline__ void prepare(u8* stage, int third, int lane) {
#pragma unroll 1
  for (int e = 32 * third + lane; e < STRIPS * PER_CHUNK * 16; e += 96) {
    const int strip = e / (PER_CHUNK * 16), group = e / 16 % PER_CHUNK, place = e % 16;  // rows g and g + 8 by turns
    const u8* aux = stage + strip * CHUNK + CODES + (group * 16 + place) * AUX;
    const u32 pair = ZERO ? load1<false>(aux) : *reinterpret_cast<const u16*>(aux);
    const Row row = row_of(from_half(u16(pair)), ZERO ? from_half(u16(pair >> 16)) : CODEBOOK ? 0.f : 8.f);
    const uint2 made = {(row.scale & 0xffffu) | row.rest << 16, power(0) | both(u16(row.center))};
    *reinterpret_cast<uint2*>(stage + ROWS_AT + (e / 16 * 16 + place / 2 + place % 2 * 8) * 8) = made;
  }
  if (INPUT_SCALE && third == 2)
    for (int pair = lane; pair < 64; pair += 32) {  // of columns 32 unit + 8 i + 2 tig: to the unit's lane tig
      const int to = pair / 16 * 16 + pair % 4 * 4 + pair / 4 % 4;
      *reinterpret_cast<u32*>(stage + FACTORS_AT + 4 * to) = factors(load1<false>(stage + STRIPS * CHUNK + 4 * pair));
    }
}

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
prompt_linear(const __grid_constant__ Map x, const __grid_constant__ Problem p) {
  SHARED_MEMORY(smem);
  const u32 share = cluster_size(), rank = cluster_rank();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Work work(p, int(cluster_index()));

  // Shared memory: stages of x and of the weight, 2 KB per multiplying warpgroup to turn y in, then barriers.
  const u32 w_stages = shared(smem) + X_STAGES * X_BYTES, turn = w_stages + W_STAGES * W_BYTES;
  const u32 x_full = turn + STRIPS * 512, x_empty = x_full + 8 * X_STAGES, w_full = x_empty + 8 * X_STAGES,
            w_ready = w_full + 8 * W_STAGES, w_empty = w_ready + 8 * W_STAGES;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int s = 0; s < X_STAGES; s++) barrier_init(x_full + 8 * s), barrier_init(x_empty + 8 * s, STRIPS * share);
#pragma unroll 1
    for (int s = 0; s < W_STAGES; s++)
      barrier_init(w_full + 8 * s), barrier_init(w_ready + 8 * s, 3), barrier_init(w_empty + 8 * s, STRIPS);
    publish_barriers();
  }
  if (share > 1) cluster_sync();
  else __syncthreads();
  allow_next_kernel();

  int x_stage = 0, w_stage = 0;
  u32 x_parity = 0, w_parity = 0;
  auto advance_x = [&] {
    if (++x_stage == X_STAGES) x_stage = 0, x_parity ^= 1;
  };
  auto advance_w = [&] {
    if (++w_stage == W_STAGES) w_stage = 0, w_parity ^= 1;
  };

  if (warp > STRIPS) {  // three warps of the warpgroup that lends its registers
    fewer_registers<40>();
    const int third = warp - STRIPS - 1;
#pragma unroll 1
    while (work.next()) {
#pragma unroll 1
      for (int chunk = 0; chunk < p.chunks; chunk++) {
        barrier_wait(w_full + 8 * w_stage, w_parity);
        prepare(smem + X_STAGES * X_BYTES + w_stage * W_BYTES, third, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(w_ready + 8 * w_stage);
        advance_w();
      }
    }
  } else if (warp == STRIPS) {  // the one that fetches
    fewer_registers<40>();
    bool waited = false;
#pragma unroll 1
    while (work.next()) {
      const int tile = work.tile, boxes = work.half < 0 ? 2 : 1, rows = 4 * NB / int(share), m0 = work.row(p) + int(rank) * boxes * rows;
      const Weight& weight = weight_at(p.each, tile / p.x_blocks);
      const int strip = min(int((tile / p.x_blocks - weight.first) * share + rank) * STRIPS + lane, weight.strips - 1);
      const u8* from = weight.tiles + u64(strip) * p.chunks * CHUNK;
#pragma unroll 1
      for (int chunk = 0; chunk < p.chunks; chunk++) {
        barrier_wait(w_empty + 8 * w_stage, w_parity ^ 1);
        const u32 w = w_stages + w_stage * W_BYTES, bar = w_full + 8 * w_stage;
        if (lane == 0) barrier_expect(bar, STRIPS * CHUNK + (INPUT_SCALE ? 256 : 0));
        __syncwarp();
        if (lane < STRIPS) bulk_copy(w + lane * CHUNK, from + u64(chunk) * CHUNK, CHUNK, bar);
        if (INPUT_SCALE && lane == STRIPS) bulk_copy(w + STRIPS * CHUNK, weight.t + chunk * 128, 256, bar);
        advance_w();
        if (!waited) await_previous_kernel(), waited = true;  // which may write x
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
          barrier_wait(x_empty + 8 * x_stage, x_parity ^ 1);
          if (lane == 0) {
            const u32 at = shared(smem) + x_stage * X_BYTES + rank * boxes * rows * 128, bar = x_full + 8 * x_stage;
            barrier_expect(bar, boxes * (X_BYTES / 2));
            box_copy(at, x, chunk * 128 + half * 64, m0, bar, (1u << share) - 1);
            if (boxes == 2) box_copy(at + rows * 128, x, chunk * 128 + half * 64, m0 + rows, bar, (1u << share) - 1);
          }
          advance_x();
        }
      }
    }
  } else {
    more_registers<REGISTERS>();
    const int tig = lane % 4;
    const u32 mine = turn + warp / 4 * 2048;
    Table table = {};
#if CODEBOOK
    table = load_table(p.codebook);
#endif
    float acc[4 * NB];
    u32 a[4][2][4];  // of four units, of which up to three are being multiplied while one is made
    Words words;
    Ready rows[2];
    uint4 t = {};
    const u8* stage = nullptr;
    auto load_words = [&](int half) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        words.of[i] = load4<false>(stage + warp * CHUNK + 512 * half + lane / 4 * 64 + 16 * i);
    };
    auto load_rows = [&](int unit) {
      const u8* from = stage + ROWS_AT + (warp * PER_CHUNK + unit * 32 / GROUP) * 128 + lane / 4 * 8;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const uint2 v = load2<false>(from + 64 * r);
        rows[r] = {v.x, v.y};
      }
    };
    auto load_factors = [&](int unit) {
      if (INPUT_SCALE) t = load4<false>(stage + FACTORS_AT + 64 * unit + 16 * tig);
    };
    auto load = [&] {
      barrier_wait(w_full + 8 * w_stage, w_parity);  // codes come by copies, the rest from the three warps
      barrier_wait(w_ready + 8 * w_stage, w_parity);
      stage = smem + X_STAGES * X_BYTES + w_stage * W_BYTES;
      load_words(0), load_rows(0), load_factors(0);
    };
    load();
    await_previous_kernel();
    int held = 0;  // the stage of x whose products end next
    auto release_x = [&](bool now) {
      barrier_arrive(x_empty + 8 * held, lane, now && lane < share);
      held = !now ? held : held + 1 == X_STAGES ? 0 : held + 1;
    };
    auto multiply = [&](auto blocks) {  // 8 rows of x each
      constexpr int BLOCKS = decltype(blocks)::value;
#pragma unroll
      for (int i = 0; i < 4 * BLOCKS; i++) acc[i] = 0.f;
#pragma unroll 1
      for (int chunk = 0; chunk < p.chunks; chunk++) {
        u64 halves[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          barrier_wait(x_full + 8 * x_stage, x_parity);
          halves[half] = descriptor(shared(smem) + x_stage * X_BYTES);
          advance_x();
        }
        auto unit = [&](auto index) {  // 32 columns; no branch in four of them, so that the compiler lets products overlap
          constexpr int U = decltype(index)::value;
          wgmma_wait<UNDER_WAY>();
          if (U % 2 == 1) release_x(chunk > 0);  // the half that ended four units ago
          u32 (&made)[2][4] = a[U];
          weights_of<U>(words, rows, t, table, tig, made);
          if (U == 1) load_words(1);
          if (U < 3) load_factors(U + 1);
          if (U < 3 && (U + 1) * 32 % GROUP == 0) load_rows(U + 1);
          const u64 columns = halves[U / 2] + (U % 2 * 64 >> 4);
          wgmma_open();
          wgmma<BLOCKS>(acc, made[0], columns), wgmma<BLOCKS>(acc, made[1], columns + (32 >> 4));
          wgmma_commit();
        };
        unit(Index<0>{});
        unit(Index<1>{});
        unit(Index<2>{});
        unit(Index<3>{});
        __syncwarp();
        if (lane == 0) barrier_arrive(w_empty + 8 * w_stage);  // what it held is in registers, weights by now
        advance_w();
        if (chunk + 1 < p.chunks || work.more()) load();
      }
      wgmma_wait<0>();
      release_x(true), release_x(true);
      const int row_block = work.tile / p.x_blocks;
      const Weight& weight = weight_at(p.each, row_block);
      const int strip = int((row_block - weight.first) * share + rank) * STRIPS + warp / 4 * 4;
      store_tile<BLOCKS>(acc, weight, strip * 16, work.row(p), p.M, mine, smem + (mine - shared(smem)), warp / 4);
    };
#pragma unroll 1
    while (work.next())
      if (work.half < 0) multiply(Index<NB>{});
      else multiply(Index<NB / 2>{});
  }
  if (share > 1) cluster_sync();  // until then others copy into this block's memory and arrive at its barriers
}
