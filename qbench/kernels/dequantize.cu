// W[N, K], or a stack of them, from its codes, in 16 or 32 bits, one warp a chunk; a block takes chunks of one strip side
// by side, so that its rows are written in long runs. Switches: those of codes.cuh and OUT (0 fp16, 1 bf16, 2 fp32).
#include "codes.cuh"

extern "C" __global__ void __launch_bounds__(256)
dequantize(const u8* tiles, const u16* t, const float* codebook, void* w, int N, int K, int strips, int chunks) {
  const int lane = threadIdx.x % 32, g = lane / 4, tig = lane % 4;
  const int matrix = blockIdx.x / strips, strip = blockIdx.x - matrix * strips;
  const int chunk = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  if (chunk >= chunks) return;
  const u8* from = tiles + (u64(blockIdx.x) * chunks + chunk) * CHUNK;
  if (t) t += u64(matrix) * chunks * 128;
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
