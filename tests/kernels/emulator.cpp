// dual_linear.cu as a library for the CPU; see emulator.h.
#define EMULATE
#include "dual_linear.cu"

extern "C" void launch(const unsigned* grid, int threads, int bytes, int cluster, void** arguments) {
#ifdef GEMM
  if (threads == 128 && bytes == 0) {
    run({grid[0], grid[1], grid[2]}, threads, 0, 1, [&] {
      scale_input(*(const u16**)arguments[0], *(const u16**)arguments[1], *(const int**)arguments[2],
                  *(u16**)arguments[3], *(Sums**)arguments[4], *(u64*)arguments[5], *(int*)arguments[6],
                  *(int*)arguments[7], *(float*)arguments[8]);
    });
    return;
  }
  run({grid[0], grid[1], grid[2]}, threads, bytes, cluster, [&] { dual_linear(*(const Problem*)arguments[0]); });
#else
  run({grid[0], grid[1], grid[2]}, threads, 0, 1, [&] {
    dequantize(*(const u8**)arguments[0], *(const u16**)arguments[1], *(const float**)arguments[2],
               *(void**)arguments[3], *(int*)arguments[4], *(int*)arguments[5], *(int*)arguments[6],
               *(int*)arguments[7]);
  });
#endif
}
