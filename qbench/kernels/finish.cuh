// Weights that are finished before they are multiplied, for wgmma. c = round(zero) is subtracted from the code as an integer,
// which is exact; then one FMA gives fp(scale * (q - c) - scale * (zero - c)), rounded once.
#pragma once
#include "linear.cuh"

// Of one group and row: what turns the floats that `unpack` gives into weights.
struct Row { u32 center, scale, rest; };            // integer c; scale and -scale * (zero - c), both halves the same

__device__ __forceinline__ u32 both(u16 v) { return v | u32(v) << 16; }

__device__ __forceinline__ Row row_of(float scale, float zero) {
  const float c = CODEBOOK ? 0.f : rintf(fminf(fmaxf(zero, 0.f), float((1 << BITS) - 1)));
  return {u32(c), both(store16(scale)), both(store16(-scale * (zero - c)))};
}

// The 16-bit float that `unpack` would give for code c in the place of pair (U, i), twice.
template <int U, int I> __device__ __forceinline__ u32 center_of(u32 c) {
#if BITS == 8
  return BF16 ? both(store16(float(int(c) - 128))) : both(u16(0x6400 | c));
#else
  constexpr int at = spread(U, I) ? 0 : field_of(U, I), low = at - word_shift(at);
  return power(low) | both(u16(c << low));
#endif
}

template <int U, int I> __device__ __forceinline__ u32 weight_of(u32 value, const Row& row) {
#if CODEBOOK
  return fma2(value, row.scale, row.rest);
#else
  return fma2(minus2(value, center_of<U, I>(row.center)), row.scale, row.rest);
#endif
}

// Unit U of 32 columns as the A operands of two products: rows g and g + 8, sixteen columns each.
template <int U> __device__ __forceinline__ void weights(const Codes& codes, const Table& table, u32 (&a)[2][4]) {
  float scale[2], zero[2];
  decode_aux(codes, U * 32 / GROUP, scale, zero);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const Row row = row_of(scale[r], zero[r]);
    u32 v[4];
    unpack<U>(codes, r, table, v);
    a[0][r] = weight_of<U, 0>(v[0], row), a[0][2 + r] = weight_of<U, 1>(v[1], row);
    a[1][r] = weight_of<U, 2>(v[2], row), a[1][2 + r] = weight_of<U, 3>(v[3], row);
  }
}

// How wgmma finds B: rows of 128 bytes, 8 of them 1024 bytes apart from the next 8, 16-byte pieces swizzled within them.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return u64(address >> 4 & 0x3fff) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
