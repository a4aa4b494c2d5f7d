// y = x W^T + b for weights of 2, 3, 4 or 8 bits in the tile layout of tiles.py; compiled at run time, see nvrtc.py.
//
// Compile-time switches: BITS 2|3|4|8, BF16 0|1 (activations), CODEBOOK 0|1 (4 bits), ZERO 0|1 (zero points stored),
// GROUP 32|64|128, MB (8-row blocks of the batch), RT (16-row strips of the weight per warp), OUT (dequantize only:
// 0 fp16, 1 bf16, 2 fp32).
//
// How it reaches memory bandwidth. The weights are the A operand of mma.m16n8k16, the batch its narrow side of 8, so
// batch 1 to 8 cost the same and nothing is padded to 64. Two weights cost one lop3 and at most one shift: their bits
// are left where they are in the word as long as that is within a mantissa, under the exponent that makes their lowest
// bit count as 1, which is the 16-bit float 2^e + q exactly; e depends on the place alone. The products of one group are
// summed by the tensor core in fp32, starting from -zero * sum(x t) - sum(2^e x t), so the zero point and the 2^e cost
// one FMA per group and output; scale is applied to that sum. t is multiplied into x once per block, while the first
// weights are on their way. Every warp streams its own chunks through a ring in shared memory
// filled by bulk copies (no barrier between warps), and the K splits are summed in a fixed order: within a block
// through shared memory, between the blocks of a cluster through distributed shared memory. No atomics: results
// are the same in every run.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef MB
#define MB 1
#endif
#ifndef RT
#define RT 1
#endif
#ifndef BF16
#define BF16 0
#endif
#ifndef RING
#define RING 0
#endif
#ifndef DEPTH
#define DEPTH 1
#endif
#define OVERLAP (MB < 4 ? MB : 4)

#define PER_CHUNK (128 / GROUP)                     // groups in one chunk
#define AUX (ZERO ? 4 : 2)                          // bytes of scale and zero per row and group
#define CODES (256 * BITS)                          // bytes of codes in one chunk of 16 x 128
#define CHUNK (CODES + PER_CHUNK * 16 * AUX)
#define SUB (GROUP < 64 ? GROUP : 64)               // columns summed by the tensor core before a scale is applied
#define SUBS (128 / SUB)

#define MANTISSA (BF16 ? 7 : 10)                   // bits

// ---------------------------------------------------------------- what PTX is needed for; tests/kernels/emulator.h has
// the same in plain C++, which runs the rest of this file on a CPU
#ifdef EMULATE
#include "emulator.h"
#else
#define SHARED_MEMORY(name) extern __shared__ __align__(128) u8 name[]
__device__ __forceinline__ float from_half(u16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}
__device__ __forceinline__ u16 to_half(float f) {
  u16 v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}
__device__ __forceinline__ u16 to_bf16(float f) {
  u16 v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}
template <u32 MASK> __device__ __forceinline__ u32 select_or(u32 w, u32 bits) {  // (w & MASK) | bits, one instruction
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(w), "n"(MASK), "r"(bits));
  return d;
}
__device__ __forceinline__ u32 two_bf16(float low, float high) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ __forceinline__ u32 cluster_size() {
  u32 v;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
  return v;
}
__device__ __forceinline__ u32 cluster_rank() {
  u32 v;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  return v;
}
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void cluster_part() {  // orders no memory, unlike cluster_sync
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// STREAM: from global memory, read once and not kept in L1.
template <bool STREAM> __device__ __forceinline__ uint4 load4(const u8* p) {
  uint4 v;
  if constexpr (STREAM)
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  else v = *reinterpret_cast<const uint4*>(p);
  return v;
}
template <bool STREAM> __device__ __forceinline__ uint2 load2(const u8* p) {
  uint2 v;
  if constexpr (STREAM)
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  else v = *reinterpret_cast<const uint2*>(p);
  return v;
}
template <bool STREAM> __device__ __forceinline__ u32 load1(const u8* p) {
  u32 v;
  if constexpr (STREAM) asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  else v = *reinterpret_cast<const u32*>(p);
  return v;
}

__device__ __forceinline__ u32 shared(const void* p) { return u32(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void barrier_init(u32 bar) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\nbra again;\nfinished:\n}" ::"r"(bar), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void await_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ float4 remote(u32 address, u32 rank) {
  float4 v;
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address), "r"(rank) : "memory");
  return v;
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32."
#if BF16
      "bf16.bf16"
