// y = x W^T + b for prompts, hundreds of rows of x and more, where the tensor cores are the limit; 4-bit codes; compiled at
// run time.
//
// Compile-time switches: those of codes.cuh, INPUT_SCALE 0|1, GROUPS (warpgroups along the rows of the weight, 64 each), NB
// (8-row blocks of x: 16, 24 or 32), X_STAGES (of 64 columns of x in flight) and W_STAGES (of 128 columns of the weight).
//
// wgmma takes the weights as A from registers and x as B from shared memory. A weight is finished in registers, t
// included, while the products of the unit before are under way, so that x is read as it is: no kernel in front, and
// W in 16 bits exists nowhere. x arrives by box copies, in the order of its columns; a lane of the packed weight holds
// eight adjacent columns, so codes change places among the four lanes that share rows before they are unpacked. Each
// block of a cluster fetches a share of the rows of x and sends it to all of them; their rows of the weight differ.
// Blocks stay and take one tile of y after the other: the next tile's operands arrive while the last one's sums are
// written. Every sum is made by one thread in one order.
//
// TOGETHER: that many weights of the same columns in one launch, of which each has its own rows of tiles.
//
// SPLIT 1: where tiles fill their last wave badly, each cluster takes an equal share of all tiles' chunks instead, from its
// end on. A share may begin and end within a tile: what comes first, the lower chunks of its last tile, it leaves as sums in
// fp32; the cluster that holds a tile's last chunk adds those of the clusters before it, and never waits for one behind it.

#include "prompt.cuh"

#define UNDER_WAY 3                                // units of 32 columns that are being multiplied while one is made
#ifndef SPLIT
#define SPLIT 0
#endif
#define REGISTERS (GROUPS == 3 ? 152 : 240)        // of a thread that multiplies; the fetching warpgroup gives up its own
#define X_BYTES (8 * NB * 128)                     // 64 columns
#define W_BYTES ((STRIPS * CHUNK + 256 + 127) & ~127)  // strips of the weight and t, 128 columns

struct Problem {
  Weight each[TOGETHER];  // of the same columns, multiplied with the same x
  const float* codebook;  // [16] or null
  int M, chunks;
  int row_blocks, x_blocks, clusters;  // tiles of y: clusters of blocks along N, blocks along M; clusters at work
#if SPLIT
  float4* sums;           // [blocks][STRIPS][NB][32 lanes]: of the tile that a block does not finish
  u32* ready;             // [blocks][STRIPS], zeros: whether they are there
#endif
};

// What a cluster multiplies next: chunks `from` to `to` of a tile.
struct Work {
  int tile, from, to;
  const int clusters, tiles, chunks, begin, cluster;
  __device__ __forceinline__ Work(const Problem& p, int cluster)
      : clusters(p.clusters), tiles(p.row_blocks * p.x_blocks), chunks(p.chunks), begin(share_of(cluster)), cluster(cluster) {
    tile = SPLIT ? 0 : cluster - clusters, from = SPLIT ? share_of(cluster + 1) : 0, to = chunks;
  }
  __device__ __forceinline__ int share_of(int cluster) const { return int(u64(tiles) * chunks * cluster / clusters); }
  __device__ __forceinline__ bool more() const { return SPLIT ? tile * chunks + from > begin : tile + clusters < tiles; }
  __device__ __forceinline__ bool next() {
    if (!more()) return false;
    if (SPLIT) {
      const int end = tile * chunks + from;
      tile = (end - 1) / chunks, to = end - tile * chunks, from = max(begin - tile * chunks, 0);
    } else tile += clusters;
    return true;
  }
};

// A lane's word holds pairs 8 tig + 2 i of a row's 32 columns; afterwards pairs 8 i + 2 tig, as wgmma takes them.
struct Exchange {
  u32 keep, turn, bytes, halves;
  __device__ __forceinline__ explicit Exchange(int tig) {
    keep = tig & 1 ? 0xf0f0f0f0u : 0x0f0f0f0fu, turn = tig & 1 ? 28 : 4;
    bytes = (CODEBOOK ? tig & 1 : tig & 2) ? 0x3715 : 0x6240, halves = tig & 2 ? 0x3276 : 0x5410;
  }
  __device__ __forceinline__ u32 operator()(u32 w) const {
#if CODEBOOK  // a pair is a byte
    w = __byte_perm(w, __shfl_xor_sync(0xffffffffu, w, 1), bytes);
    return __byte_perm(w, __shfl_xor_sync(0xffffffffu, w, 2), halves);
#else         // a pair is a nibble of either half
    const u32 other = __shfl_xor_sync(0xffffffffu, w, 1);
    w = (w & keep) | (__funnelshift_l(other, other, turn) & ~keep);
    return __byte_perm(w, __shfl_xor_sync(0xffffffffu, w, 2), bytes);
#endif
  }
};

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
prompt_linear(const __grid_constant__ Map x, const __grid_constant__ Problem p) {
  SHARED_MEMORY(smem);
  const u32 share = cluster_size(), rank = cluster_rank();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  Work work(p, int(cluster_index()));

  // Shared memory: stages of x and of the weight, 2 KB per multiplying warpgroup to turn y in, then barriers.
  const u32 w_stages = shared(smem) + X_STAGES * X_BYTES, turn = w_stages + W_STAGES * W_BYTES;
  const u32 x_full = turn + STRIPS * 512, x_empty = x_full + 8 * X_STAGES, w_full = x_empty + 8 * X_STAGES,
            w_empty = w_full + 8 * W_STAGES;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int s = 0; s < X_STAGES; s++) barrier_init(x_full + 8 * s), barrier_init(x_empty + 8 * s, STRIPS * share);
