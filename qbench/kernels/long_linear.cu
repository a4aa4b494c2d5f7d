// y = x W^T + b for prompts, hundreds of rows of x and more, where the tensor cores are the limit; compiled at run time.
//
// Compile-time switches: those of codes.cuh, INPUT_SCALE 0|1, GROUPS (warpgroups that multiply, 64 rows of the weight
// each), NB (8-row blocks of x: 16, 24 or 32), STAGES (of 64 columns, in flight) and FINISH 1|2 (warpgroups that finish).
//
// One or two warpgroups finish weights, t included, and write them to shared memory as wgmma reads them; two take the
// stages by turns. Their first warp fetches: chunks of the packed weight, some ahead, and x as it is, by box copies. The others do
// nothing but multiply. A weight is so finished once per 8 NB rows of x, next to the tensor cores and not in their way,
// and W in 16 bits never reaches the L2 cache. What limits blocks of this size is what L2 delivers, some 25 bytes a cycle
// and multiprocessor: each block of a cluster fetches a share of the rows of x and sends it to all of them, their rows of
// the weight differ. Blocks stay and take one tile of y after the other, so that the next tile's operands arrive while the
// last one's sums are written. Every sum is made by one thread in one order.

#include "finish.cuh"

#define STRIPS (4 * GROUPS)                        // of 16 rows, per block
#define W_BYTES (GROUPS * 64 * 128)                // of one stage: rows of 64 columns, 128 bytes
#define X_BYTES (8 * NB * 128)
#define STAGE (W_BYTES + X_BYTES)
#define FINISHERS (4 * FINISH)                     // warps; each finishes strips w, w + 4, ... of w = warp % 4
// Four warpgroups share 128 registers a thread, which 8 NB = 256 sums exceed: then those that finish give up some, and
// one product is taken as two, since an instruction may name no more than every thread begins with.
#define TIGHT (GROUPS + FINISH == 4 && NB == 32)
#define WIDTH (TIGHT ? NB / 2 : NB)                // 8-row blocks of x in one product
#define PACKED ((STRIPS * CHUNK + 256 + 127) & ~127)  // strips of the weight and t, 128 columns of each
#define AHEAD (NB == 32 ? 3 : 4)                   // of them in flight, of which two may be in use

struct Problem {
  const u8* tiles;        // [strips][chunks][CHUNK]
  const u16* t;           // fp16 [128 * chunks]; read if INPUT_SCALE
  const float* codebook;  // [16] or null
  const u16* bias;        // [N] or null
  u16* y;                 // [M, N]
  int M, N, strips, chunks;
  int row_blocks, x_blocks, clusters;  // tiles of y: clusters of blocks along N, blocks along M; clusters at work
};

// Row g of 8 lies in place_of(g): so the lanes of a quarter warp, 4 pieces of rows g and g + 1, write to different banks.
__device__ __forceinline__ int place_of(int g) { return g % 2 * 4 + g / 2; }
__device__ __forceinline__ int row_at(int place) { return place % 4 * 2 + place / 4; }

// Unit U of 32 columns of one strip to shared memory, 16-byte pieces swizzled by row.
template <int U>
__device__ __forceinline__ void finish(const Codes& codes, const Table& table, const u32 (&t)[4], u32 strip_at, int lane) {
  u32 a[2][4];
  weights<U>(codes, table, a);
  const int place = place_of(lane / 4), piece = U % 2 * 4 + lane % 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    u32 v[4] = {a[0][r], a[0][2 + r], a[1][r], a[1][2 + r]};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (INPUT_SCALE) v[i] = times2(v[i], t[i]);
    store4(strip_at + (8 * r + place) * 128 + (piece ^ place) * 16, {v[0], v[1], v[2], v[3]});
  }
}

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + FINISH), 1)
long_linear(const __grid_constant__ Map x, const __grid_constant__ Problem p) {
  SHARED_MEMORY(smem);
  const u32 share = cluster_size(), rank = cluster_rank();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int tiles = p.row_blocks * p.x_blocks;

  // Shared memory: stages of W and x, 512 bytes per multiplying warp to turn y in, packed chunks, then barriers.
  u8* const packed = smem + STAGES * STAGE + STRIPS * 512;
  const u32 turn = shared(smem) + STAGES * STAGE, full = shared(packed) + AHEAD * PACKED, empty = full + 8 * STAGES;
  const u32 packed_full = empty + 8 * STAGES, packed_empty = packed_full + 8 * AHEAD;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s, 5), barrier_init(empty + 8 * s, STRIPS * share);