#else
      "f16.f16"
#endif
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

__device__ __forceinline__ float from_bf16(u16 v) { return __uint_as_float(u32(v) << 16); }
__device__ __forceinline__ float load16(u16 v) { return BF16 ? from_bf16(v) : from_half(v); }
__device__ __forceinline__ u16 store16(float f) { return BF16 ? to_bf16(f) : to_half(f); }

// ---------------------------------------------------------------- codes to 16-bit floats, two per register

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

#ifdef GEMM
struct Problem {
  const u8* tiles;        // [experts][strips][chunks][CHUNK]
  const u16* x;           // [M, K], rows x_stride apart
  const u16* t;           // fp16 [experts][128 * chunks], in stored column order, or null
  const int* permutation; // [experts][K] stored column -> column of x, or null
  const float* codebook;  // [16] or null
  const u16* bias;        // [N] or null
  const int* experts;     // [pairs]: row p of x goes to expert experts[p] (M is 1 then), or null
  const float* sums;      // x is already x * t, [M, 128 * chunks], and these are its sums (struct Sums); or null
  u16* y;                 // [M, N]
  u64 x_stride;
  float t_down, t_up;     // a power of two that keeps x * t finite in fp16, and its inverse
  int M, N, K, strips, chunks;
  int splits_in_block, stages, pairs_per_row;
};

