// y = x W^T + b for wider batches, up to 128 rows in one pass over the weights, where the products weigh as much as the
// bytes; compiled at run time.
//
// Compile-time switches: those of codes.cuh, NB (8-row blocks of the batch: 2, 4, 8, 16 or 24), GROUPS (warpgroups along the
// rows of the weight, 64 each) and WK (as many times more, which take turns at the chunks of K). EXPERTS 1: the weights of
// a mixture, whose rows of x are sorted by expert; blockIdx.y is a slot of routes.py then, one expert's rows of x.
//
// wgmma takes the weights as A from registers and x * t as B from shared memory, so x is read once per 64 rows and not
// once per warp. Unlike in dual_linear.cu a weight is finished before it is multiplied: with a wide batch two instructions
// for two weights are less than scaling every sum of a group. c = round(zero) is subtracted from the code as an integer,
// which is exact; then one FMA gives fp(scale * (q - c) - scale * (zero - c)), rounded once, so an uneven zero point costs
// neither precision nor sums of x. `tile_input` writes x * t in the very image that wgmma reads: per chunk of 128 columns
// two halves `[8 NB rows][128 bytes]`, columns in the order of the weights' lanes, 16-byte pieces swizzled by row. One
// warp fetches, a chunk of x and of each strip of the weight per stage, all by bulk copies; the first weights are on
// their way before the kernel in front has ended. Sums over the splits of K as in dual_linear.cu: the same every run.

#include "finish.cuh"
#include "rotate.cuh"

#ifndef EXPERTS
#define EXPERTS 0
#endif
#define STRIPS (4 * GROUPS)                        // of 16 rows, per block
#define WARPS (STRIPS * WK)                        // that multiply
#define X_BYTES (8 * NB * 256)                     // x * t of one chunk
#define HALF_OF_X (8 * NB * 128)
#define STAGE (X_BYTES + (STRIPS * CHUNK + 1023 & ~1023))  // the image needs 1024-byte alignment
#define PARTIAL (WK * 8 * NB * (16 * STRIPS + 4) * 4)  // bytes of what is summed at the end

struct Problem {
  const u8* tiles;        // [strips][chunks][CHUNK]
  const u8* x;            // x * t, [M / (8 NB)][chunks][X_BYTES], written by tile_input
  const float* codebook;  // [16] or null
  const u16* bias;        // [N] or null
  u16* y;                 // [M, N]
  float t_up;             // undoes t_down of tile_input
  int M, N, strips, chunks;
  int per, stages;        // chunks of K per block; in flight
#if EXPERTS
  const int* slots;       // [slots][3]: expert, first row of y, rows
#endif
};