#pragma unroll 1
    for (int s = 0; s < AHEAD; s++) barrier_init(packed_full + 8 * s), barrier_init(packed_empty + 8 * s, FINISHERS);
    publish_barriers();
  }
  if (share > 1) cluster_sync();
  else __syncthreads();
  allow_next_kernel();

  int stage = 0, chunk_stage = 0;
  u32 parity = 0, chunk_parity = 0;
  auto advance = [&] {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  };
  const int first_tile = int(cluster_index());

  if (warp < FINISHERS) {
    if constexpr (TIGHT) fewer_registers<88>();
    Table table = {};
#if CODEBOOK
    table = load_table(p.codebook);
#endif
    int to_fetch = first_tile, chunk_to_fetch = 0, place = 0;
    u32 fetch_parity = 1;
    auto fetch_packed = [&] {
      if (to_fetch >= tiles) return;
      barrier_wait(packed_empty + 8 * place, fetch_parity);
      const u32 to = shared(packed) + place * PACKED, bar = packed_full + 8 * place;
      if (lane == 0) barrier_expect(bar, STRIPS * CHUNK + (INPUT_SCALE ? 256 : 0));
      __syncwarp();
      const int strip = min(int(to_fetch / p.x_blocks * share + rank) * STRIPS + lane, p.strips - 1);
      if (lane < STRIPS)
        bulk_copy(to + lane * CHUNK, p.tiles + (u64(strip) * p.chunks + chunk_to_fetch) * CHUNK, CHUNK, bar);
      if (INPUT_SCALE && lane == STRIPS) bulk_copy(to + STRIPS * CHUNK, p.t + chunk_to_fetch * 128, 256, bar);
      if (++place == AHEAD) place = 0, fetch_parity ^= 1;
      if (++chunk_to_fetch == p.chunks) chunk_to_fetch = 0, to_fetch += p.clusters;
    };
    auto half = [&](auto index, int tile, int chunk) {
      constexpr int H = decltype(index)::value;
      const u8* from = packed + chunk_stage * PACKED;
      Codes codes[GROUPS];
#pragma unroll
      for (int s = 0; s < GROUPS; s++) {
        const u8* strip = from + (warp % 4 + 4 * s) * CHUNK;
        load_half<H>(codes[s], strip + lane_codes(lane), strip + lane_aux(lane));
      }
      u32 t[2][4];
      if (INPUT_SCALE) {
#pragma unroll
        for (int unit = 0; unit < 2; unit++) {
          const uint4 v = load4<false>(from + STRIPS * CHUNK + ((2 * H + unit) * 32 + lane % 4 * 8) * 2);
          const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 4; i++)
            t[unit][i] = BF16 ? two_bf16(from_half(u16(pairs[i])), from_half(u16(pairs[i] >> 16))) : pairs[i];
        }
      }
      barrier_wait(empty + 8 * stage, parity ^ 1);
      const u32 at = shared(smem) + stage * STAGE;
      if (threadIdx.x % 128 == 0) {
        const int row = tile % p.x_blocks * 8 * NB + int(rank * (8 * NB / share));
        barrier_expect(full + 8 * stage, X_BYTES);
        box_copy(at + W_BYTES + rank * (X_BYTES / share), x, chunk * 128 + H * 64, row, full + 8 * stage, (1u << share) - 1);
      }
#pragma unroll
      for (int s = 0; s < GROUPS; s++) {
        const u32 strip_at = at + (warp % 4 + 4 * s) * 2048;
        finish<2 * H>(codes[s], table, t[0], strip_at, lane);
        finish<2 * H + 1>(codes[s], table, t[1], strip_at, lane);
      }
      publish_writes();
      __syncwarp();
      if (lane == 0) barrier_arrive(full + 8 * stage);
      advance();
    };
    const bool first = FINISH == 1 || warp < 4, second = FINISH == 1 || warp >= 4;
    for (int i = 0; warp == 0 && i < AHEAD - 2; i++) fetch_packed();
    await_previous_kernel();
