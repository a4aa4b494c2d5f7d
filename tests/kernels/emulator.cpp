// The kernels of one file as a library for the CPU; see emulator.h. -DSOURCE names the file, -DENTRIES its kernels.
#define EMULATE
#include SOURCE

extern "C" int launch(const char* entry, const unsigned* grid, int threads, int bytes, int cluster, void** arguments) {
#define ENTRY(name) \
  if (!strcmp(entry, #name)) return run({grid[0], grid[1], grid[2]}, threads, bytes, cluster, name, arguments);
  ENTRIES
  return -1;
}
