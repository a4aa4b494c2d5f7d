// x * t and its sums, as dual_linear.cu reads them; a kernel that makes them for all blocks.
#pragma once
#include "rotate.cuh"

#ifndef MB
#define MB 1
#endif
#ifndef ONE
#define ONE 0
#endif

#define SUB (GROUP < 64 ? GROUP : 64)               // columns summed by the tensor core before a scale is applied
#define SUBS (128 / SUB)

// x * t of one chunk of K in shared memory. ONE row: 128 columns, and in another place Sums [SUBS][8], of which one of
// eight is used. Else a record that arrives as it is: rows of 128 columns, padded so that they start in different
// banks, then Sums [SUBS][8 MB].
#define X_ROW (ONE ? 256 : 320)                     // bytes
#define SUMS_OF_X (SUBS * 8 * MB * 8)               // bytes
#define RECORD (8 * MB * X_ROW + SUMS_OF_X)         // bytes
#define X_STEP (ONE ? X_ROW : RECORD)               // bytes from chunk to chunk
#define SUMS_STEP (ONE ? SUMS_OF_X : RECORD)

// Of x * t over one group, per row of the batch: what the zero point and the offsets of the codes are multiplied with.
struct Sums { float plain, offset; };                                  // sum(x t), -sum(2^e x t)

template <int U> __device__ __forceinline__ float offset_sum(float a, float b, float c, float d) {
  constexpr float first = offset(U, 0), second = offset(U, 1), third = offset(U, 2), fourth = offset(U, 3);
  return -(first * a + second * b) - (third * c + fourth * d);
}

// Whether every place has the same 2^e, as with 4 and 8 bits in bf16: then the one sum is a multiple of the other.
constexpr bool ONE_OFFSET = CODEBOOK || BITS == 8 || (BITS == 4 && BF16);

// Of columns k to k + 7.
__device__ __forceinline__ Sums sums_of(uint4 x, int k) {
  const float a = low(x.x) + high(x.x), b = low(x.y) + high(x.y), c = low(x.z) + high(x.z), d = low(x.w) + high(x.w);
  Sums sums = {(a + b) + (c + d), 0.f};
  if (ONE_OFFSET) return sums;
  const int unit = BITS == 2 ? k / 32 % 2 : BITS == 3 ? k / 32 % 4 : 0;
  if (unit == 0) sums.offset = offset_sum<0>(a, b, c, d);
  else if (unit == 1) sums.offset = offset_sum<1>(a, b, c, d);
  else if (unit == 2) sums.offset = offset_sum<2>(a, b, c, d);
  else sums.offset = offset_sum<3>(a, b, c, d);
  return sums;
}

__device__ __forceinline__ Sums over_lanes(Sums sums, u32 lanes) {
#pragma unroll
  for (int step = 1; step < SUB / 8; step *= 2) {
    sums.plain += __shfl_xor_sync(lanes, sums.plain, step);
    if (!ONE_OFFSET) sums.offset += __shfl_xor_sync(lanes, sums.offset, step);
  }
  if (ONE_OFFSET) sums.offset = -offset(0, 0) * sums.plain;
  return sums;
}

// x * t and its sums in records, for all blocks; a thread per 8 columns. Not called for ONE row.
extern "C" __global__ void __launch_bounds__(128)
scale_input(const u16* x, const u16* t, const int* permutation, u8* records, u64 x_stride, int K, int chunks, float t_down
#if ROTATE
            , const u8* signs
#endif
) {
  allow_next_kernel();
  const int m = blockIdx.y, n = m % (8 * MB);
  const int v = blockIdx.x * 128 + threadIdx.x, k = v * 8;
#if ROTATE
  SHARED_MEMORY(smem);
  const uint4 values = rotated(x + m * x_stride, x_stride, t, signs, K, chunks, t_down, v, smem);
  if (v / 16 >= chunks) return;                                         // whole half warps
#else
  if (v / 16 >= chunks) return;
  const uint4 factors = t ? *reinterpret_cast<const uint4*>(t + k) : uint4{};
  await_previous_kernel();
  uint4 values = load_x(x + m * x_stride, permutation, k, K, aligned_rows(x, x_stride, permutation, K));
  if (t) values = scaled(values, factors, t_down);
#endif
  u8* record = records + (u64(m / (8 * MB)) * chunks + v / 16) * RECORD;
  *reinterpret_cast<uint4*>(record + n * X_ROW + v % 16 * 16) = values;
  const Sums sum = over_lanes(sums_of(values, k), __activemask());
  if (v % (SUB / 8) == 0) reinterpret_cast<Sums*>(record + 8 * MB * X_ROW)[v % 16 / (SUB / 8) * 8 * MB + n] = sum;
}

#if ROTATE
struct Row {
  const u16* x;           // one row, in 16 bits; rows x_stride apart
  u64 x_stride;
  const u16* t;           // from the block's first column on, or null
  const u8* signs;        // of the rotation, or null
  int K;
  float t_down;
};

// x R t of ONE row from chunk `lo` on, and its sums, by all warps of a block; t and signs come before the kernel in front ends.
__device__ __forceinline__ void rotate_row(const Row& of, int lo, int chunks, uint4* row, u8* sums, u8* exchange) {
  const Team team(exchange);
  const int first = lo * 128 + 8 * int(threadIdx.x - team.thread);       // column of the team
  if (of.t)  // to where x * t will be: every thread reads back only what it copied itself
    for (int v = threadIdx.x; v < 16 * chunks; v += blockDim.x) copy16(shared(row + v), of.t + v * 8);
  u32 pairs[4], next[4];
  team.load_signs(of.signs, first, of.K, pairs);
  await_previous_kernel();
  const bool wide = aligned_rows(of.x, of.x_stride, nullptr, of.K);
  team.load(of.x, first, of.K, wide, pairs);
  await_copies();
  for (int base = 0; base < 16 * chunks; base += blockDim.x) {           // all threads, since they have barriers
    const int v = base + threadIdx.x, ahead = first + 8 * int(base + blockDim.x);
    const bool more = base + int(blockDim.x) < 16 * chunks;
    if (more) team.load_signs(of.signs, ahead, of.K, next), team.load(of.x, ahead, of.K, wide, next);
    const bool within = v < 16 * chunks;
    const uint4 values = team.turn(pairs, of.t && within ? row[v] : uint4{ONES, ONES, ONES, ONES}, of.t_down);
    Sums sum = {0.f, 0.f};
    if (within) row[v] = values, sum = sums_of(values, lo * 128 + v * 8);
    sum = over_lanes(sum, 0xffffffffu);
    if (within && v % (SUB / 8) == 0) reinterpret_cast<Sums*>(sums)[v / (SUB / 8) * 8] = sum;
    if (more) __syncthreads();                                          // the exchange has been read
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = next[i];
  }
}
#endif
