// x R t on the way in, where R is a block Hadamard matrix with signs (format/rotation.py), by tensor cores.
//
// Compile-time switch: ROTATE, the columns of a block, a power of two from 8 to 1024; 0 where x is not rotated.
//
// A Sylvester-Hadamard matrix is a product over the bits of a column's number, so that each bit can be transformed where it
// is. A warp takes 256 columns as a 16 x 16 matrix that is multiplied from both sides: bits 0, 3, 4 and C by `first`, after
// which the sums lie as the A operand of the next product wants them, then bits 5, 6, 7 and G by `second`. Two more bits are
// sums and differences in fp32. For a smaller block the upper bits are left as they are. Between both products sums are
// rounded to 16 bits, and once more when t is on them: as often as R^T x and then x t by themselves.
#pragma once
#include "linear.cuh"

#ifndef ROTATE
#define ROTATE 0
#endif
#if ROTATE

constexpr int log2_of(int v) { return v > 1 ? 1 + log2_of(v / 2) : 0; }
#define LOG_ROTATE log2_of(ROTATE)

#define ONES 0x3c003c00u                             // a pair of t that changes nothing

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

// C and G: the bits of a column's number that tell the registers b0 and b1 apart, and one of the first products from the other.
template <int C, int G> __device__ __forceinline__ Hadamard hadamard(int lane) {
  constexpr u32 quarter = BF16 ? 0x3e803e80u : 0x34003400u;                 // sums stay finite
  constexpr u32 rest = (BF16 ? 0x3f803f80u : 0x3c003c00u) + (2 - LOG_ROTATE / 2) * (BF16 ? 0x00800080u : 0x04000400u);
  constexpr u32 low = 0x8000u, high = 0x80000000u;
  Hadamard h;
  Entry entry;
  entry.over(3, bit(lane, 0), bit(lane, 3)), entry.over(4, bit(lane, 1), bit(lane, 4));
  h.first[0] = entry.zero ? 0 : entry.minus ? quarter ^ (low | high) : quarter;
  const u32 unit = h.first[0];
  h.first[2] = unit ^ (bit(lane, 2) ? low | high : 0);
  if (ROTATE <= 1 << C) h.first[0] = bit(lane, 2) ? 0 : unit, h.first[2] = bit(lane, 2) ? unit : 0;
  h.first[1] = h.first[0] ^ high, h.first[3] = h.first[2] ^ high;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    Entry entry;
    entry.over(6, bit(lane, 0), bit(lane, 2)), entry.over(7, bit(lane, 1), n);
    u32 pair = entry.zero ? 0 : entry.minus ? rest ^ (low | high) : rest;
    if (bit(lane, 4)) pair = ROTATE > 32 ? pair ^ high : pair & 0xffff0000u;
    else if (ROTATE <= 32) pair &= 0xffffu;
    h.second[n][0] = pair, h.second[n][1] = pair ^ (bit(lane, 3) ? low | high : 0);
    if (ROTATE <= 1 << G) h.second[n][0] = bit(lane, 3) ? 0 : pair, h.second[n][1] = bit(lane, 3) ? pair : 0;
  }
  return h;
}

constexpr float rotation_norm() {                   // 4 / sqrt(ROTATE)
  float norm = LOG_ROTATE % 2 ? 4 * 0.70710678f : 4.f;
  for (int i = 0; i < LOG_ROTATE / 2; i++) norm /= 2.f;
  return norm;
}

// A pair of t as the rotated x is multiplied with it; `down` as in `scaled`.
__device__ __forceinline__ float2 factors_of(u32 t, float down) {
  const float norm = (LOG_ROTATE % 2 ? 0.70710678f : 1.f) * (BF16 ? 1.f : down);
  return {from_half(u16(t)) * norm, from_half(u16(t >> 16)) * norm};
}

