// y = x W^T + b for batches of 1 to 16: weights of 2, 3, 4 or 8 bits in the layout of tiles.py; compiled at run time.
//
// Compile-time switches: those of codes.cuh and MB (8-row blocks of the batch), ONE 0|1 (row in the batch), RT (16-row
// strips of the weight per warp), RING 0|1, DEPTH (chunks under way per warp without RING), PLAIN
// 0|1 (for GPUs before Hopper: no RING, one split of K between blocks), EXPERTS 0|1 (every row has a matrix of its own),
// GATED 0|1 (of EXPERTS: what is multiplied is silu(x) * factors), SUMMED 0|1 (of GATED: a token's pairs are added up,
// each times its score; every pair has its own warps along K), NORM 0|1 (of ONE row: x is normalized, times factors),
// TOGETHER (weights of one row in one launch).
//
// How it reaches memory bandwidth. The weights are the A operand of mma.m16n8k16, the batch its narrow side of 8, so
// batch 1 to 8 cost the same and nothing is padded to 64. Two weights cost one lop3 and at most one shift: their bits
// are left where they are in the word as long as that is within a mantissa, under the exponent that makes their lowest
// bit count as 1, which is the 16-bit float 2^e + q exactly; e depends on the place alone. The products of one group are
// summed by the tensor core in fp32, starting from -zero * sum(x t) - sum(2^e x t), so the zero point and the 2^e cost
// one FMA per group and output; scale is applied to that sum. Of ONE row every block multiplies t into x itself, and
// fetches t, like the first weights, before it waits for the kernel in front; for more rows `scale_input` does it once,
// and a warp waits for no more of x than its next chunk needs. Every warp streams its own chunks through a ring in
// shared memory filled by bulk copies (no barrier between warps), and the K splits are summed in a fixed order: within a
// block through shared memory, between the blocks of a cluster through distributed shared memory. No atomics: results
// are the same in every run.

#include "row.cuh"

#ifndef EXPERTS
#define EXPERTS 0
#endif
#ifndef SUMMED
#define SUMMED 0
#endif
#ifndef RT
#define RT 1
#endif
#ifndef RING
#define RING 0
#endif
#ifndef DEPTH
#define DEPTH 1
#endif
#ifndef TOGETHER
#define TOGETHER 1
#endif

struct Problem {
  const u8* tiles;        // [experts][strips][chunks][CHUNK]
  const void* x;          // ONE: [M, K] in 16 bits, rows x_stride apart; else records [M / (8 MB)][chunks] of x * t
  const u16* t;           // fp16 [experts][128 * chunks], in stored column order, or null
  const int* permutation; // [experts][K] stored column -> column of x, or null
  const u8* signs;        // of the rotation of ONE row, a bit a column, or null
  const float* codebook;  // [16] or null
  const u16* bias;        // [N] or null; SUMMED: what is added, [tokens, N]
  const long long* experts;  // [pairs]: row p of x goes to expert experts[p] (M is 1 then), or null: to matrix p
  u16* y;                 // [M, N]
  u64 x_stride;
  u64 expert_bytes;       // from one matrix of a stack to the next
  int expert_t;           // from one t to the next
  long long next_tiles, next_t, next_permutation, next_y;  // bytes to those of a second stack that reads the same x
  float t_down, t_up;     // a power of two that keeps x * t finite in fp16, and its inverse
  int M, N, K, strips, chunks;
  int per, log_splits_in_block;  // chunks of K per block; log2 of its warps along K
  int stages, pairs, pairs_per_row;  // blockIdx.z is a pair of the first stack, then of the second
  int last_expert;                // an expert after it lives elsewhere: its result is not used
  int log_warps_of_row;           // along K: all of a block's, or SUMMED those of a pair
  const u16* factors;             // GATED: rows as those of x; NORM: [K]
  const void* scores;             // SUMMED: [pairs], in fp32 or as y
  int scores_in_fp32;
  float epsilon;                  // of NORM
};

struct Problems {  // several weights of one K that multiply the same row of x
  Problem each[TOGETHER];
  int first[TOGETHER];    // clusters of those before
};

