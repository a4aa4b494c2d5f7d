// Codes in shared memory to wgmma's A operand, with the columns in x's own order.
//
// A word of the packed weight holds eight adjacent columns, of which wgmma wants two in each of the four lanes that share
// rows. So each of them reads the words of all four, and takes its own field of each. What has to be known of a row and
// group, and t, are made ready once for all lanes, by warps that do not multiply.
#pragma once
#include "finish.cuh"

#define FACTORS_BYTES 256                          // of t, 128 columns
#define READY_BYTES (STRIPS * PER_CHUNK * 128 + FACTORS_BYTES)  // of a chunk: `Ready` per row and group, then t

// Two fp16 factors as a pair of the activations' kind.
__device__ __forceinline__ u32 factors(u32 t) { return BF16 ? two_bf16(from_half(u16(t)), from_half(u16(t >> 16))) : t; }

// Of a row and group: scale and rest as 16-bit floats, and the code to be subtracted, as the float that `pair` makes of it.
struct Ready { u32 scale_rest, center; };
#define WIDE_CODES (BITS == 8 && BF16)             // which no bf16 with a constant exponent can hold: by fp32

__device__ __forceinline__ Ready ready_of(float scale, float zero) {
  const Row row = row_of(scale, zero);
  const u32 scale_rest = (row.scale & 0xffffu) | row.rest << 16;
  if (WIDE_CODES) return {scale_rest, 0x4b000000u | row.center};  // 2^23 + c
  return {scale_rest, power(0) | both(u16(row.center))};
}

// A third of what a chunk's scales, zeros and t become, to `to`, by one of three warps; the last makes all of t.
__device__ __forceinline__ void make_ready(const u8* strips, const u8* t, u8* to, int third, int lane) {
#pragma unroll 1
  for (int e = 32 * third + lane; e < STRIPS * PER_CHUNK * 16; e += 96) {
    const int strip = e / (PER_CHUNK * 16), place = e % (PER_CHUNK * 16);  // rows g and g + 8 of a group by turns
    const u8* aux = strips + strip * CHUNK + CODES + place * AUX;
    const u32 pair = ZERO ? load1<false>(aux) : *reinterpret_cast<const u16*>(aux);
    const float zero = ZERO ? from_half(u16(pair >> 16)) : CODEBOOK ? 0.f : float(1 << (BITS - 1));
    const Ready made = ready_of(from_half(u16(pair)), zero);
    *reinterpret_cast<uint2*>(to + (e / 16 * 16 + e % 16 / 2 + e % 2 * 8) * 8) = {made.scale_rest, made.center};
  }
  if (INPUT_SCALE && third == 2)
    for (int pair = lane; pair < 64; pair += 32) {  // of columns 32 unit + 8 i + 2 tig: to the unit's lane tig
      const int place = pair / 16 * 16 + pair % 4 * 4 + pair / 4 % 4;
      *reinterpret_cast<u32*>(to + STRIPS * PER_CHUNK * 128 + 4 * place) = factors(load1<false>(t + 4 * pair));
    }
}

// The codes of rows g and g + 8 that four lanes hold, of as many columns as their words have: 128 at 2 and 3 bits, 64 at 4
// and 32 at 8.
#define UNITS_HELD (BITS == 8 ? 1 : BITS == 4 ? 2 : 4)
struct Words {
  u32 of[4][BITS == 3 ? 6 : 4];
  __device__ __forceinline__ void load(const u8* strip, int unit, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if BITS == 3
#pragma unroll
      for (int j = 0; j < 3; j++) {
        const uint2 v = load2<false>(strip + 256 * j + lane / 4 * 32 + 8 * i);
        of[i][2 * j] = v.x, of[i][2 * j + 1] = v.y;
      }
#else
      const uint4 v = load4<false>(strip + 512 * (unit / UNITS_HELD) + lane / 4 * 64 + 16 * i);
      of[i][0] = v.x, of[i][1] = v.y, of[i][2] = v.z, of[i][3] = v.w;
#endif
    }
  }
  // Codes 2 tig and 2 tig + 1 of the eight of lane i, less `center`, as two 16-bit floats; row r, unit U. No codebooks.
  template <int U> __device__ __forceinline__ u32 pair(int i, int r, int tig, u32 center) const {
#if BITS == 8
    const u32 two = __byte_perm(of[i][2 * r], of[i][2 * r + 1], 0x10 + 0x22 * tig);
#if BF16
    return two_bf16(__uint_as_float(__byte_perm(two, 0x4b000000u, 0x7540)) - __uint_as_float(center),
                    __uint_as_float(__byte_perm(two, 0x4b000000u, 0x7541)) - __uint_as_float(center));
#else
    return minus2(__byte_perm(two, 0x64646464u, 0x4140), center);
#endif
#elif BITS == 3  // pair 4 U + tig of sixteen: five in a word, and the last in the spare bits of three
    constexpr int WORD = (4 * U) / 5, LAST = (4 * U + 3) / 5, FIRST = (4 * U) % 5;
    const u32 low = of[i][2 * WORD + r];
    u32 field = low >> (3 * (FIRST + tig));
    if (U == 3) {
      const u32 spread = (of[i][r] >> 15 & 0x10001u) | (of[i][2 + r] >> 14 & 0x20002u) | (low >> 13 & 0x40004u);
      field = tig == 3 ? spread : field;
    } else if (LAST > WORD) {
      const int beyond = FIRST + tig - 5;
      field = beyond >= 0 ? of[i][2 * (LAST > 2 ? 2 : LAST) + r] >> (3 * (beyond & 3)) : field;
    }
    return minus2(select_or<0x00070007u>(field, power(0)), center);
#else
    const u32 word = of[i][2 * (BITS == 4 ? U % 2 : U / 2) + r];
    constexpr u32 mask = ((1u << BITS) - 1) * 0x10001u;
    return minus2(select_or<mask>(word >> (BITS * tig + (BITS == 2 ? 8 * (U % 2) : 0)), power(0)), center);
#endif
  }
};

// Unit U of 32 columns as the A operands of two products; this lane's columns are 8 i + 2 tig and the next.
template <int U>
__device__ __forceinline__ void weights_of(const Words& words, const Ready (&rows)[2], uint4 t, const Table& table, int tig,
                                           u32 (&a)[2][4]) {
  const u32 factor[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const u32 scale = __byte_perm(rows[r].scale_rest, 0, 0x1010), rest = __byte_perm(rows[r].scale_rest, 0, 0x3232);
    u32 v[4];
#if CODEBOOK  // a pair is a byte
    const int word = 2 * (U % 2) + r;
    const u32 pick = tig | (4 + tig) << 4;
    const u32 pairs = __byte_perm(__byte_perm(words.of[0][word], words.of[1][word], pick),
                                  __byte_perm(words.of[2][word], words.of[3][word], pick), 0x5410);
    look_up(table, pairs, v[0], v[1]), look_up(table, pairs >> 16, v[2], v[3]);
#else
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = words.pair<U>(i, r, tig, rows[r].center);
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 weight = fma2(v[i], scale, rest);
      a[i / 2][i % 2 * 2 + r] = INPUT_SCALE ? times2(weight, factor[i]) : weight;
    }
  }
}
