// x R t on the way in, where R is a block Hadamard matrix with signs (format/rotation.py), by tensor cores.
//
// Compile-time switch: ROTATE, the columns of a block, a power of two from 8 to 1024; 0 where x is not rotated.
//
// A Sylvester-Hadamard matrix is a product over the bits of a column's number, so that each bit can be transformed where it
// is. A warp takes 256 columns as a 16 x 16 matrix that is multiplied from both sides: bits 0, 1, 3 and 4 by `first`, after
// which the sums lie as the A operand of the next product wants them, then bits 2, 5, 6 and 7 by `second`. Bits 8 and 9
// belong to other 256 columns of the same lane: sums and differences in fp32. For a smaller block the upper bits are left as
// they are. Between both products sums are rounded to 16 bits, and once more when t is on them: as often as R^T x and then
// x t by themselves.
#pragma once
#include "linear.cuh"

#ifndef ROTATE
#define ROTATE 0
#endif
#define ONES 0x3c003c00u                             // a pair of t that changes nothing
#if ROTATE

#define TURNS (ROTATE > 256 ? ROTATE / 256 : 1)     // times 256 columns that a warp takes at once

constexpr int log2_of(int v) { return v > 1 ? 1 + log2_of(v / 2) : 0; }
#define LOG_ROTATE log2_of(ROTATE)

struct Hadamard { u32 first[4], second[2][2]; };    // a lane's share of both matrices

__device__ __forceinline__ int bit(int value, int at) { return value >> at & 1; }

// Bit `at` of a column's number: +1 or -1 where the block reaches so far, by its value before and after; else they are equal.
struct Entry {
  int minus = 0;
  bool zero = false;
  __device__ __forceinline__ void over(int at, int before, int after) {
    if (ROTATE > 1 << at) minus ^= before & after;
    else zero |= before != after;
  }
};

__device__ __forceinline__ Hadamard hadamard(int lane) {
  constexpr u32 quarter = BF16 ? 0x3e803e80u : 0x34003400u;                 // sums stay finite
  constexpr u32 rest = (BF16 ? 0x3f803f80u : 0x3c003c00u) + (2 - LOG_ROTATE / 2) * (BF16 ? 0x00800080u : 0x04000400u);
  constexpr u32 low = 0x8000u, high = 0x80000000u;
  Hadamard h;
  Entry entry;
  entry.over(3, bit(lane, 0), bit(lane, 3)), entry.over(4, bit(lane, 1), bit(lane, 4));
  h.first[0] = entry.zero ? 0 : entry.minus ? quarter ^ (low | high) : quarter;
  h.first[1] = h.first[0] ^ high;
  h.first[2] = h.first[0] ^ (bit(lane, 2) ? low | high : 0);
  h.first[3] = h.first[2] ^ high;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    Entry entry;
    entry.over(6, bit(lane, 0), bit(lane, 2)), entry.over(7, bit(lane, 1), n);
    u32 pair = entry.zero ? 0 : entry.minus ? rest ^ (low | high) : rest;
    if (bit(lane, 4)) pair = ROTATE > 32 ? pair ^ high : pair & 0xffff0000u;
    else if (ROTATE <= 32) pair &= 0xffffu;
    h.second[n][0] = pair, h.second[n][1] = pair ^ (bit(lane, 3) ? low | high : 0);
  }
  return h;
}

// Of 256 columns, which pair is a lane's first after the products; the other three are 32, 64 and 96 further.
__device__ __forceinline__ int first_pair(int lane) {
  return bit(lane, 2) | bit(lane, 0) << 1 | bit(lane, 3) << 2 | bit(lane, 4) << 3 | bit(lane, 1) << 4;
}

// The signs of the 8 columns from k on, as `rotate` wants them: those of pair i in bits 15 - i and 31 - i.
__device__ __forceinline__ u32 signs_of(const u8* signs, int k, int K) {
  const u32 s = signs && k < K ? signs[k / 8] : 0;
  return (s & 1) << 15 | (s & 2) << 30 | (s & 4) << 12 | (s & 8) << 27 | (s & 16) << 9 | (s & 32) << 24 | (s & 64) << 6 |
         (s & 128) << 21;
}

constexpr float rotation_norm() {                   // 4 / sqrt(ROTATE)
  float norm = LOG_ROTATE % 2 ? 4 * 0.70710678f : 4.f;
  for (int i = 0; i < LOG_ROTATE / 2; i++) norm /= 2.f;
  return norm;
}