template <int S>
__device__ __forceinline__ void subgroup(const Codes (&codes)[RT], const Table& table,
                                         const u8* x_row, const float* sums,
                                         float (&acc)[RT][MB][4]) {
  constexpr int units = SUB / 32;
  u32 a[RT][units][2][4];
  float scale[RT][2], zero[RT][2];
#pragma unroll
  for (int r = 0; r < RT; r++) {
    unpack<S * units>(codes[r], 0, table, a[r][0][0]);
    unpack<S * units>(codes[r], 1, table, a[r][0][1]);
    if constexpr (units == 2) {
      unpack<S * units + units - 1>(codes[r], 0, table, a[r][units - 1][0]);
      unpack<S * units + units - 1>(codes[r], 1, table, a[r][units - 1][1]);
    }
    decode_aux(codes[r], S * SUB / GROUP, scale[r], zero[r]);
  }
  float c[MB][RT][4];
#pragma unroll
  for (int j = 0; j < MB; j++) {
#if CODEBOOK
#pragma unroll
    for (int r = 0; r < RT; r++) c[j][r][0] = c[j][r][1] = c[j][r][2] = c[j][r][3] = 0.f;
#else
    float4 sum = *reinterpret_cast<const float4*>(sums + 2 * (S * 8 * MB + 8 * j));
#pragma unroll
    for (int r = 0; r < RT; r++) {
      c[j][r][0] = sum.y - zero[r][0] * sum.x, c[j][r][1] = sum.w - zero[r][0] * sum.z;
      c[j][r][2] = sum.y - zero[r][1] * sum.x, c[j][r][3] = sum.w - zero[r][1] * sum.z;
    }
#endif
  }
#pragma unroll
  for (int u = 0; u < units; u++) {
    uint4 b[MB];
#pragma unroll
    for (int j = 0; j < MB; j++)
      b[j] = *reinterpret_cast<const uint4*>(x_row + j * 8 * X_ROW + (S * units + u) * 64);
#pragma unroll
    for (int j = 0; j < MB; j++)
#pragma unroll
      for (int r = 0; r < RT; r++)
        mma(c[j][r], a[r][u][0][0], a[r][u][1][0], a[r][u][0][1], a[r][u][1][1], b[j].x, b[j].y);
#pragma unroll
    for (int j = 0; j < MB; j++)
#pragma unroll
      for (int r = 0; r < RT; r++)
        mma(c[j][r], a[r][u][0][2], a[r][u][1][2], a[r][u][0][3], a[r][u][1][3], b[j].z, b[j].w);
  }
#pragma unroll
  for (int j = 0; j < MB; j++)
#pragma unroll
    for (int r = 0; r < RT; r++) {
      acc[r][j][0] += scale[r][0] * c[j][r][0], acc[r][j][1] += scale[r][0] * c[j][r][1];
      acc[r][j][2] += scale[r][1] * c[j][r][2], acc[r][j][3] += scale[r][1] * c[j][r][3];
    }
}

template <class T> __device__ __forceinline__ T* moved(T* p, long long bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<u64>(p) + bytes);
}