#pragma unroll 1
    for (int tile = first_tile; tile < tiles; tile += p.clusters) {
#pragma unroll 1
      for (int chunk = 0; chunk < p.chunks; chunk++) {
        if (warp == 0) fetch_packed();
        barrier_wait(packed_full + 8 * chunk_stage, chunk_parity);
        if (first) half(Index<0>{}, tile, chunk);
        else advance();
        if (second) half(Index<1>{}, tile, chunk);
        else advance();
        if (lane == 0) barrier_arrive(packed_empty + 8 * chunk_stage);  // every lane has read: half() ends in step
        if (++chunk_stage == AHEAD) chunk_stage = 0, chunk_parity ^= 1;
      }
    }
  } else {
    if constexpr (TIGHT) more_registers<168>();
    const int strip_here = warp - FINISHERS, group = strip_here / 4;
    const u32 mine = turn + strip_here * 512;
    float acc[NB / WIDTH][4 * WIDTH];
    await_previous_kernel();
#pragma unroll 1
    for (int tile = first_tile; tile < tiles; tile += p.clusters) {
      const int steps = 2 * p.chunks;
      int before = 0;
      auto release = [&] {  // the stage before has been multiplied
        if (lane < share) barrier_arrive(empty + 8 * before, lane);
      };
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        barrier_wait(full + 8 * stage, parity);
        const u32 at = shared(smem) + stage * STAGE;
        const u64 a = descriptor(at + group * 8192), b = descriptor(at + W_BYTES);
        wgmma_open();
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
          for (int part = 0; part < NB / WIDTH; part++)
            wgmma<WIDTH>(acc[part], a + 2 * k, b + 2 * k + part * (WIDTH * 1024 >> 4), step > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release();
        before = stage;
        advance();
      }
      wgmma_wait<0>();
      release();

      // Sums are [row of the weight][row of x] per warp: 16 x 16 at a time are turned through shared memory.
      const int m0 = tile % p.x_blocks * 8 * NB;
      const int strip = (tile / p.x_blocks * share + rank) * STRIPS + strip_here, n0 = strip * 16;
      const int n = n0 + lane % 2 * 8, rows_left = p.M - m0 - lane / 2;
      if (p.bias) {
        const int row = n0 + row_at(lane / 4);
        const float first = row < p.N ? load16(p.bias[row]) : 0.f, second = row + 8 < p.N ? load16(p.bias[row + 8]) : 0.f;
#pragma unroll
        for (int i = 0; i < NB; i++) {
          float* sums = acc[i / WIDTH] + i % WIDTH * 4;
          sums[0] += first, sums[1] += first, sums[2] += second, sums[3] += second;
        }
      }
      u16* to = p.y + u64(m0 + lane / 2) * p.N + n;
#pragma unroll
      for (int i = 0; i < NB; i += 2) {
        const float* sums = acc[i / WIDTH] + i % WIDTH * 4;
        const u32 v[4] = {round2(sums[0], sums[1]), round2(sums[2], sums[3]), round2(sums[4], sums[5]), round2(sums[6], sums[7])};
        __syncwarp();
        store_transposed(mine + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16, v);
        __syncwarp();
        const uint4 turned = *reinterpret_cast<const uint4*>(smem + (mine - shared(smem)) + lane * 16);
        const uint4 pairs = {__byte_perm(turned.x, turned.z, 0x5410), __byte_perm(turned.x, turned.z, 0x7632),
                             __byte_perm(turned.y, turned.w, 0x5410), __byte_perm(turned.y, turned.w, 0x7632)};
        if (8 * i < rows_left && n < p.N) {
          if (p.N % 8 == 0) *reinterpret_cast<uint4*>(to) = pairs;
          else {
            const u32 words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
            for (int j = 0; j < 8; j++)
              if (n + j < p.N) to[j] = u16(words[j / 2] >> (16 * (j % 2)));
          }
        }
        to += 16 * p.N;
      }
    }
  }
  if (share > 1) cluster_sync();  // until then others copy into this block's memory and arrive at its barriers
}