// A pair of t as `rotate` multiplies with it; `down` as in `scaled`.
__device__ __forceinline__ float2 factors_of(u32 t, float down) {
  const float norm = (LOG_ROTATE % 2 ? 0.70710678f : 1.f) * (BF16 ? 1.f : down);
  return {from_half(u16(t)) * norm, from_half(u16(t >> 16)) * norm};
}

// x R t of a warp's 256 TURNS columns, x as `load_x` gives it to lane after lane; the first `pairs` pairs of columns, a
// multiple of 64, go to `to` in shared memory, in their order. factors(q, i): of pair 128 q + 32 i + first_pair(lane).
template <class F>
__device__ __forceinline__ void rotate(const uint4 (&x)[TURNS], const u32 (&signs)[TURNS], const Hadamard& h, F factors,
                                       u32* to, int pairs, int lane) {
  float y[TURNS][2][4];
#pragma unroll
  for (int q = 0; q < TURNS; q++) {
    u32 v[4] = {x[q].x, x[q].y, x[q].z, x[q].w};
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] ^= signs[q] << i & 0x80008000u;
    float c[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; n++) mma(c[n], h.first[0], h.first[1], h.first[2], h.first[3], v[2 * n], v[2 * n + 1]);
    const u32 a[4] = {round2(c[0][0], c[0][1]), round2(c[0][2], c[0][3]), round2(c[1][0], c[1][1]), round2(c[1][2], c[1][3])};
#pragma unroll
    for (int n = 0; n < 2; n++) {
      y[q][n][0] = y[q][n][1] = y[q][n][2] = y[q][n][3] = 0.f;
      mma(y[q][n], a[0], a[1], a[2], a[3], h.second[n][0], h.second[n][1]);
    }
  }
#pragma unroll
  for (int step = 1; step < TURNS; step *= 2)
#pragma unroll
    for (int q = 0; q < TURNS; q++)
      if (!(q & step))
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float &low = y[q][i / 4][i % 4], &high = y[q + step][i / 4][i % 4];
          const float sum = low + high;
          high = low - high, low = sum;
        }
#pragma unroll
  for (int q = 0; q < TURNS; q++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (TURNS == 1 && 32 * i >= pairs) break;
      const float2 t = factors(q, i);
      to[128 * q + 32 * i + first_pair(lane)] = round2(y[q][i / 2][i % 2] * t.x, y[q][i / 2][2 + i % 2] * t.y);
    }
}

// Where a thread of 128 is in a row of x that a kernel rotates for all blocks: its warp has 256 TURNS columns.
struct RowPart {
  int warp, lane, vector, pairs;                    // `vector`: the thread's first 8 columns; pairs left from the warp's first
  __device__ __forceinline__ RowPart(int block, int chunks) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = (block * 4 + warp) * 32 * TURNS;
    vector = first + lane, pairs = 64 * chunks - 4 * first;
  }
};

// x R t of the warp's columns of one row, once the kernel in front has ended: the thread's 8 columns of every 256, 32 vectors
// apart, in the block's 2048 TURNS bytes of shared memory. Whole warps.
__device__ __forceinline__ const uint4* rotated(const u16* x, u64 x_stride, const u16* t, const u8* signs, int K,
                                                float down, const RowPart& part, u8* memory) {
  const int first = 8 * (part.vector - part.lane);
  const Hadamard h = hadamard(part.lane);
  u32 signs_of_x[TURNS];
  float2 factors[TURNS][4];
#pragma unroll
  for (int q = 0; q < TURNS; q++) {
    signs_of_x[q] = signs_of(signs, 8 * (part.vector + 32 * q), K);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int pair = 128 * q + 32 * i + first_pair(part.lane);
      factors[q][i] = factors_of(t && pair < part.pairs ? *reinterpret_cast<const u32*>(t + first + 2 * pair) : ONES, down);
    }
  }
  uint4 values[TURNS], *turned = reinterpret_cast<uint4*>(memory) + part.warp * 32 * TURNS;
  const bool wide = aligned_rows(x, x_stride, nullptr, K);
  await_previous_kernel();
#pragma unroll
  for (int q = 0; q < TURNS; q++) values[q] = load_x(x, nullptr, 8 * (part.vector + 32 * q), K, wide);
  rotate(values, signs_of_x, h, [&](int q, int i) { return factors[q][i]; }, reinterpret_cast<u32*>(turned), part.pairs, part.lane);
  __syncwarp();
  return turned + part.lane;
}
#endif
