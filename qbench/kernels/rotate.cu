// x R by itself, in 16 bits, where no kernel takes x on its way to x * t. Switches: those of rotate.cuh and codes.cuh,
// of which none but ROTATE and BF16 matters here.
#include "rotate.cuh"

extern "C" __global__ void __launch_bounds__(128)
rotate_input(const u16* x, const u8* signs, u16* y, u64 x_stride, int K, int chunks) {
  SHARED_MEMORY(smem);
  allow_next_kernel();
  const RowPart part(blockIdx.y, chunks);
  if (part.pairs <= 0) return;
  const uint4* turned = rotated(x + blockIdx.x * x_stride, x_stride, nullptr, signs, K, 1.f, part, smem);
  uint4* to = reinterpret_cast<uint4*>(y + u64(blockIdx.x) * K);
#pragma unroll
  for (int q = 0; q < TURNS; q++)
    if ((part.vector + 32 * q) * 8 < K) to[part.vector + 32 * q] = turned[32 * q];
}