// x * t into the image; a thread per 8 columns, of every 256 that its warp rotates together.
extern "C" __global__ void __launch_bounds__(128)
tile_input(const u16* x, const u16* t, const int* permutation, u8* image, u64 x_stride, int K, int chunks, float t_down
#if EXPERTS
           , const int* token, const int* experts, const int* rows
#elif ROTATE
           , const u8* signs
#endif
) {
  auto put = [&](int m, int v, uint4 values) {
    const u32 pairs[4] = {values.x, values.y, values.z, values.w};
    const int unit = v % 16 / 4, tig = v % 4, n = m % (8 * NB);
    u8* row = image + (u64(m / (8 * NB)) * chunks + v / 16) * X_BYTES + unit / 2 * HALF_OF_X + n * 128;
#pragma unroll
    for (int i = 0; i < 4; i++)
      *reinterpret_cast<u32*>(row + ((4 * (unit % 2) + i) ^ n % 8) * 16 + 4 * tig) = pairs[i];
  };
#if ROTATE
  SHARED_MEMORY(smem);
  allow_next_kernel();
  const int m = blockIdx.y;
  const RowPart part(blockIdx.x, chunks);
  if (part.pairs <= 0) return;
  const uint4* turned = rotated(x + m * x_stride, x_stride, t, signs, K, t_down, part, smem);
#pragma unroll
  for (int q = 0; q < TURNS; q++)
    if ((part.vector + 32 * q) / 16 < chunks) put(m, part.vector + 32 * q, turned[32 * q]);
#else
#if EXPERTS  // blockIdx.x is a place of routes.py
  await_previous_kernel();
  allow_next_kernel();
  const int v = blockIdx.y * 128 + threadIdx.x, m = rows[blockIdx.x], k = v * 8, expert = experts[blockIdx.x];
  if (v / 16 >= chunks || m < 0) return;
  x += (token ? token[blockIdx.x] : int(blockIdx.x)) * x_stride;
  if (t) t += u64(expert) * chunks * 128;
  if (permutation) permutation += u64(expert) * K;
#else
  allow_next_kernel();
  const int v = blockIdx.x * 128 + threadIdx.x, m = blockIdx.y, k = v * 8;
  if (v / 16 >= chunks) return;
  x += m * x_stride;
#endif
  const uint4 factors = t ? *reinterpret_cast<const uint4*>(t + k) : uint4{};
#if !EXPERTS
  await_previous_kernel();
#endif
  uint4 values = load_x(x, permutation, k, K, aligned_rows(x, x_stride, permutation, K));
  if (t) values = scaled(values, factors, t_down);
  put(m, v, values);
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS + 32) wide_linear(const __grid_constant__ Problem p) {
  SHARED_MEMORY(smem);
  allow_next_kernel();
  const u32 splits = cluster_size(), rank = cluster_rank();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, g = lane / 4, tig = lane % 4;
  const int strip0 = int(cluster_index()) * STRIPS, strip = warp % STRIPS, turn = warp / STRIPS;
  const int lo = min(int(rank) * p.per, p.chunks), mine = min(lo + p.per, p.chunks) - lo;
#if EXPERTS
  await_previous_kernel();
  const int expert = p.slots[3 * blockIdx.y], m0 = p.slots[3 * blockIdx.y + 1], batch = p.slots[3 * blockIdx.y + 2];
  if (batch <= 0) return;
  const u8* tiles = p.tiles + expert * (u64(p.strips) * p.chunks * CHUNK);
#else
  const int m0 = blockIdx.y * 8 * NB, batch = min(p.M - m0, 8 * NB);
  const u8* tiles = p.tiles;
#endif

  // Shared memory: stages of x and weights, which the sums overlay, then their barriers, which nothing may: full, empty.
  const u32 full = shared(smem + max(p.stages * STAGE, PARTIAL)), empty = full + 8 * p.stages;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int s = 0; s < p.stages; s++) barrier_init(full + 8 * s), barrier_init(empty + 8 * s, STRIPS);
    publish_barriers();
  }
  __syncthreads();

  float acc[4 * NB];
