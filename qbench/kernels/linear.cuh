// What both linears share: x * t on the way in, the sums over the splits of K on the way out.
#pragma once
#include "codes.cuh"

// Two adjacent 16-bit floats in a register.
__device__ __forceinline__ float low(u32 pair) { return BF16 ? __uint_as_float(pair << 16) : from_half(u16(pair)); }
__device__ __forceinline__ float high(u32 pair) {
  return BF16 ? __uint_as_float(pair & 0xffff0000u) : from_half(u16(pair >> 16));
}

// Eight columns of x from column k on; x may be unaligned, ragged or permuted.
__device__ __forceinline__ uint4 load_x(const u16* x, const int* permutation, int k, int K, bool wide) {
  uint4 pairs = {0, 0, 0, 0};
  if (wide) {
    if (k < K) pairs = *reinterpret_cast<const uint4*>(x + k);
  } else {
    u16 values[8];
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = k + j < K ? x[permutation ? permutation[k + j] : k + j] : 0;
    pairs = {values[0] | u32(values[1]) << 16, values[2] | u32(values[3]) << 16, values[4] | u32(values[5]) << 16,
             values[6] | u32(values[7]) << 16};
  }
  return pairs;
}

// x * t, rounded once to 16 bits; `down` is a power of two that keeps it finite in fp16, bf16 needs none.
__device__ __forceinline__ u32 scaled(u32 x, u32 t, float down) {
  float first = from_half(u16(t)), second = from_half(u16(t >> 16));
  if (!BF16) first *= down, second *= down;
  return round2(low(x) * first, high(x) * second);
}
__device__ __forceinline__ uint4 scaled(uint4 x, uint4 t, float down) {
  return {scaled(x.x, t.x, down), scaled(x.y, t.y, down), scaled(x.z, t.z, down), scaled(x.w, t.w, down)};
}

// Whether rows of x can be read 16 bytes at a time.
__device__ __forceinline__ bool aligned_rows(const u16* x, u64 x_stride, const int* permutation, int K) {
  return !permutation && K % 8 == 0 && x_stride % 8 == 0 && (u64(x) & 15) == 0;
}

__device__ __forceinline__ void add(float4& sum, float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

struct Output {
  u16* y;            // [batch, N]
  const u16* bias;   // [N] or null
  float t_up;        // undoes t_down
  int N;
};

// y = t_up * sum over the splits of K + bias, in a fixed order. Every block of the cluster holds
// partial[split within the block][batch of `padded`][stride] and writes its share of the `rows` from row0 on.
__device__ __forceinline__ void store_sums(const Output& out, const float* partial, int rows, int stride, int row0,
                                           int splits_in_block, int padded, int batch, u32 splits, u32 rank) {
  if (splits > 1) cluster_sync();
  else __syncthreads();
  const int vectors = rows / 4;
  for (int e = rank * blockDim.x + threadIdx.x; e < batch * vectors; e += splits * blockDim.x) {
    const int m = batch == 1 ? 0 : e / vectors, row = 4 * (e - m * vectors), n = row0 + row;
    if (n >= out.N) continue;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int w = 0; w < splits_in_block; w++) {
      const float* at = partial + (w * padded + m) * stride + row;
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
      rounded[j] = store16(value[j] * out.t_up + (out.bias && n + j < out.N ? load16(out.bias[n + j]) : 0.f));
    u16* to = out.y + u64(m) * out.N + n;
    if (out.N % 4 == 0) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(rounded);
    else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (n + j < out.N) to[j] = rounded[j];
    }
  }
  if (splits > 1) cluster_part();  // nobody leaves while others read its memory
}
