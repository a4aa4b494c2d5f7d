// Codes in the layout of tiles.py to 16-bit floats, two per register, ready to be the A operand of a tensor-core product.
//
// Compile-time switches: BITS 2|3|4|8, BF16 0|1 (activations), CODEBOOK 0|1 (4 bits), ZERO 0|1 (zero points stored),
// GROUP 32|64|128.
#pragma once
#include "ptx.cuh"

template <int I> struct Index { static constexpr int value = I; };  // hands a constant to a lambda

#define PER_CHUNK (128 / GROUP)                     // groups in one chunk
#define AUX (ZERO ? 4 : 2)                          // bytes of scale and zero per row and group
#define CODES (256 * BITS)                          // bytes of codes in one chunk of 16 x 128
#define CHUNK (CODES + PER_CHUNK * 16 * AUX)

#define MANTISSA (BF16 ? 7 : 10)                   // bits

struct Table { u32 low[4], high[4]; };  // a codebook of 16 floats as bytes, for byte permutes

__device__ __forceinline__ Table load_table(const float* codebook) {
  Table t;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    t.low[i] = t.high[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 v = store16(codebook[4 * i + j]);
      t.low[i] |= (v & 0xff) << (8 * j);
      t.high[i] |= (v >> 8) << (8 * j);
    }
  }
  return t;
}

// Four codes in the low 16 bits of w to two registers of two floats.
__device__ __forceinline__ void look_up(const Table& t, u32 w, u32& first, u32& second) {
  u32 within = w & 0x7777u, upper = ((w & 0x8888u) >> 1) | 0x3210u;
  u32 low = __byte_perm(__byte_perm(t.low[0], t.low[1], within), __byte_perm(t.low[2], t.low[3], within), upper);
  u32 high = __byte_perm(__byte_perm(t.high[0], t.high[1], within), __byte_perm(t.high[2], t.high[3], within), upper);
  first = __byte_perm(low, high, 0x5140);
  second = __byte_perm(low, high, 0x7362);
}

// A field at bit AT of each half word: how far the word is shifted so that it lies within the mantissa. The same for
// as many fields as fit, which is what saves shifts.
constexpr int word_shift(int at) {
  int shift = 0;
  while (at - shift > MANTISSA - BITS) shift += ((MANTISSA - BITS) / BITS + 1) * BITS;
  return shift;
}

// Where pair i (columns 2i, 2i + 1) of a lane's 8 columns in unit U of 32 lies: its field in a half word.
constexpr int field_of(int unit, int pair) {
  return BITS == 4 ? 4 * pair : BITS == 2 ? 8 * (unit & 1) + 2 * pair : 3 * ((4 * unit + pair) % 5);
}

constexpr bool spread(int unit, int pair) { return BITS == 3 && unit == 3 && pair == 3; }

// What `unpack` adds to the codes of a pair: 2^e, so that the lowest bit of the field counts as 1.
constexpr float offset(int unit, int pair) {
  if (CODEBOOK) return 0.f;
  if (BITS == 8) return BF16 ? -128.f : 1024.f;
  const int at = spread(unit, pair) ? 0 : field_of(unit, pair);
  return float(1 << (MANTISSA - at + word_shift(at)));
}

// The 16-bit float 2^e of a field that starts at bit `low` of the mantissa, in both halves of a register.
constexpr u32 power(int low) {
  return u32((BF16 ? 127 : 15) + MANTISSA - low) << MANTISSA | u32((BF16 ? 127 : 15) + MANTISSA - low) << (MANTISSA + 16);
}

template <int AT> __device__ __forceinline__ u32 field(u32 w) {
  constexpr int shift = word_shift(AT), low = AT - shift;
  constexpr u32 mask = (((1u << BITS) - 1) << low) * 0x10001u;
  return select_or<mask>(w >> shift, power(low));
}

// The words that a lane holds of one strip's chunk: rows g and g + 8, 32 columns each.
#define WORDS (2 * BITS)
#define AUX_WORDS (PER_CHUNK * AUX / 2)             // scale and zero of rows g and g + 8, per group
struct Codes { u32 w[WORDS], aux[AUX_WORDS]; };