// A row of x by teams of four warps, which have 1024 columns each: a warp has those of one pair of bits 1 and 2, whose products
// are those of bit 0 and bits 3 to 9. Bits 1 and 2 are transformed where a thread has its 8 columns, after an exchange through
// 4096 bytes of shared memory a team, in which pairs of columns lie so that no banks collide.
struct Team {
  int warp, lane, thread;                           // within the team
  Hadamard h;
  float2* slots;
  __device__ __forceinline__ explicit Team(u8* memory) : warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {
    thread = threadIdx.x % 128, h = hadamard<8, 9>(lane);
    slots = reinterpret_cast<float2*>(memory) + threadIdx.x / 128 * 512;
  }
  // Of what a lane loads of the 1024 columns from k on the signs, which are there before x is.
  __device__ __forceinline__ void load_signs(const u8* signs, int k, int K, u32 (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = k + 8 * lane + 256 * i;
      const u32 s = signs && at < K ? signs[at / 8] >> (2 * warp) : 0;
      pairs[i] = (s << 15 & 0x8000u) | (s << 30 & 0x80000000u);
    }
  }
  __device__ __forceinline__ void load(const u16* x, int k, int K, bool wide, u32 (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = k + 8 * lane + 256 * i + 2 * warp;
      if (at < K) pairs[i] ^= wide ? *reinterpret_cast<const u32*>(x + at) : x[at] | u32(x[at + 1]) << 16;
    }
  }
  // Where a pair lies, by bits 1 to 9 of its columns: bits 5, 6, 8 and 9 move bits 1, 2 and 4.
  static __device__ __forceinline__ int slot(int pair) {
    return pair ^ (bit(pair, 4) | (bit(pair, 5) ^ bit(pair, 7)) << 1 | bit(pair, 8) << 3);
  }
  // The thread's 8 columns of x R t; `t` are those of them as stored, `down` as in `scaled`. Has a barrier of the block.
  __device__ __forceinline__ uint4 turn(const u32 (&pairs)[4], uint4 t, float down) const {
    float c[2][4] = {}, y[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; n++) mma(c[n], h.first[0], h.first[1], h.first[2], h.first[3], pairs[2 * n], pairs[2 * n + 1]);
    const u32 a[4] = {round2(c[0][0], c[0][1]), round2(c[0][2], c[0][3]), round2(c[1][0], c[1][1]), round2(c[1][2], c[1][3])};
#pragma unroll
    for (int n = 0; n < 2; n++) mma(y[n], a[0], a[1], a[2], a[3], h.second[n][0], h.second[n][1]);
    const int pair = warp | bit(lane, 3) << 2 | bit(lane, 4) << 3 | bit(lane, 1) << 4 | bit(lane, 2) << 7 | bit(lane, 0) << 8;
#pragma unroll
    for (int i = 0; i < 4; i++) slots[slot(pair | i << 5)] = {y[i / 2][i % 2], y[i / 2][2 + i % 2]};
    __syncthreads();
    float2 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = slots[slot(4 * thread + i)];
    round_of_two(v[0], v[1]), round_of_two(v[2], v[3]);
    round_of_two(v[0], v[2]), round_of_two(v[1], v[3]);
    return {product(v[0], t.x, down), product(v[1], t.y, down), product(v[2], t.z, down), product(v[3], t.w, down)};
  }
  static __device__ __forceinline__ void round_of_two(float2& low, float2& high) {
    const float2 sum = {low.x + high.x, low.y + high.y};
    high = {low.x - high.x, low.y - high.y}, low = sum;
  }
  static __device__ __forceinline__ u32 product(float2 v, u32 t, float down) {
    const float2 factor = factors_of(t, down);
    return round2(v.x * factor.x, v.y * factor.y);
  }
};

// Of a row of x: columns 8 v to 8 v + 7 of x R t, in blocks of 128 threads, once the kernel in front has ended.
__device__ __forceinline__ uint4 rotated(const u16* x, u64 x_stride, const u16* t, const u8* signs, int K, int chunks, float down,
                                         int v, u8* memory) {
  const Team team(memory);
  const int first = 8 * (v - team.thread);
  const uint4 factors = t && v < 16 * chunks ? *reinterpret_cast<const uint4*>(t + 8 * v) : uint4{ONES, ONES, ONES, ONES};
  u32 pairs[4];
  team.load_signs(signs, first, K, pairs);
  await_previous_kernel();
  team.load(x, first, K, aligned_rows(x, x_stride, nullptr, K), pairs);
  return team.turn(pairs, factors, down);
}
#endif
