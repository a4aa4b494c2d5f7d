// W[N, K], or a stack of them, from its codes, in 16 or 32 bits, one warp a chunk; a block takes chunks of one strip side
// by side, so that its rows are written in long runs. Switches: those of codes.cuh and OUT (0 fp16, 1 bf16, 2 fp32).
#include "rotate.cuh"

#if !ROTATE
extern "C" __global__ void __launch_bounds__(256)
dequantize(const u8* tiles, const u16* t, const float* codebook, void* w, int N, int K, int strips, int chunks,
           u64 matrix_bytes, int matrix_t) {
  const int lane = threadIdx.x % 32, g = lane / 4, tig = lane % 4;
  const int matrix = blockIdx.x / strips, strip = blockIdx.x - matrix * strips;
  const int chunk = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  if (chunk >= chunks) return;
  const u8* from = tiles + matrix * matrix_bytes + (u64(strip) * chunks + chunk) * CHUNK;
  if (t) t += u64(matrix) * matrix_t;
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
      const u64 at = (u64(matrix) * N + row) * K + k;
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
#else
__device__ __forceinline__ void round_of_two(u32& first, u32& second) {
  const u32 sum = fma2(first, ONES, second);
  second = minus2(first, second), first = sum;
}

// W = (W R) R^T in bf16, so that x needs no rotation: the columns of a block of the rotation lie in one block of threads. As in
// rotate.cuh, in fp16 throughout: tensor cores take bits 0, 2, 3 and 4 of a column's number, whose pairs are the B operand as
// they come, eight rows wide; bits 1, 5 and 6 are a lane's own, and the upper ones another chunk's, through shared memory.
extern "C" __global__ void __launch_bounds__(256)
dequantize(const u8* tiles, const u16* t, const float* codebook, void* w, int N, int K, int strips, int chunks,
           u64 matrix_bytes, int matrix_t, const u8* signs) {
  SHARED_MEMORY(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, tig = lane % 4;
  const int matrix = blockIdx.x / strips, strip = blockIdx.x - matrix * strips, first = blockIdx.y * warps;
  const int chunk = first + warp, stride = 64 * warps + 4;            // words of a row; so far apart that no banks collide
  u32* rows = reinterpret_cast<u32*>(smem);                           // [16][stride]
  if (chunk < chunks) {
    const u8* from = tiles + matrix * matrix_bytes + (u64(strip) * chunks + chunk) * CHUNK;
    if (t) t += u64(matrix) * matrix_t;
    const Codes codes = load_codes<true>(from + lane_codes(lane), from + lane_aux(lane));
    const Hadamard h = hadamard(lane);
    const Table table = {};
#if CODEBOOK
    const float entry = codebook[lane % 16];
#endif
    u32 pairs[2][4][2][2];                                            // half of the rows, unit, bit 1, row of two
    auto unit = [&](auto index) {
      constexpr int U = decltype(index)::value;
      constexpr float offsets[4] = {offset(U, 0), offset(U, 1), offset(U, 2), offset(U, 3)};
      float scale[2], zero[2], factors[8];
      decode_aux(codes, U * 32 / GROUP, scale, zero);
      const uint4 raw = t ? *reinterpret_cast<const uint4*>(t + chunk * 128 + U * 32 + tig * 8) : uint4{ONES, ONES, ONES, ONES};
#pragma unroll
      for (int j = 0; j < 8; j++) factors[j] = from_half(reinterpret_cast<const u16*>(&raw)[j]);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        u32 v[4];
#if !CODEBOOK
        unpack<U>(codes, r, table, v);
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float pair[2];
#pragma unroll
          for (int j = 0; j < 2; j++) {
#if CODEBOOK
            pair[j] = __shfl_sync(0xffffffffu, entry, (codes.w[2 * U + r] >> (8 * i + 4 * j)) & 15);
#else
            pair[j] = from_half(u16(v[i] >> (16 * j))) - offsets[i] - zero[r];
#endif
            pair[j] *= scale[r] * factors[2 * i + j];
          }
          v[i] = two_half(pair[0], pair[1]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float y[4] = {};
          mma(y, h.first[0], h.first[1], h.first[2], h.first[3], v[i], v[i + 2]);
          pairs[r][U][i][0] = two_half(y[0], y[2]), pairs[r][U][i][1] = two_half(y[1], y[3]);
        }
      }
    };
    unit(Index<0>{}), unit(Index<1>{}), unit(Index<2>{}), unit(Index<3>{});
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int row = 0; row < 2; row++) {
        auto& p = pairs[r];
#pragma unroll
        for (int U = 0; U < 4; U++) round_of_two(p[U][0][row], p[U][1][row]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (ROTATE > 32) round_of_two(p[0][i][row], p[1][i][row]), round_of_two(p[2][i][row], p[3][i][row]);
          if (ROTATE > 64) round_of_two(p[0][i][row], p[2][i][row]), round_of_two(p[1][i][row], p[3][i][row]);
        }
#pragma unroll
        for (int U = 0; U < 4; U++) {
          u32* to = rows + (8 * r + 2 * tig + row) * stride + 64 * warp + 16 * U + 2 * g;
          *reinterpret_cast<uint2*>(to) = {p[U][0][row], p[U][1][row]};
        }
      }
  }
  __syncthreads();
  constexpr int TOGETHER = ROTATE > 128 ? ROTATE / 128 : 1;           // chunks of a block
  constexpr float norm = rotation_norm();
  for (int row = warp; row < 16 && strip * 16 + row < N; row += warps)
    for (int base = 0; base < min(warps, chunks - first); base += TOGETHER) {
      uint2 v[TOGETHER];
#pragma unroll
      for (int c = 0; c < TOGETHER; c++)
        v[c] = *reinterpret_cast<const uint2*>(rows + row * stride + 64 * (base + c) + 2 * lane);
#pragma unroll
      for (int step = 1; step < TOGETHER; step *= 2)
#pragma unroll
        for (int c = 0; c < TOGETHER; c++)
          if (!(c & step)) round_of_two(v[c].x, v[c + step].x), round_of_two(v[c].y, v[c + step].y);
#pragma unroll
      for (int c = 0; c < TOGETHER; c++) {
        const int k = (first + base + c) * 128 + 4 * lane;
        if (k >= K) continue;
        const u32 minus = signs ? signs[k / 8] >> (k & 4) : 0;
        const u32 low = v[c].x ^ (minus << 15 & 0x8000u) ^ (minus << 30 & 0x80000000u);
        const u32 high = v[c].y ^ (minus << 13 & 0x8000u) ^ (minus << 28 & 0x80000000u);
        u16* to = static_cast<u16*>(w) + (u64(matrix) * N + strip * 16 + row) * K + k;
        *reinterpret_cast<uint2*>(to) = {two_bf16(from_half(u16(low)) * norm, from_half(u16(low >> 16)) * norm),
                                         two_bf16(from_half(u16(high)) * norm, from_half(u16(high >> 16)) * norm)};
      }
    }
}
#endif