#pragma unroll
  for (int i = 0; i < 4 * NB; i++) acc[i] = 0.f;

  if (warp == WARPS) {  // the warp that fetches
    const u8* weights_from = tiles + (u64(min(strip0 + lane, p.strips - 1)) * p.chunks + lo) * CHUNK;
    const int x_bytes = EXPERTS ? 256 * batch : X_BYTES;
    const u8* x_from = p.x + (u64(blockIdx.y) * p.chunks + lo) * X_BYTES;
    auto fetch_weights = [&](int i, int stage) {
      if (lane == 0) barrier_expect(full + 8 * stage, x_bytes + STRIPS * CHUNK);
      __syncwarp();
      u8* to = smem + stage * STAGE + X_BYTES + lane * CHUNK;
      if (lane < STRIPS) bulk_copy(shared(to), weights_from + u64(i) * CHUNK, CHUNK, full + 8 * stage);
    };
    auto fetch_x = [&](int i, int stage) {
#if EXPERTS  // of both halves the rows that the slot holds
      if (lane < 2)
        bulk_copy(shared(smem + stage * STAGE + lane * HALF_OF_X), x_from + u64(i) * X_BYTES + lane * HALF_OF_X, x_bytes / 2,
                  full + 8 * stage);
#else
      if (lane == 0) bulk_copy(shared(smem + stage * STAGE), x_from + u64(i) * X_BYTES, X_BYTES, full + 8 * stage);
#endif
    };
    const int ahead = min(p.stages, mine);
#pragma unroll 1
    for (int i = 0; i < ahead; i++) fetch_weights(i, i);
    await_previous_kernel();
#pragma unroll 1
    for (int i = 0; i < ahead; i++) fetch_x(i, i);
    int stage = 0;
    u32 parity = 0;
#pragma unroll 1
    for (int i = ahead; i < mine; i++) {
      barrier_wait(empty + 8 * stage, parity);
      fetch_weights(i, stage);
      fetch_x(i, stage);
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }
  } else {
    await_previous_kernel();
    Table table = {};
#if CODEBOOK
    table = load_table(p.codebook);
#endif
    // Of the batch the first 8 B rows, which are as many as a slot holds.
    auto multiply_all = [&](auto blocks) {
      constexpr int B = decltype(blocks)::value;
      u32 a[2][2][4];
      int stage = turn, before = 0;                                       // WK divides the stages, see blocks.py
      u32 parity = 0;
#pragma unroll 1
      for (int i = turn; i < mine; i += WK) {
        barrier_wait(full + 8 * stage, parity);
        const u8* chunk = smem + stage * STAGE + X_BYTES + strip * CHUNK;
        const Codes codes = load_codes<false>(chunk + lane_codes(lane), chunk + lane_aux(lane));
        const u64 b = descriptor(shared(smem + stage * STAGE));
        // While one unit is multiplied the next is made: its registers are free once all but one group are done.
        auto multiply = [&](u32 (&unit)[2][4], u64 columns) {
          wgmma_open();
          wgmma<B>(acc, unit[0], columns), wgmma<B>(acc, unit[1], columns + (32 >> 4));
          wgmma_commit();
        };
        wgmma_wait<1>();
        weights<0>(codes, table, a[0]);
        multiply(a[0], b);
        wgmma_wait<1>();
        if (i >= WK && lane == 0) barrier_arrive(empty + 8 * before);       // the chunk before has been multiplied
        weights<1>(codes, table, a[1]);
        multiply(a[1], b + (64 >> 4));
        wgmma_wait<1>();
        weights<2>(codes, table, a[0]);
        multiply(a[0], b + (HALF_OF_X >> 4));
        wgmma_wait<1>();
        weights<3>(codes, table, a[1]);
        multiply(a[1], b + (HALF_OF_X + 64 >> 4));
        before = stage, stage += WK;
        if (stage >= p.stages) stage -= p.stages, parity ^= 1;
      }
      wgmma_wait<0>();
    };
#if EXPERTS
    const int used = (batch + 7) / 8;
    if (NB >= 8 && used <= NB / 4) multiply_all(Index<NB / 4 < 2 ? 2 : NB / 4>{});
    else if (NB >= 4 && used <= NB / 2) multiply_all(Index<NB / 2 < 2 ? 2 : NB / 2>{});
    else if (NB >= 8 && used <= NB * 3 / 4) multiply_all(Index<NB < 8 ? NB : NB * 3 / 4>{});
    else
#endif
      multiply_all(Index<NB>{});
  }

  // Sum the splits of K in a fixed order. partial[turn][m][row] overlays the stages.
  __syncthreads();
  float* partial = reinterpret_cast<float*>(smem);
  constexpr int rows = 16 * STRIPS, stride = rows + 4;
  if (warp < WARPS) {
#pragma unroll
    for (int n = 0; n < NB; n++) {
      if (EXPERTS && 8 * n >= batch) break;
      float* to = partial + (turn * 8 * NB + 8 * n + 2 * tig) * stride + strip * 16 + g;
      to[0] = acc[4 * n], to[stride] = acc[4 * n + 1], to[8] = acc[4 * n + 2], to[stride + 8] = acc[4 * n + 3];
    }
  }
  store_sums({p.y + u64(m0) * p.N, p.bias, p.t_up, p.N}, partial, rows, stride, strip0 * 16, WK, 8 * NB, batch, splits, rank);
}
