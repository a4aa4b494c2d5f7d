// x R by itself, in 16 bits, where no kernel takes x on its way to x * t. Switches: those of rotate.cuh and codes.cuh,
// of which none but ROTATE and BF16 matters here.
#include "rotate.cuh"

extern "C" __global__ void __launch_bounds__(128)
rotate_input(const u16* x, const u8* signs, u16* y, u64 x_stride, int K, int chunks) {
  SHARED_MEMORY(smem);
  allow_next_kernel();
  const int v = blockIdx.y * 128 + threadIdx.x;
  const uint4 values = rotated(x + blockIdx.x * x_stride, x_stride, nullptr, signs, K, chunks, 1.f, v, smem);
  if (8 * v < K) reinterpret_cast<uint4*>(y + u64(blockIdx.x) * K)[v] = values;
}
