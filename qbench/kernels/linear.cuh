// What both linears share: x * t on the way in, the sums over the splits of K on the way out.
#pragma once
#include "codes.cuh"

// Eight columns of x * t from column k on, rounded once to 16 bits. `t` are the fp16 factors of these eight columns, or
// null; x may be unaligned, ragged or permuted.
__device__ __forceinline__ uint4 scaled(const u16* x, const u16* t, const int* permutation, int k, int K, bool wide,
                                        float t_down) {
  u16 values[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (wide && k < K) *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(x + k);
  if (!wide) {
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (k + j < K) values[j] = x[permutation ? permutation[k + j] : k + j];
  }
  if (t) {
    uint4 raw = *reinterpret_cast<const uint4*>(t);
    const u16* factors = reinterpret_cast<const u16*>(&raw);
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = store16(load16(values[j]) * (from_half(factors[j]) * t_down));
  }
  return *reinterpret_cast<uint4*>(values);
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
    const int m = e / vectors, row = 4 * (e - m * vectors), n = row0 + row;
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
