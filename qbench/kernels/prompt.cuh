// A prompt's weights, of which several are multiplied in one launch, and a tile's way from sums to y.
#pragma once
#include "linear.cuh"

#ifndef TOGETHER
#define TOGETHER 1
#endif
#define STRIPS (4 * GROUPS)                        // of 16 rows, per block; a warp each

struct Weight {
  const u8* tiles;        // [strips][chunks][CHUNK]
  const u16* t;           // fp16 [128 * chunks]; read if INPUT_SCALE
  const u16* bias;        // [N] or null
  u16* y;                 // [M, N]
  int N, strips, first, unused;  // first: of the tiles' rows, the one where it begins
};

__device__ __forceinline__ const Weight& weight_at(const Weight (&each)[TOGETHER], int row_block) {
  int i = 0;
#pragma unroll
  for (int j = 1; j < TOGETHER; j++)
    if (row_block >= each[j].first) i = j;
  return each[i];
}

// The first `count` of eight 16-bit floats.
__device__ inline void store_some(u16* to, uint4 v, int count) {
  const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (j < count) to[j] = u16(pairs[j / 2] >> (16 * (j % 2)));
}

// A warpgroup's sums, [64 rows of the weight from n0 on][8 NB rows of x from m0 on], of which 8-row blocks FIRST to LAST of x
// are written: 64 x 16 at a time are turned through the 2 KB of shared memory at `turn`, `turned` for C++, so that y is
// written in lines of 128 bytes. `group`: which warpgroup.
template <int FIRST, int LAST>
__device__ __forceinline__ void store_tile(const float (&acc)[4 * NB], const Weight& weight, int n0, int m0, int M, u32 turn,
                                           const u8* turned, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, N = weight.N;
  const int row = n0 + 16 * warp + lane / 4;
  const float first = weight.bias && row < N ? load16(weight.bias[row]) : 0.f;
  const float second = weight.bias && row + 8 < N ? load16(weight.bias[row + 8]) : 0.f;
  const int into = lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;  // its row of x, and its 8 rows of the weight
  const u32 to = turn + into * 128 + ((piece ^ into % 8) << 4);
  const int from = 4 * warp + lane / 8, n = n0 + lane % 8 * 8;
  const u8* found = turned + from * 128 + ((lane % 8 ^ from % 8) << 4);
  u16* y = weight.y + u64(m0 + 8 * FIRST + from) * N + n;
  const bool wide = N % 8 == 0 && n < N;
#pragma unroll
  for (int i = FIRST; i < LAST; i += 2) {
    const u32 v[4] = {round2(acc[4 * i] + first, acc[4 * i + 1] + first),
                      round2(acc[4 * i + 2] + second, acc[4 * i + 3] + second),
                      round2(acc[4 * i + 4] + first, acc[4 * i + 5] + first),
                      round2(acc[4 * i + 6] + second, acc[4 * i + 7] + second)};
    warpgroup_sync(group);
    store_transposed(to, v);
    warpgroup_sync(group);
    const uint4 pairs = *reinterpret_cast<const uint4*>(found);
    if (m0 + from + 8 * i < M) {
      if (wide) *reinterpret_cast<uint4*>(y) = pairs;
      else store_some(y, pairs, N - n);
    }
    y += 16 * u64(N);
  }
}