__device__ __forceinline__ int lane_codes(int lane) { return lane * (BITS == 3 ? 8 : 16); }
__device__ __forceinline__ int lane_aux(int lane) { return CODES + lane / 4 * 2 * AUX; }

// `codes` and `aux` are the lane's own addresses, lane_codes and lane_aux.
template <bool STREAM> __device__ __forceinline__ Codes load_codes(const u8* codes, const u8* aux) {
  Codes c;
#if BITS == 3
#pragma unroll
  for (int j = 0; j < 3; j++) {
    uint2 v = load2<STREAM>(codes + 256 * j);
    c.w[2 * j] = v.x, c.w[2 * j + 1] = v.y;
  }
#else
#pragma unroll
  for (int j = 0; j < WORDS / 4; j++) {
    uint4 v = load4<STREAM>(codes + 512 * j);
    c.w[4 * j] = v.x, c.w[4 * j + 1] = v.y, c.w[4 * j + 2] = v.z, c.w[4 * j + 3] = v.w;
  }
#endif
#pragma unroll
  for (int j = 0; j < PER_CHUNK; j++) {
#if ZERO
    uint2 v = load2<STREAM>(aux + 64 * j);
    c.aux[2 * j] = v.x, c.aux[2 * j + 1] = v.y;
#else
    c.aux[j] = load1<STREAM>(aux + 32 * j);
#endif
  }
  return c;
}

// Row r (0: g, 1: g + 8), unit U of 32 columns: this lane's 8 columns as 4 registers.
template <int U>
__device__ __forceinline__ void unpack(const Codes& c, int r, const Table& t, u32 (&out)[4]) {
#if CODEBOOK
  u32 w = c.w[2 * U + r];
  look_up(t, w, out[0], out[1]);
  look_up(t, w >> 16, out[2], out[3]);
#elif BITS == 8
  u32 w[2] = {c.w[4 * U + 2 * r], c.w[4 * U + 2 * r + 1]};
#pragma unroll
  for (int i = 0; i < 2; i++) {
#if BF16
    float f[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      f[j] = __uint_as_float(__byte_perm(w[i], 0x4b000000u, 0x7540 | j)) - 8388736.f;  // 2^23 + 128
    out[2 * i] = two_bf16(f[0], f[1]), out[2 * i + 1] = two_bf16(f[2], f[3]);
#else
    out[2 * i] = __byte_perm(w[i], 0x64646464u, 0x4140);
    out[2 * i + 1] = __byte_perm(w[i], 0x64646464u, 0x4342);
#endif
  }
#else
  // 4 bits: four fields in each half word; 2 bits: two units share a word; 3 bits: five fields per half word, and the
  // sixteenth pair in the three words' spare bits
  auto word = [&](int pair) { return BITS == 4 ? 2 * U + r : BITS == 2 ? 2 * (U >> 1) + r : 2 * ((4 * U + pair) / 5) + r; };
  out[0] = field<field_of(U, 0)>(c.w[word(0)]);
  out[1] = field<field_of(U, 1)>(c.w[word(1)]);
  out[2] = field<field_of(U, 2)>(c.w[word(2)]);
  if constexpr (!spread(U, 3)) out[3] = field<field_of(U, 3)>(c.w[word(3)]);
  else {
    out[3] = select_or<0x00010001u>(c.w[r] >> 15, power(0));
    out[3] = select_or<0x00020002u>(c.w[2 + r] >> 14, out[3]);
    out[3] = select_or<0x00040004u>(c.w[(BITS == 3 ? 4 : 0) + r] >> 13, out[3]);
  }
#endif
}

// Scale and zero of rows g and g + 8 in group `group` of the chunk.
__device__ __forceinline__ void decode_aux(const Codes& c, int group, float (&scale)[2], float (&zero)[2]) {
#if ZERO
  u32 v[2] = {c.aux[2 * group], c.aux[2 * group + 1]};
#pragma unroll
  for (int r = 0; r < 2; r++) scale[r] = from_half(u16(v[r])), zero[r] = from_half(u16(v[r] >> 16));
#else
  u32 v = c.aux[group];
  scale[0] = from_half(u16(v)), scale[1] = from_half(u16(v >> 16));
  zero[0] = zero[1] = CODEBOOK ? 0.f : float(1 << (BITS - 1));
#endif
}
