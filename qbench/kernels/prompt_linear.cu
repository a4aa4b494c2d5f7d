// y = x W^T + b for prompts, hundreds of rows of x and more, where the tensor cores are the limit; compiled at run time.
//
// Compile-time switches: those of codes.cuh, INPUT_SCALE 0|1, GROUPS (warpgroups along the rows of the weight, 64 each), NB
// (8-row blocks of x: 16, 24 or 32), X_STAGES (of 64 columns of x in flight) and W_STAGES (of 128 columns of the weight).
//
// wgmma takes the weights as A from registers and x as B from shared memory. A weight is finished in registers, t
// included, while the products of the unit before are under way, so that x is read as it is: no kernel in front, and
// W in 16 bits exists nowhere. What a warp issues beside wgmma is hardly hidden, so the warps that multiply do no more than
// five instructions for two weights: three others turn scales, zeros and t into 16-bit floats, once for the block.
// x arrives by box copies, in the order of its columns; a word of the packed weight holds eight adjacent columns, so each of
// the four lanes that share rows reads all four words, and takes its field of each. Each block of a cluster fetches a
// share of the rows of x and sends it to all of them; their rows of the weight differ.
// Blocks stay and take one tile of y after the other: the next tile's operands arrive while the last one's sums are
// written. Where the last wave would leave half of the clusters idle, a cluster of two takes the tile of one block there: each
// multiplies half of the columns, then finishes half of the rows of x with the other's sums. `whole` counts the clusters'
// tiles that are not parted so. Every sum is made in one order.
//
// TOGETHER: that many weights of the same columns in one launch, of which each has its own rows of tiles.

#include "prompt.cuh"
#include "operand.cuh"

#define REGISTERS (GROUPS == 3 ? 152 : 232)        // of a thread that multiplies; the other warpgroup gives up its own
#define X_BYTES (8 * NB * 128)                     // 64 columns
#define READY_AT (STRIPS * CHUNK + 256)            // of a stage of the weight: behind its strips and t, 128 columns
#define W_BYTES (READY_AT + READY_BYTES)

struct Problem {
  Weight each[TOGETHER];  // of the same columns, multiplied with the same x
  const float* codebook;  // [16] or null
  int M, chunks;
  int row_blocks, x_blocks;  // tiles of y: clusters of blocks along N, blocks along M
  int whole, clusters;       // tiles that are not parted; clusters at work
};

// What a block multiplies next: its rows of the weight within a cluster's tile; all columns, or half of them.
struct Work {
  int tile, block, from, to;  // chunks `from` to `to`
  bool parted = false;        // if so, it is the last
  const Problem& p;
  const int rank;
  int place;
  __device__ __forceinline__ Work(const Problem& p, int cluster, int rank) : p(p), rank(rank), place(cluster - p.clusters) {}
  __device__ __forceinline__ bool more() const { return place + p.clusters < 2 * p.row_blocks * p.x_blocks - p.whole; }
  __device__ __forceinline__ bool next() {
    if (!more()) return false;
    place += p.clusters;
    const int behind = place - p.whole;
    parted = behind >= 0;
    tile = parted ? p.whole + behind / 2 : place, block = parted ? behind % 2 : rank;
    from = parted && rank ? p.chunks / 2 : 0, to = parted && !rank ? p.chunks / 2 : p.chunks;
    return true;
  }
};

