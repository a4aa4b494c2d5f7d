// ONE row of x on its way into a product: gated, or times the weight of a norm, times t, and its sums.
#pragma once
#include "records.cuh"

#ifndef GATED
#define GATED 0
#endif
#ifndef NORM
#define NORM 0
#endif

struct OneRow {
  const u16* x;
  const u16* factors;      // GATED: what silu(x) is multiplied with; NORM: the norm's weight
  const u16* t;            // from the block's first column on, or null
  const int* permutation;  // stored column -> column of x, or null
  int K;
  float t_down;
};

// silu(gate) * up, both rounded to 16 bits, as two kernels of torch's would.
__device__ __forceinline__ float silu(float x) { return load16(store16(__fdividef(x, 1.f + __expf(-x)))); }
__device__ __forceinline__ u32 gated(u32 gate, u32 up) {
  return round2(silu(low(gate)) * low(up), silu(high(gate)) * high(up));
}
__device__ __forceinline__ uint4 gated(uint4 gate, uint4 up) {
  return {gated(gate.x, up.x), gated(gate.y, up.y), gated(gate.z, up.z), gated(gate.w, up.w)};
}

// x * weight * t, rounded once.
__device__ __forceinline__ u32 weighted(u32 x, u32 weight, u32 t) {
  return round2(low(x) * low(weight) * from_half(u16(t)), high(x) * high(weight) * from_half(u16(t >> 16)));
}
__device__ __forceinline__ uint4 weighted(uint4 x, uint4 w, uint4 t) {
  return {weighted(x.x, w.x, t.x), weighted(x.y, w.y, t.y), weighted(x.z, w.z, t.z), weighted(x.w, w.w, t.w)};
}
__device__ __forceinline__ float squares_of(u32 x) { return low(x) * low(x) + high(x) * high(x); }
__device__ __forceinline__ float squares_of(uint4 x) {
  return (squares_of(x.x) + squares_of(x.y)) + (squares_of(x.z) + squares_of(x.w));
}

__device__ __forceinline__ float load_score(const void* scores, int pair, bool in_fp32) {
  return in_fp32 ? static_cast<const float*>(scores)[pair] : load16(static_cast<const u16*>(scores)[pair]);
}

// The vectors of 8 columns first, ..., first + 31, then `turn` further on, of those from chunk `lo` on, by one warp. t comes
// before the kernel in front ends. Gives the warp's sum of squares of x, of NORM, to every lane.
__device__ __forceinline__ float put_row(const OneRow& of, int lo, int vectors, int first, int turn, uint4* row, Sums* sums) {
  const int lane = threadIdx.x % 32;
  if (of.t)  // to where x * t will be: every thread reads back only what it copied itself
    for (int v = first + lane; v < vectors; v += turn) copy16(shared(row + v), of.t + v * 8);
  await_previous_kernel();
  const bool wide = aligned_rows(of.x, 0, of.permutation, of.K) && (!(GATED || NORM) || (u64(of.factors) & 15) == 0);
  await_copies();
  float squares = 0.f;
  for (int base = first; base < vectors; base += 2 * turn) {            // two at a time: their loads are under way together
    uint4 values[2], factors[2];
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const int v = base + q * turn + lane, k = lo * 128 + v * 8;
      values[q] = factors[q] = {0, 0, 0, 0};
      if (v >= vectors) continue;
      values[q] = load_x(of.x, of.permutation, k, of.K, wide);
      if (GATED || NORM) factors[q] = load_x(of.factors, of.permutation, k, of.K, wide);
    }
#pragma unroll
    for (int q = 0; q < 2; q++) {
      if (base + q * turn >= vectors) break;                            // whole warps
      const int v = base + q * turn + lane;
      if (NORM) squares += squares_of(values[q]);
      if (GATED) values[q] = gated(values[q], factors[q]);
      if (v < vectors) {
        const uint4 t = of.t ? row[v] : uint4{ONES, ONES, ONES, ONES};
        if (NORM) values[q] = weighted(values[q], factors[q], t);
        else if (of.t) values[q] = scaled(values[q], t, of.t_down);
        row[v] = values[q];
      }
      const Sums sum = over_lanes(v < vectors ? sums_of(values[q], lo * 128 + v * 8) : Sums{0.f, 0.f}, 0xffffffffu);
      if (v < vectors && v % (SUB / 8) == 0) sums[v / (SUB / 8) * 8] = sum;
    }
  }
#pragma unroll
  for (int step = 1; NORM && step < 32; step *= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
  return squares;
}
