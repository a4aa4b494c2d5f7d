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

template <int COUNT> __device__ __forceinline__ void over_lanes(Sums (&sums)[COUNT], u32 lanes) {
#pragma unroll
  for (int step = 1; step < SUB / 8; step *= 2)
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      sums[i].plain += __shfl_xor_sync(lanes, sums[i].plain, step);
      if (!ONE_OFFSET) sums[i].offset += __shfl_xor_sync(lanes, sums[i].offset, step);
    }
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    if (ONE_OFFSET) sums[i].offset = -offset(0, 0) * sums[i].plain;
}
__device__ __forceinline__ Sums over_lanes(Sums sum, u32 lanes) {
  Sums sums[1] = {sum};
  over_lanes(sums, lanes);
  return sums[0];
}

// x * t and its sums in records, for all blocks; a warp per 256 columns, or per block of a rotation. Not called for ONE row.
extern "C" __global__ void __launch_bounds__(128)
scale_input(const u16* x, const u16* t, const int* permutation, u8* records, u64 x_stride, int K, int chunks, float t_down
#if ROTATE
            , const u8* signs
#endif
) {
  allow_next_kernel();
  const int m = blockIdx.y, n = m % (8 * MB);
  u8* row = records + u64(m / (8 * MB)) * chunks * RECORD;
  auto put = [&](int v, uint4 values, Sums sum) {                       // 8 columns
    u8* record = row + u64(v / 16) * RECORD;
    *reinterpret_cast<uint4*>(record + n * X_ROW + v % 16 * 16) = values;
    if (v % (SUB / 8) == 0) reinterpret_cast<Sums*>(record + 8 * MB * X_ROW)[v % 16 / (SUB / 8) * 8 * MB + n] = sum;
  };
#if ROTATE
  SHARED_MEMORY(smem);
  const RowPart part(blockIdx.x, chunks);
  if (part.pairs <= 0) return;
  const uint4* turned = rotated(x + m * x_stride, x_stride, t, signs, K, t_down, part, smem);
  Sums sums[TURNS];
#pragma unroll
  for (int q = 0; q < TURNS; q++) sums[q] = sums_of(turned[32 * q], (part.vector + 32 * q) * 8);
  over_lanes(sums, 0xffffffffu);
#pragma unroll
  for (int q = 0; q < TURNS; q++)
    if (part.vector + 32 * q < 16 * chunks) put(part.vector + 32 * q, turned[32 * q], sums[q]);
#else
  const int v = blockIdx.x * 128 + threadIdx.x, k = v * 8;
  if (v / 16 >= chunks) return;                                         // whole half warps
  const uint4 factors = t ? *reinterpret_cast<const uint4*>(t + k) : uint4{};
  await_previous_kernel();
  uint4 values = load_x(x + m * x_stride, permutation, k, K, aligned_rows(x, x_stride, permutation, K));
  if (t) values = scaled(values, factors, t_down);
  put(v, values, over_lanes(sums_of(values, k), (v | 31) / 16 < chunks ? 0xffffffffu : 0xffffu));
#endif
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

// x R t of ONE row from chunk `lo` on, and its sums, by all warps of a block. A warp's columns are its own: it lays t out, reads
// it, and puts x R t in its place. t and signs come before the kernel in front ends.
__device__ __forceinline__ void rotate_row(const Row& of, int lo, int chunks, uint4* row, u8* sums) {
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  auto keep_sums = [&](int v, Sums sum) {
    if (v < 16 * chunks && v % (SUB / 8) == 0) reinterpret_cast<Sums*>(sums)[v / (SUB / 8) * 8] = sum;
  };
  const Hadamard h = hadamard(lane);
  const int turn = blockDim.x * TURNS, first = warp * 32 * TURNS;
  for (int base = first; of.t && base < 16 * chunks; base += turn)
#pragma unroll
    for (int v = base + lane; v < min(base + 32 * TURNS, 16 * chunks); v += 32) copy16(shared(row + v), of.t + v * 8);
  u32 signs[TURNS];
  uint4 values[TURNS];
  auto load_signs = [&](int base, u32 (&to)[TURNS]) {
#pragma unroll
    for (int q = 0; q < TURNS; q++) to[q] = signs_of(of.signs, (lo * 16 + base + 32 * q + lane) * 8, of.K);
  };
  load_signs(first, signs);
  await_copies();
  __syncwarp();
  await_previous_kernel();
  const bool wide = aligned_rows(of.x, of.x_stride, nullptr, of.K);
  auto load = [&](int base, uint4 (&to)[TURNS]) {
#pragma unroll
    for (int q = 0; q < TURNS; q++) to[q] = load_x(of.x, nullptr, (lo * 16 + base + 32 * q + lane) * 8, of.K, wide);
  };
  load(first, values);
  for (int base = first; base < 16 * chunks; base += turn) {
    u32 next_signs[TURNS];
    uint4 next[TURNS];
    if (base + turn < 16 * chunks) load_signs(base + turn, next_signs), load(base + turn, next);
    u32* to = reinterpret_cast<u32*>(row + base);
    auto factors = [&](int q, int i) {
      return factors_of(of.t ? to[128 * q + 32 * i + first_pair(lane)] : ONES, of.t_down);
    };
    rotate(values, signs, h, factors, to, 64 * chunks - 4 * base, lane);
    __syncwarp();
    Sums found[TURNS];
#pragma unroll
    for (int q = 0; q < TURNS; q++) {
      const int v = base + 32 * q + lane;
      found[q] = v < 16 * chunks ? sums_of(row[v], lo * 128 + v * 8) : Sums{0.f, 0.f};
    }
    over_lanes(found, 0xffffffffu);
#pragma unroll
    for (int q = 0; q < TURNS; q++) {
      keep_sums(base + 32 * q + lane, found[q]);
      signs[q] = next_signs[q], values[q] = next[q];
    }
  }
}
#endif