// Half of a thread's sums, from 8-row block FIRST of x on: to the other block's shared memory, and what came from there added.
template <int FIRST> __device__ __forceinline__ void give(const float (&acc)[4 * NB], u32 to, u32 rank) {
#pragma unroll
  for (int i = 0; i < NB / 2; i++) {
    const float* sums = acc + 4 * (FIRST + i);
    store_remote(to + i * 128 * GROUPS * 16, rank, {sums[0], sums[1], sums[2], sums[3]});
  }
}
template <int FIRST> __device__ __forceinline__ void take(float (&acc)[4 * NB], const float4* from) {
#pragma unroll
  for (int i = 0; i < NB / 2; i++) {
    const float4 sums = from[i * 128 * GROUPS];
    float* own = acc + 4 * (FIRST + i);
    own[0] += sums.x, own[1] += sums.y, own[2] += sums.z, own[3] += sums.w;
  }
}

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
prompt_linear(const __grid_constant__ Map x, const __grid_constant__ Problem p) {
  SHARED_MEMORY(smem);
  const u32 share = cluster_size(), rank = cluster_rank();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Work work(p, int(cluster_index()), int(rank));

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

  if (warp >= STRIPS) fewer_registers<40>();  // a warpgroup, at once
  if (warp > STRIPS) {  // three warps of it make ready
    const int third = warp - STRIPS - 1;
#pragma unroll 1
    while (work.next()) {
#pragma unroll 1
      for (int chunk = work.from; chunk < work.to; chunk++) {
        barrier_wait(w_full + 8 * w_stage, w_parity);
        u8* stage = smem + X_STAGES * X_BYTES + w_stage * W_BYTES;
        make_ready(stage, stage + STRIPS * CHUNK, stage + READY_AT, third, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(w_ready + 8 * w_stage);
        advance_w();
      }
    }
    if (work.parted) cluster_sync(), cluster_sync();
  } else if (warp == STRIPS) {  // the fourth fetches
    bool waited = false;
#pragma unroll 1
    while (work.next()) {
      const int m0 = work.tile % p.x_blocks * 8 * NB, rows = 8 * NB / int(share);  // of a box
      const Weight& weight = weight_at(p.each, work.tile / p.x_blocks);
      const int first = int((work.tile / p.x_blocks - weight.first) * share + work.block) * STRIPS;
      const u8* from = weight.tiles + u64(min(first + lane, weight.strips - 1)) * p.chunks * CHUNK;
#pragma unroll 1
      for (int chunk = work.from; chunk < work.to; chunk++) {
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
            const u32 at = shared(smem) + x_stage * X_BYTES, bar = x_full + 8 * x_stage;
            const int column = chunk * 128 + half * 64;
            barrier_expect(bar, X_BYTES);
            if (work.parted)
              for (int i = 0; i < int(share); i++) box_copy(at + i * rows * 128, x, column, m0 + i * rows, bar, 0);
            else box_copy(at + rank * rows * 128, x, column, m0 + int(rank) * rows, bar, share > 1 ? (1u << share) - 1 : 0);
          }
          advance_x();
        }
      }
    }
    if (work.parted) cluster_sync(), cluster_sync();
  } else {
    more_registers<REGISTERS>();
    const int tig = lane % 4;
    const u32 mine = turn + warp / 4 * 2048;
    Table table = {};
#if CODEBOOK
    table = load_table(p.codebook);
#endif
    float acc[4 * NB];
    u32 a[2][2][4];  // of two units, of which one is being multiplied while the other is made
    Words words;
    Ready rows[2];
    uint4 t = {};
    const u8* stage = nullptr;
    auto load_for = [&](int unit) {
      if (unit % UNITS_HELD == 0) words.load(stage + warp * CHUNK, unit, lane);
      if (INPUT_SCALE) t = load4<false>(stage + READY_AT + STRIPS * PER_CHUNK * 128 + 64 * unit + 16 * tig);
      if (unit * 32 % GROUP == 0)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int row = (warp * PER_CHUNK + unit * 32 / GROUP) * 16 + 8 * r + lane / 4;
          const uint2 v = load2<false>(stage + READY_AT + 8 * row);
          rows[r] = {v.x, v.y};
        }
    };
    auto load = [&] {
      barrier_wait(w_full + 8 * w_stage, w_parity);  // codes come by copies, the rest from the three warps
      barrier_wait(w_ready + 8 * w_stage, w_parity);
      stage = smem + X_STAGES * X_BYTES + w_stage * W_BYTES;
      load_for(0);
    };
    load();
    await_previous_kernel();
    int held = 0;  // the stage of x whose products end next
    u32 filler;    // the block that a lane tells
    auto release_x = [&](bool now) {
      barrier_arrive(x_empty + 8 * held, filler, now && lane < share);
      held = !now ? held : held + 1 == X_STAGES ? 0 : held + 1;
    };
    auto store = [&](auto first, auto last) {  // 8-row blocks of x
      const Weight& weight = weight_at(p.each, work.tile / p.x_blocks);
      const int strip = int((work.tile / p.x_blocks - weight.first) * share + work.block) * STRIPS + warp / 4 * 4;
      store_tile<decltype(first)::value, decltype(last)::value>(acc, weight, strip * 16, work.tile % p.x_blocks * 8 * NB, p.M,
                                                                mine, smem + (mine - shared(smem)), warp / 4);
    };
#pragma unroll 1
    while (work.next()) {
#pragma unroll
      for (int i = 0; i < 4 * NB; i++) acc[i] = 0.f;
      const int last = work.more() ? work.to : work.to - 1;  // the chunks before it have one behind, perhaps of another tile
      filler = work.parted ? rank : lane;  // of a parted tile a block fills its stages alone: its lanes tell none but itself
#pragma unroll 1
      for (int chunk = work.from; chunk < work.to; chunk++) {
        u64 halves[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          barrier_wait(x_full + 8 * x_stage, x_parity);
          halves[half] = descriptor(shared(smem) + x_stage * X_BYTES);
          advance_x();
        }
        auto unit = [&](auto index) {  // 32 columns; no branch in four of them, so that the compiler lets products overlap
          constexpr int U = decltype(index)::value;
          wgmma_wait<1>();
          if (U == 1) release_x(chunk > work.from);  // the second half of the chunk before
          if (U == 3) release_x(true);
          u32 (&made)[2][4] = a[U % 2];
          weights_of<U>(words, rows, t, table, tig, made);
          if (U < 3) load_for(U + 1);
          const u64 columns = halves[U / 2] + (U % 2 * 64 >> 4);
          wgmma_open();
          wgmma<NB>(acc, made[0], columns), wgmma<NB>(acc, made[1], columns + (32 >> 4));
          wgmma_commit();
        };
        unit(Index<0>{});
        unit(Index<1>{});
        unit(Index<2>{});
        unit(Index<3>{});
        __syncwarp();
        if (lane == 0) barrier_arrive(w_empty + 8 * w_stage);  // what it held is in registers, weights by now
        advance_w();
        if (chunk < last) load();
      }
      wgmma_wait<0>();
      release_x(true);
      if (work.parted) break;
      store(Index<0>{}, Index<NB>{});
    }
    if (work.parted) {
      const float4* from = reinterpret_cast<const float4*>(smem) + threadIdx.x;
      cluster_sync();  // nobody reads a stage any more
      if (rank == 0) give<NB / 2>(acc, shared(from), 1);
      else give<0>(acc, shared(from), 0);
      cluster_sync();
      if (rank == 0) take<0>(acc, from), store(Index<0>{}, Index<NB / 2>{});
      else take<NB / 2>(acc, from), store(Index<NB / 2>{}, Index<NB>{});
    }
  }
  if (share > 1) cluster_sync();  // until then others copy into this block's memory, and arrive at its barriers
}