#if TOGETHER > 1
extern "C" __global__ void __launch_bounds__(512) dual_linear(const __grid_constant__ Problems all) {
  int which = 0;
#pragma unroll
  for (int i = 1; i < TOGETHER; i++) which += int(cluster_index()) >= all.first[i];
  const Problem& p = all.each[which];
  const int before = all.first[which];
#else
extern "C" __global__ void __launch_bounds__(512) dual_linear(const __grid_constant__ Problem p) {
  constexpr int before = 0;
#endif
  SHARED_MEMORY(smem);
  if (EXPERTS && !GATED && p.experts) await_previous_kernel();  // it may be what chose the experts
  allow_next_kernel();  // so what reads what this kernel makes of its experts, GATED, finds them chosen when it starts
  const u32 splits = cluster_size(), rank = cluster_rank();
  const int warps = blockDim.x / 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int g = lane / 4, tig = lane % 4;
  // Shifts instead of divisions: they are on the way to the first weights.
  const int WK = 1 << p.log_splits_in_block, WR = warps >> p.log_splits_in_block;
  const int wr = warp >> p.log_splits_in_block, wk = warp & (WK - 1);
  const int rows = 16 * RT * WR;                                        // of the weight, in this block
  const int row0 = (int(cluster_index()) - before) * rows;
  const int lo = min(int(rank) * p.per, p.chunks), hi = min(lo + p.per, p.chunks);
  const int m0 = blockIdx.y * 8 * MB, batch = min(p.M - m0, 8 * MB);
  auto chosen = [&](int pair) { return int(p.experts ? static_cast<const volatile long long*>(p.experts)[pair] : pair); };  // past L1
  const int second = EXPERTS && blockIdx.z >= p.pairs ? 1 : 0, apart = 1 << p.log_warps_of_row;
  const int slot = SUMMED ? wk >> p.log_warps_of_row : 0, part = wk & (apart - 1);  // of a token's pairs; of a row's warps
  const int pair = SUMMED ? blockIdx.z * p.pairs_per_row + min(slot, p.pairs_per_row - 1) : blockIdx.z - second * p.pairs;
  const int expert = EXPERTS ? min(chosen(pair), p.last_expert) : 0;
  const u8* tiles = p.tiles + second * p.next_tiles;

  // Shared memory: the warps' rings and their barriers (RING), then x * t and its sums: ONE row of each, else records
  // and a barrier for each of them. What is summed at the end overlays x, but no barrier: its memory is not to be used.
  const int partial_bytes = 8 * MB * WK * (rows + 4) * 4;
  const int ring_bytes = RING ? (warps * p.stages * (RT * CHUNK + 8) + 127) & ~127 : 0;
  u8* xs = smem + ring_bytes;
  u8* sums = xs + (ONE ? (SUMMED ? p.pairs_per_row : 1) * p.per * X_STEP : 8 * MB * X_ROW);
  const u32 x_bar = shared(xs + max(p.per * RECORD, partial_bytes));

  const u8* source[RT];
#pragma unroll
  for (int r = 0; r < RT; r++) {
    int strip = min(row0 / 16 + wr * RT + r, p.strips - 1);
    source[r] = tiles + expert * p.expert_bytes + (u64(strip) * p.chunks + lo + part) * CHUNK;
  }
  const bool idle = SUMMED && (slot >= p.pairs_per_row || chosen(pair) > p.last_expert);
  const int mine = idle ? 0 : max(0, (hi - lo - part + apart - 1) >> p.log_warps_of_row);  // chunks lo + part, + apart, ...

  // The first weights are on their way before anything waits: they do not depend on the previous kernel.
#if RING
  u8* ring = smem + warp * p.stages * RT * CHUNK;
  const u32 bar = shared(smem + warps * p.stages * RT * CHUNK + warp * p.stages * 8);
  auto fetch = [&](int i, int stage) {
    barrier_expect(bar + 8 * stage, RT * CHUNK);
#pragma unroll
    for (int r = 0; r < RT; r++)
      bulk_copy(shared(ring + (stage * RT + r) * CHUNK), source[r] + i * (apart * CHUNK), CHUNK, bar + 8 * stage);
  };
  if (lane == 0) {
#pragma unroll 1
    for (int s = 0; s < p.stages; s++) barrier_init(bar + 8 * s);
    publish_barriers();
#pragma unroll 1
    for (int s = 0; s < min(p.stages, mine); s++) fetch(s, s);
  }
  __syncwarp();
#else
  Codes held[DEPTH + 1][RT];
  const u8 *codes_at = source[0] + lane_codes(lane), *aux_at = source[0] + lane_aux(lane);
  const u32 step = apart * CHUNK, next_strip = RT == 1 || source[RT - 1] == source[0] ? 0 : p.chunks * CHUNK;
  auto fetch = [&](Codes (&to)[RT]) {
#pragma unroll
    for (int r = 0; r < RT; r++) to[r] = load_codes<true>(codes_at + r * next_strip, aux_at + r * next_strip);
    codes_at += step, aux_at += step;
  };
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (d < mine) fetch(held[d]);
#endif
  const int chunks = hi - lo;
#if ONE
  const u16* t = p.t ? moved(p.t, second * p.next_t) + u64(expert) * p.expert_t + lo * 128 : nullptr;
  const u16* x = static_cast<const u16*>(p.x) + u64(SUMMED ? pair : EXPERTS ? pair / p.pairs_per_row : m0) * p.x_stride;
  uint4* row = reinterpret_cast<uint4*>(xs) + slot * 16 * chunks;       // 8 columns each
  float up = p.t_up;
#if ROTATE
  rotate_row({x, p.x_stride, t, p.signs, p.K, p.t_down}, lo, chunks, row, sums);
  __syncthreads();
#else
  const int* permutation =
      p.permutation ? moved(p.permutation, second * p.next_permutation) + u64(expert) * p.K : nullptr;
  const u16* factors = GATED ? p.factors + u64(SUMMED ? pair : pair / p.pairs_per_row) * p.x_stride : p.factors;
  const int vectors = idle ? 0 : 16 * chunks, first = 32 * (SUMMED ? part : warp), turn = SUMMED ? 32 * apart : blockDim.x;
  const float squares = put_row({x, factors, t, permutation, p.K, p.t_down}, lo, vectors, first, turn, row,
                                reinterpret_cast<Sums*>(sums) + slot * chunks * SUBS * 8);
  float* of_warps = reinterpret_cast<float*>(sums + chunks * SUMS_STEP);
  if (NORM && lane == 0) of_warps[warp] = squares;
  __syncthreads();
  if (NORM) {
    float total = 0.f;
    for (int w = 0; w < warps; w++) total += of_warps[w];
    up *= rsqrtf(total / p.K + p.epsilon);
  }
#endif
  const float score = SUMMED && mine ? load_score(p.scores, pair, p.scores_in_fp32) : 0.f;
#else
  const float up = p.t_up;
#endif
#if PLAIN && !ONE
  const u8* records = static_cast<const u8*>(p.x) + u64(blockIdx.y) * p.chunks * RECORD;
  for (int v = threadIdx.x; v < p.chunks * (RECORD / 16); v += blockDim.x) copy16(shared(xs) + 16 * v, records + 16 * v);
  await_copies();
  __syncthreads();
#elif !ONE  // chunk by chunk, so that the first products do not wait for all of x
  for (int i = threadIdx.x; i < chunks; i += blockDim.x) barrier_init(x_bar + 8 * i);
  publish_barriers();
  __syncthreads();
  await_previous_kernel();
  const u8* records = static_cast<const u8*>(p.x) + (u64(blockIdx.y) * p.chunks + lo) * RECORD;
  for (int i = wk + lane * WK; wr == 0 && i < chunks; i += 32 * WK) {
    barrier_expect(x_bar + 8 * i, RECORD);
    bulk_copy(shared(xs + i * RECORD), records + i * RECORD, RECORD, x_bar + 8 * i);
  }
#endif
  Table table = {};
#if CODEBOOK
  table = load_table(p.codebook);
#endif

  float acc[RT][MB][4];
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int n = 0; n < MB; n++) acc[r][n][0] = acc[r][n][1] = acc[r][n][2] = acc[r][n][3] = 0.f;

  // What the last block of 8 computes beyond the batch is garbage of its own columns, and nobody reads it.
  const int at = slot * chunks + part;
  const u8* x_lane = xs + at * X_STEP + (ONE ? 0 : g) * X_ROW + tig * 16;
  const u8* sum_lane = sums + at * SUMS_STEP + 2 * tig * 8;
  u32 arrival = x_bar + 8 * wk;
  auto multiply = [&](const Codes (&codes)[RT]) {
    if (!ONE && !PLAIN) barrier_wait(arrival, 0);
    const u8* x_row = x_lane;
    const float* sub_sums = reinterpret_cast<const float*>(sum_lane);
    arrival += 8 * WK, x_lane += apart * X_STEP, sum_lane += apart * SUMS_STEP;
    subgroup<0>(codes, table, x_row, sub_sums, acc);
    subgroup<1>(codes, table, x_row, sub_sums, acc);
    if constexpr (SUBS == 4) {
      subgroup<SUBS - 2>(codes, table, x_row, sub_sums, acc);
      subgroup<SUBS - 1>(codes, table, x_row, sub_sums, acc);
    }
  };
#if RING
  int stage = 0;
  u32 parity = 0;
  for (int i = 0; i < mine; i++) {
    barrier_wait(bar + 8 * stage, parity);
    Codes codes[RT];
#pragma unroll
    for (int r = 0; r < RT; r++) {
      const u8* chunk = ring + (stage * RT + r) * CHUNK;
      codes[r] = load_codes<false>(chunk + lane_codes(lane), chunk + lane_aux(lane));
    }
    __syncwarp();  // every lane has read this stage
    if (lane == 0 && i + p.stages < mine) fetch(i + p.stages, stage);
    multiply(codes);
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }
#else
  for (int i = 0; i < mine; i += DEPTH + 1) {
#pragma unroll
    for (int d = 0; d <= DEPTH; d++) {
      if (i + d >= mine) break;
      if (i + d + DEPTH < mine) fetch(held[(d + DEPTH) % (DEPTH + 1)]);
      multiply(held[d]);
    }
  }
#endif

  // Sum the splits of K in a fixed order. partial[wk][m][row] overlays x.
  __syncthreads();
#if SUMMED
#pragma unroll
  for (int r = 0; r < RT; r++) acc[r][0][0] *= score, acc[r][0][2] *= score;  // of the one row; the rest is not read
#endif
  float* partial = reinterpret_cast<float*>(xs);
  const int stride = rows + 4;
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int n = 0; n < MB; n++) {
      const int m = 8 * n + 2 * tig, row = (wr * RT + r) * 16 + g;
      float* to = partial + (wk * 8 * MB + m) * stride + row;
      to[0] = acc[r][n][0], to[stride] = acc[r][n][1], to[8] = acc[r][n][2], to[stride + 8] = acc[r][n][3];
    }
  u16* y = moved(p.y, second * p.next_y) + u64(SUMMED ? blockIdx.z : EXPERTS ? pair : m0) * p.N;
  const u16* bias = SUMMED && p.bias ? p.bias + u64(blockIdx.z) * p.N : p.bias;
  store_sums({y, bias, up, p.N}, partial, rows, stride, row0, WK, 8 * MB, batch, splits, rank);
}