__device__ __forceinline__ void add(float4& sum, float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

template <int S>
__device__ __forceinline__ void subgroup(const Codes (&codes)[RT], const Table& table,
                                         const char* x_row, int x_block, const float* sums,
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
  // OVERLAP blocks of the batch at a time: the chains of mma that sum one group each are independent of each other.
#pragma unroll
  for (int n = 0; n < MB; n += OVERLAP) {
    float c[OVERLAP][RT][4];
#pragma unroll
    for (int j = 0; j < OVERLAP; j++) {
#if CODEBOOK
#pragma unroll
      for (int r = 0; r < RT; r++) c[j][r][0] = c[j][r][1] = c[j][r][2] = c[j][r][3] = 0.f;
#else
      float4 sum = *reinterpret_cast<const float4*>(sums + 2 * (S * 8 * MB + 8 * (n + j)));
#pragma unroll
      for (int r = 0; r < RT; r++) {
        c[j][r][0] = sum.y - zero[r][0] * sum.x, c[j][r][1] = sum.w - zero[r][0] * sum.z;
        c[j][r][2] = sum.y - zero[r][1] * sum.x, c[j][r][3] = sum.w - zero[r][1] * sum.z;
      }
#endif
    }
#pragma unroll
    for (int u = 0; u < units; u++) {
      uint4 b[OVERLAP];
#pragma unroll
      for (int j = 0; j < OVERLAP; j++)
        b[j] = *reinterpret_cast<const uint4*>(x_row + (n + j) * x_block + (S * units + u) * 64);
#pragma unroll
      for (int j = 0; j < OVERLAP; j++)
#pragma unroll
        for (int r = 0; r < RT; r++)
          mma(c[j][r], a[r][u][0][0], a[r][u][1][0], a[r][u][0][1], a[r][u][1][1], b[j].x, b[j].y);
#pragma unroll
      for (int j = 0; j < OVERLAP; j++)
#pragma unroll
        for (int r = 0; r < RT; r++)
          mma(c[j][r], a[r][u][0][2], a[r][u][1][2], a[r][u][0][3], a[r][u][1][3], b[j].z, b[j].w);
    }
#pragma unroll
    for (int j = 0; j < OVERLAP; j++)
#pragma unroll
      for (int r = 0; r < RT; r++) {
        acc[r][n + j][0] += scale[r][0] * c[j][r][0], acc[r][n + j][1] += scale[r][0] * c[j][r][1];
        acc[r][n + j][2] += scale[r][1] * c[j][r][2], acc[r][n + j][3] += scale[r][1] * c[j][r][3];
      }
  }
}

// Of x * t over one group, per row of the batch: what the zero point and the offsets of the codes are multiplied with.
struct Sums { float plain, offset; };                                  // sum(x t), -sum(2^e x t)

template <int U> __device__ __forceinline__ float offset_sum(const float (&v)[8]) {
  constexpr float first = offset(U, 0), second = offset(U, 1), third = offset(U, 2), fourth = offset(U, 3);
  return -(first * (v[0] + v[1]) + second * (v[2] + v[3])) - (third * (v[4] + v[5]) + fourth * (v[6] + v[7]));
}

__device__ __forceinline__ Sums over_lanes(Sums sums, u32 lanes) {
#pragma unroll
  for (int step = 1; step < SUB / 8; step *= 2) {
    sums.plain += __shfl_xor_sync(lanes, sums.plain, step);
    sums.offset += __shfl_xor_sync(lanes, sums.offset, step);
  }
  return sums;
}

// Eight columns of x * t, rounded once to 16 bits, and their sums. t is fp16 and padded; x may be unaligned or permuted.
__device__ __forceinline__ uint4 scaled(const u16* x, const u16* t, const int* permutation, int k, int K, bool wide,
                                        float t_down, Sums& sums) {
  u16 values[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (wide && k < K) *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(x + k);
  if (!wide) {
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (k + j < K) values[j] = x[permutation ? permutation[k + j] : k + j];
  }
  if (t) {
    uint4 raw = *reinterpret_cast<const uint4*>(t + k);
    const u16* factors = reinterpret_cast<const u16*>(&raw);
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = store16(load16(values[j]) * (from_half(factors[j]) * t_down));
  }
  float v[8];
  sums.plain = 0.f;
#pragma unroll
  for (int j = 0; j < 8; j++) sums.plain += v[j] = load16(values[j]);
  const int unit = BITS == 2 ? k / 32 % 2 : BITS == 3 ? k / 32 % 4 : 0;
  if (unit == 0) sums.offset = offset_sum<0>(v);
  else if (unit == 1) sums.offset = offset_sum<1>(v);
  else if (unit == 2) sums.offset = offset_sum<2>(v);
  else sums.offset = offset_sum<3>(v);
  return *reinterpret_cast<uint4*>(values);
}

// x * t `[M, 128 * chunks]` and its Sums `[M / (8 MB)][sub][8 MB]`, for batches above one; a warp per 256 columns.
extern "C" __global__ void __launch_bounds__(128)
scale_input(const u16* x, const u16* t, const int* permutation, u16* scaled_x, Sums* sums, u64 x_stride, int K, int chunks,
            float t_down) {
  allow_next_kernel();
  await_previous_kernel();
  const int v = blockIdx.x * 128 + threadIdx.x, m = blockIdx.y, k = v * 8;
  if (v / 16 >= chunks) return;                                         // whole half warps
  const bool wide = !permutation && K % 8 == 0 && x_stride % 8 == 0 && (u64(x) & 15) == 0;
  Sums sum;
  const uint4 values = scaled(x + m * x_stride, t, permutation, k, K, wide, t_down, sum);
  *reinterpret_cast<uint4*>(scaled_x + u64(m) * chunks * 128 + k) = values;
  sum = over_lanes(sum, __activemask());
  if (v % (SUB / 8) == 0) sums[(u64(m / (8 * MB)) * chunks * SUBS + v / (SUB / 8)) * 8 * MB + m % (8 * MB)] = sum;
}

extern "C" __global__ void __launch_bounds__(MB * RT >= (RING ? 16 : 8) ? 256 : 512) dual_linear(const __grid_constant__ Problem p) {
  SHARED_MEMORY(smem);
  allow_next_kernel();
  const u32 splits = cluster_size(), rank = cluster_rank();
  const int warps = blockDim.x / 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int g = lane / 4, tig = lane % 4;
  const int WK = p.splits_in_block, WR = warps / WK, wr = warp / WK, wk = warp % WK;
  const int rows = 16 * RT * WR;                                        // of the weight, in this block
  const int row0 = int(blockIdx.x / splits) * rows;
  const int per = (p.chunks + splits - 1) / splits;                     // chunks of K per block
  const int lo = min(int(rank) * per, p.chunks), hi = min(lo + per, p.chunks);
  const int m0 = blockIdx.y * 8 * MB, batch = min(p.M - m0, 8 * MB);
  const int expert = p.experts ? p.experts[blockIdx.z] : 0;
  const u64 expert_bytes = u64(p.strips) * p.chunks * CHUNK;

  // Shared memory: the warps' rings and their barriers (RING), x * t, the sums of x * t per group.
  const int ring_bytes = RING ? (warps * p.stages * (RT * CHUNK + 8) + 127) & ~127 : 0;
  char* xs = reinterpret_cast<char*>(smem) + ring_bytes;
  const int x_stride = per * 256 + 64;                                  // bytes; 64 mod 128: no bank conflicts
  float* sums = reinterpret_cast<float*>(xs + (batch < 8 && MB == 1 ? batch : 8 * MB) * x_stride);

  const u8* source[RT];
#pragma unroll
  for (int r = 0; r < RT; r++) {
    int strip = min(row0 / 16 + wr * RT + r, p.strips - 1);
    source[r] = p.tiles + expert * expert_bytes + (u64(strip) * p.chunks + lo + wk) * CHUNK;
  }
  const int mine = max(0, (hi - lo - wk + WK - 1) / WK);                // chunks lo + wk, lo + wk + WK, ...

  // The first weights are on their way before anything waits: they do not depend on the previous kernel.
#if RING
  u8* ring = smem + warp * p.stages * RT * CHUNK;
  const u32 bar = shared(smem + warps * p.stages * RT * CHUNK + warp * p.stages * 8);
  auto fetch = [&](int i, int stage) {
    barrier_expect(bar + 8 * stage, RT * CHUNK);
#pragma unroll
    for (int r = 0; r < RT; r++)
      bulk_copy(shared(ring + (stage * RT + r) * CHUNK), source[r] + u64(i) * WK * CHUNK, CHUNK, bar + 8 * stage);
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
  const u32 step = WK * CHUNK, next_strip = RT == 1 || source[RT - 1] == source[0] ? 0 : p.chunks * CHUNK;
  auto fetch = [&](Codes (&to)[RT]) {
#pragma unroll
    for (int r = 0; r < RT; r++) to[r] = load_codes<true>(codes_at + r * next_strip, aux_at + r * next_strip);
    codes_at += step, aux_at += step;
  };
#pragma unroll
  for (int d = 0; d < DEPTH; d++)
    if (d < mine) fetch(held[d]);
#endif
  await_previous_kernel();

  if (p.sums) {
    const u64 width = u64(p.chunks) * 128;
    const int vectors = (hi - lo) * 16;
    for (int m = warp; m < batch; m += warps)
      for (int v = lane; v < vectors; v += 32)
        copy16(shared(xs + m * x_stride + v * 16), p.x + (m0 + m) * width + lo * 128 + v * 8);
    const float* from = p.sums + (u64(blockIdx.y) * p.chunks + lo) * SUBS * 16 * MB;
    for (int v = threadIdx.x; v < (hi - lo) * SUBS * 4 * MB; v += blockDim.x) copy16(shared(sums + 4 * v), from + 4 * v);
    await_copies();
  } else {
    const u16* t = p.t ? p.t + u64(expert) * p.chunks * 128 : nullptr;
    const int* permutation = p.permutation ? p.permutation + u64(expert) * p.K : nullptr;
    const bool wide = !permutation && p.K % 8 == 0 && p.x_stride % 8 == 0 && (u64(p.x) & 15) == 0;
    const u16* x = p.x + (p.experts ? blockIdx.z / p.pairs_per_row : m0) * p.x_stride;
    const int total = (hi - lo) * 16;
    for (int base = warp * 32; base < total; base += blockDim.x) {      // one row: batch is 1 here
      const int v = base + lane;
      Sums sum = {0.f, 0.f};
      if (v < total)
        *reinterpret_cast<uint4*>(xs + v * 16) = scaled(x, t, permutation, lo * 128 + v * 8, p.K, wide, p.t_down, sum);
      sum = over_lanes(sum, 0xffffffffu);
      if (v < total && v % (SUB / 8) == 0) reinterpret_cast<Sums*>(sums)[v / (SUB / 8) * 8 * MB] = sum;
    }
  }
  Table table = {};
#if CODEBOOK
  table = load_table(p.codebook);
#endif
  __syncthreads();

  float acc[RT][MB][4];
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int n = 0; n < MB; n++) acc[r][n][0] = acc[r][n][1] = acc[r][n][2] = acc[r][n][3] = 0.f;

  // What the last block of 8 computes beyond the batch is garbage of its own columns, and nobody reads it.
  const char* x_lane = xs + (g % (batch < 8 && MB == 1 ? batch : 8)) * x_stride + tig * 16 + wk * 256;
  const float* sum_lane = sums + 2 * (wk * SUBS * 8 * MB + 2 * tig);
  auto multiply = [&](const Codes (&codes)[RT]) {
    const char* x_row = x_lane;
    const float* sub_sums = sum_lane;
    x_lane += WK * 256, sum_lane += WK * SUBS * 16 * MB;
    subgroup<0>(codes, table, x_row, 8 * x_stride, sub_sums, acc);
    subgroup<1>(codes, table, x_row, 8 * x_stride, sub_sums, acc);
    if constexpr (SUBS == 4) {
      subgroup<SUBS - 2>(codes, table, x_row, 8 * x_stride, sub_sums, acc);
      subgroup<SUBS - 1>(codes, table, x_row, 8 * x_stride, sub_sums, acc);
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

  // Sum the splits of K in a fixed order. partial[wk][m][row] overlays the rings and x.
  __syncthreads();
  float* partial = reinterpret_cast<float*>(smem);
  const int stride = rows + 4;
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int n = 0; n < MB; n++) {
      const int m = 8 * n + 2 * tig, row = (wr * RT + r) * 16 + g;
      float* to = partial + (wk * 8 * MB + m) * stride + row;
      to[0] = acc[r][n][0], to[stride] = acc[r][n][1], to[8] = acc[r][n][2], to[stride + 8] = acc[r][n][3];
    }
  if (splits > 1) cluster_sync();
  else __syncthreads();
  u16* y = p.y + u64(p.experts ? blockIdx.z : m0) * p.N;
  const int vectors = rows / 4;
  for (int e = rank * blockDim.x + threadIdx.x; e < batch * vectors; e += splits * blockDim.x) {
    const int m = e / vectors, row = 4 * (e - m * vectors), n = row0 + row;
    if (n >= p.N) continue;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int w = 0; w < WK; w++) {
      const float* at = partial + (w * 8 * MB + m) * stride + row;
      if (splits == 1) add(sum, *reinterpret_cast<const float4*>(at));
      else
        for (u32 q = 0; q < splits; q += 2) {  // two loads under way: they take some 200 cycles
          const float4 first = remote(shared(at), q), second = remote(shared(at), q + 1);
          add(sum, first), add(sum, second);
        }
    }
    const float value[4] = {sum.x, sum.y, sum.z, sum.w};
    u16 rounded[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      rounded[j] = store16(value[j] * p.t_up + (p.bias && n + j < p.N ? load16(p.bias[n + j]) : 0.f));
    u16* to = y + u64(m) * p.N + n;
    if (p.N % 4 == 0) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(rounded);
    else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (n + j < p.N) to[j] = rounded[j];
    }
  }
  if (splits > 1) cluster_part();  // nobody leaves while others read its memory
}

#else
// ---------------------------------------------------------------- W[N, K] in 16 or 32 bits, one warp a chunk

template <int I> struct Index { static constexpr int value = I; };

extern "C" __global__ void __launch_bounds__(256)
dequantize(const u8* tiles, const u16* t, const float* codebook, void* w, int N, int K, int strips, int chunks) {
  const int lane = threadIdx.x % 32, g = lane / 4, tig = lane % 4;
  const u64 tile = u64(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (tile >= u64(strips) * chunks) return;
  const int strip = int(tile / chunks), chunk = int(tile % chunks);
  const u8* from = tiles + tile * CHUNK;
  const Codes codes = load_codes<true>(from + lane_codes(lane), from + lane_aux(lane));
  const Table table = {};
#if CODEBOOK
  const float entry = codebook[lane % 16];
#endif
  auto unit = [&](auto index, float (&scale)[2], float (&zero)[2]) {
    constexpr int U = decltype(index)::value;
    constexpr float offsets[4] = {offset(U, 0), offset(U, 1), offset(U, 2), offset(U, 3)};
    const int k = chunk * 128 + U * 32 + tig * 8;
    float factors[8];
#pragma unroll
    for (int j = 0; j < 8; j++) factors[j] = 1.f;
    if (t) {
      uint4 raw = *reinterpret_cast<const uint4*>(t + k);
#pragma unroll
      for (int j = 0; j < 8; j++) factors[j] = from_half(reinterpret_cast<const u16*>(&raw)[j]);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = strip * 16 + g + 8 * r;
      float v[8];
#if CODEBOOK
#pragma unroll
      for (int j = 0; j < 8; j++)
        v[j] = __shfl_sync(0xffffffffu, entry, (codes.w[2 * U + r] >> (4 * j)) & 15) * scale[r] * factors[j];
#else
      u32 pairs[4];
      unpack<U>(codes, r, table, pairs);
#pragma unroll
      for (int j = 0; j < 8; j++)  // q - zero first, as QuantizedWeight.dequantize: bit for bit the same weights
        v[j] = (from_half(u16(pairs[j / 2] >> (16 * (j % 2)))) - offsets[j / 2] - zero[r]) * scale[r] * factors[j];
#endif
      if (row >= N) continue;
      const u64 at = u64(row) * K + k;
#if OUT == 2
      float* to = static_cast<float*>(w) + at;
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (k + j < K) to[j] = v[j];
#else
      u16 packed[8];
#pragma unroll
      for (int j = 0; j < 8; j++) packed[j] = OUT == 1 ? to_bf16(v[j]) : to_half(v[j]);
      u16* to = static_cast<u16*>(w) + at;
      if (K % 8 == 0) {
        if (k < K) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<uint4*>(packed);
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
          if (k + j < K) to[j] = packed[j];
      }
#endif
    }
  };
  float scale[2], zero[2];
  decode_aux(codes, 0, scale, zero);
  unit(Index<0>{}, scale, zero);
  if (GROUP < 64) decode_aux(codes, 1 % PER_CHUNK, scale, zero);
  unit(Index<1>{}, scale, zero);
  if (GROUP < 128) decode_aux(codes, PER_CHUNK / 2, scale, zero);
  unit(Index<2>{}, scale, zero);
  if (GROUP < 64) decode_aux(codes, 3 % PER_CHUNK, scale, zero);
  unit(Index<3>{}, scale, zero);
}
#endif