#pragma unroll 1
    for (int s = 0; s < W_STAGES; s++) barrier_init(w_full + 8 * s), barrier_init(w_empty + 8 * s, STRIPS);
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

  if (warp >= STRIPS) {  // the warpgroup that fetches: one warp, the others lend their registers
    fewer_registers<24>();
    bool waited = false;
#pragma unroll 1
    while (warp == STRIPS && work.next()) {
      const int tile = work.tile, m0 = tile % p.x_blocks * 8 * NB + int(rank * (8 * NB / share));
      const Weight& weight = weight_at(p.each, tile / p.x_blocks);
      const int strip = min(int((tile / p.x_blocks - weight.first) * share + rank) * STRIPS + lane, weight.strips - 1);
      const u8* from = weight.tiles + u64(strip) * p.chunks * CHUNK;
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
            const u32 at = shared(smem) + x_stage * X_BYTES + rank * (X_BYTES / share), bar = x_full + 8 * x_stage;
            barrier_expect(bar, X_BYTES);
            box_copy(at, x, chunk * 128 + half * 64, m0, bar, (1u << share) - 1);
          }
          advance_x();
        }
      }
    }
  } else {
    more_registers<REGISTERS>();
    const int tig = lane % 4;
    const u32 mine = turn + warp / 4 * 2048;
    const Exchange exchange(tig);
    Table table = {};
#if CODEBOOK
    table = load_table(p.codebook);
#endif
    float acc[4 * NB];
    u32 a[4][2][4];  // of four units, of which up to three are being multiplied while one is made
    Codes codes;
    const u8* t = nullptr;
    auto load = [&] {
      barrier_wait(w_full + 8 * w_stage, w_parity);
      const u8* chunk = smem + X_STAGES * X_BYTES + w_stage * W_BYTES;
      t = chunk + STRIPS * CHUNK + 4 * tig;
      codes = load_codes<false>(chunk + warp * CHUNK + lane_codes(lane), chunk + warp * CHUNK + lane_aux(lane));
#pragma unroll
      for (int j = 0; j < WORDS; j++) codes.w[j] = exchange(codes.w[j]);
    };
    load();
    await_previous_kernel();
    int held = 0;  // the stage of x whose products end next
    auto release_x = [&](bool now) {
      barrier_arrive(x_empty + 8 * held, lane, now && lane < share);
      held = !now ? held : held + 1 == X_STAGES ? 0 : held + 1;
    };
#pragma unroll 1
    while (work.next()) {
#pragma unroll
      for (int i = 0; i < 4 * NB; i++) acc[i] = 0.f;
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
          wgmma_wait<UNDER_WAY>();
          if (U % 2 == 1) release_x(chunk > work.from);  // the half that ended four units ago
          u32 (&made)[2][4] = a[U];
          weights<U>(codes, table, made);
          if (INPUT_SCALE) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const u32 factor = factors(load1<false>(t + 64 * U + 16 * i));
#pragma unroll
              for (int r = 0; r < 2; r++) made[i / 2][i % 2 * 2 + r] = times2(made[i / 2][i % 2 * 2 + r], factor);
            }
          }
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
        if (lane == 0) barrier_arrive(w_empty + 8 * w_stage);  // codes and t are in registers, weights by now
        advance_w();
        if (chunk + 1 < work.to || work.more()) load();
      }
      wgmma_wait<0>();
      release_x(true), release_x(true);
#if SPLIT
      if (work.to < p.chunks) {  // the cluster behind finishes this tile
        const int place = int(blockIdx.x) * STRIPS + warp;
#pragma unroll
        for (int i = 0; i < NB; i++)
          p.sums[(place * NB + i) * 32 + lane] = {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]};
        __syncwarp();
        if (lane == 0) raise_flag(p.ready + place);
        continue;
      }
      for (int from = work.begin, other = work.cluster; from > work.tile * p.chunks; from = work.share_of(other)) {
        const int place = (--other * int(share) + int(rank)) * STRIPS + warp;
        if (lane == 0) await_flag(p.ready + place);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < NB; i++) {
          const float4 sum = load_sums(p.sums + (place * NB + i) * 32 + lane);
          acc[4 * i] += sum.x, acc[4 * i + 1] += sum.y, acc[4 * i + 2] += sum.z, acc[4 * i + 3] += sum.w;
        }
      }
#endif

      const int tile = work.tile;
      const Weight& weight = weight_at(p.each, tile / p.x_blocks);
      const int strip = int((tile / p.x_blocks - weight.first) * share + rank) * STRIPS + warp / 4 * 4;
      store_tile(acc, weight, strip * 16, tile % p.x_blocks * 8 * NB, p.M, mine, smem + (mine - shared(smem)), warp / 4);
    }
  }
  if (share > 1) cluster_sync();  // until then others copy into this block's memory and arrive at its barriers
}
