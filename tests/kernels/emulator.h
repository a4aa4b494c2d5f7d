// The PTX that the kernels use, in C++20: one thread of the CPU per thread of a cluster, barriers where the GPU has
// them, copies that are done at once. For small problems only: the test of the kernels' logic where there is no GPU.
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define SHARED_MEMORY(name) u8* name = here.block->memory.data()

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };

struct Warp {
  std::barrier<> sync{32};
  float values[32];
  unsigned a[32][4], b[32][2];
};
// An mbarrier in 64 bits: completed phases, arrivals that end one, arrivals left, bytes still expected.
struct Barrier {
  u64 phase : 16, arrivals : 12, left : 12;
  signed long long bytes : 24;
};
struct Block {
  std::vector<unsigned char> memory;
  std::vector<std::atomic<Barrier>> barriers;  // what the 8 bytes of `memory` at 8 i stand for, which nobody may write
  std::barrier<> sync;
  std::vector<std::unique_ptr<Warp>> warps;
  std::barrier<> warpgroups[4]{std::barrier<>{128}, std::barrier<>{128}, std::barrier<>{128}, std::barrier<>{128}};
  Block(int threads, int bytes) : memory(bytes, 0xff), barriers(bytes / 8), sync(threads) {  // 0xff..: what nobody wrote reads as NaN
    for (int i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<Warp>());
  }
  int written() const {  // barriers whose memory holds something else
    int count = 0;
    for (size_t i = 0; i < barriers.size(); i++)
      count += barriers[i].load().arrivals != 0 && memcmp(memory.data() + 8 * i, "\xff\xff\xff\xff\xff\xff\xff\xff", 8) != 0;
    return count;
  }
};
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::barrier<> sync;
  Cluster(int count, int threads, int bytes) : sync(count * threads) {
    for (int i = 0; i < count; i++) blocks.push_back(std::make_unique<Block>(threads, bytes));
  }
};
struct Place {
  Cluster* cluster;
  Block* block;
  Warp* warp;
  unsigned rank;
};
static thread_local Place here;
static thread_local dim3 threadIdx, blockIdx, blockDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned long long pool = (unsigned long long)b << 32 | a;
  unsigned v = 0;
  for (int i = 0; i < 4; i++) v |= unsigned(pool >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return v;
}
inline unsigned lane_id() { return threadIdx.x % 32; }
inline void __syncwarp() { here.warp->sync.arrive_and_wait(); }
inline void __syncthreads() { here.block->sync.arrive_and_wait(); }
inline float from_lane(float value, int lane) {
  here.warp->values[lane_id()] = value;
  __syncwarp();
  float found = here.warp->values[lane];
  __syncwarp();
  return found;
}
inline float __shfl_xor_sync(unsigned, float value, int step) { return from_lane(value, lane_id() ^ step); }
inline float __shfl_sync(unsigned, float value, int lane) { return from_lane(value, lane); }
inline int __shfl_sync(unsigned, unsigned value, int lane) { return int(from_lane(float(value), lane)); }

inline float from_half(u16 v) { _Float16 h; memcpy(&h, &v, 2); return float(h); }
inline u16 to_half(float f) { _Float16 h = _Float16(f); u16 v; memcpy(&v, &h, 2); return v; }
inline u16 to_bf16(float f) {
  unsigned v;
  memcpy(&v, &f, 4);
  return u16((v + 0x7fff + (v >> 16 & 1)) >> 16);
}
inline u32 two_bf16(float low, float high) { return to_bf16(low) | u32(to_bf16(high)) << 16; }
inline u32 two_half(float low, float high) { return to_half(low) | u32(to_half(high)) << 16; }
template <u32 MASK> inline u32 select_or(u32 w, u32 bits) { return (w & MASK) | bits; }
template <bool STREAM> inline uint4 load4(const u8* p) { uint4 v; memcpy(&v, p, 16); return v; }
template <bool STREAM> inline uint2 load2(const u8* p) { uint2 v; memcpy(&v, p, 8); return v; }
template <bool STREAM> inline u32 load1(const u8* p) { u32 v; memcpy(&v, p, 4); return v; }

inline u32 shared(const void* p) { return u32(static_cast<const unsigned char*>(p) - here.block->memory.data()); }
inline u32 cluster_size() { return u32(here.cluster->blocks.size()); }
inline u32 cluster_rank() { return here.rank; }
inline u32 cluster_index() { return blockIdx.x / cluster_size(); }
inline void cluster_sync() { here.cluster->sync.arrive_and_wait(); }
inline void cluster_part() { cluster_sync(); }
inline void publish_barriers() {}
inline void await_copies() {}
inline void await_previous_kernel() {}
inline void allow_next_kernel() {}
inline void copy16(u32 to, const void* from) { memcpy(here.block->memory.data() + to, from, 16); }
inline float4 remote(u32 address, u32 rank) {
  float4 v;
  memcpy(&v, here.cluster->blocks[rank]->memory.data() + address, 16);
  return v;
}
inline void store_remote(u32 address, u32 rank, float4 v) {
  memcpy(here.cluster->blocks[rank]->memory.data() + address, &v, 16);
}

inline std::atomic<Barrier>& barrier_at(u32 bar, u32 rank) { return here.cluster->blocks[rank]->barriers[bar / 8]; }
inline void barrier_init(u32 bar, u32 arrivals = 1) { barrier_at(bar, here.rank) = Barrier{0, arrivals, arrivals, 0}; }
inline void change(u32 bar, u32 rank, int arrived, int bytes) {
  Barrier before = barrier_at(bar, rank), after;
  do {
    after = before, after.left -= arrived, after.bytes += bytes;
    if (after.left == 0 && after.bytes == 0) after.phase++, after.left = after.arrivals;
  } while (!barrier_at(bar, rank).compare_exchange_weak(before, after));
}
inline void barrier_arrive(u32 bar) { change(bar, here.rank, 1, 0); }
inline void barrier_arrive(u32 bar, u32 rank, bool now) { if (now) change(bar, rank, 1, 0); }
inline void barrier_expect(u32 bar, u32 bytes) { change(bar, here.rank, 1, int(bytes)); }
inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar) {
  memcpy(here.block->memory.data() + to, from, bytes);
  change(bar, here.rank, 0, -int(bytes));
}
inline void barrier_wait(u32 bar, u32 parity) {
  while ((Barrier(barrier_at(bar, here.rank)).phase & 1) == parity) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}
template <int> inline void fewer_registers() {}
template <int> inline void more_registers() {}

// Here a map holds what the driver's call is given: address, columns, rows, bytes from row to row, rows of a box.
struct Map { u64 words[16]; };
inline void box_copy(u32 to, const Map& map, int column, int row, u32 bar, u32 blocks) {
  const int columns = int(map.words[1]), rows = int(map.words[2]), box = int(map.words[4]);
  if (blocks == 0) blocks = 1u << here.rank;
  for (u32 rank = 0; blocks >> rank; rank++) {
    if (!(blocks >> rank & 1)) continue;
    unsigned char* memory = here.cluster->blocks[rank]->memory.data();
    for (int r = 0; r < box; r++)
      for (int c = 0; c < 64; c++) {
        u16 v = 0;
        if (row + r < rows && column + c < columns)
          v = *reinterpret_cast<const u16*>(map.words[0] + (row + r) * map.words[3] + 2 * (column + c));
        const u32 at = to + r * 128 + 2 * c;
        memcpy(memory + (at ^ (at >> 7 & 7) << 4), &v, 2);
      }
    change(bar, rank, 0, -box * 128);
  }
}
inline void warpgroup_sync(int group) { here.block->warpgroups[group].arrive_and_wait(); }
inline void store_transposed(u32 to, const u32 (&v)[4]) {
  Warp& warp = *here.warp;
  const unsigned lane = lane_id();
  memcpy(warp.a[lane], v, 16), warp.b[lane][0] = to;
  __syncwarp();
  for (int i = 0; i < 4; i++)
    for (int low = 0; low < 2; low++) {  // element (lane / 4, 2 (lane % 4) + low) of matrix i goes to the mirrored place
      const u16 value = u16(v[i] >> (16 * low));
      memcpy(here.block->memory.data() + warp.b[8 * i + 2 * (lane % 4) + low][0] + lane / 4 * 2, &value, 2);
    }
  __syncwarp();
}

inline float element(u32 pair, int which);
inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  Warp& warp = *here.warp;
  const unsigned lane = lane_id(), g = lane / 4, tig = lane % 4;
  const u32 a[4] = {a0, a1, a2, a3};
  memcpy(warp.a[lane], a, 16);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const unsigned row = i / 2, column = 2 * tig + i % 2;  // of the two rows g, g + 8; of the batch
    float sum = c[i];
    for (unsigned k = 0; k < 16; k++)  // k = 8 * high + 2 * owner + low
      sum += element(warp.a[4 * g + k % 8 / 2][row + 2 * (k / 8)], k % 2) *
             element(warp.b[4 * column + k % 8 / 2][k / 8], k % 2);
    c[i] = sum;
  }
  __syncwarp();
}
inline float element(u32 pair, int which) {
  const u16 v = u16(pair >> (16 * which));
#if BF16
  return __uint_as_float(u32(v) << 16);
#else
  return from_half(v);
#endif
}
inline u32 store2(float low, float high) { return BF16 ? two_bf16(low, high) : two_half(low, high); }
inline u32 minus2(u32 a, u32 b) { return store2(element(a, 0) - element(b, 0), element(a, 1) - element(b, 1)); }
inline u32 fma2(u32 a, u32 b, u32 c) {
  return store2(element(a, 0) * element(b, 0) + element(c, 0), element(a, 1) * element(b, 1) + element(c, 1));
}
inline u32 times2(u32 a, u32 b) { return store2(element(a, 0) * element(b, 0), element(a, 1) * element(b, 1)); }

#ifdef NB
// B in shared memory: rows of 128 bytes, bits 4 to 6 of the address swizzled by bits 7 to 9.
template <int B = NB> inline void wgmma(float (&d)[4 * NB], const u32 (&a)[4], u64 b) {
  Warp& warp = *here.warp;
  const unsigned lane = lane_id(), g = lane / 4, tig = lane % 4, start = unsigned(b & 0x3fff) << 4;
  memcpy(warp.a[lane], a, 16);
  __syncwarp();
  for (int i = 0; i < 4 * B; i++) {
    const unsigned row = i % 4 / 2, column = 8 * (i / 4) + 2 * tig + i % 2;
    float sum = d[i];
    for (unsigned k = 0; k < 16; k++) {
      const unsigned at = start + column * 128 + 2 * k;
      u16 v;
      memcpy(&v, here.block->memory.data() + (at ^ (at >> 7 & 7) << 4), 2);
      sum += element(warp.a[4 * g + k % 8 / 2][row + 2 * (k / 8)], k % 2) * element(v, 0);
    }
    d[i] = sum;
  }
  __syncwarp();
}
inline void wgmma_open() {}
inline void wgmma_commit() {}
template <int LEFT> inline void wgmma_wait() {}
#endif

// Calls kernel(*arguments[0], *arguments[1], ...), each as the type that the kernel declares.
template <class... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
}

template <class... A>
int run(dim3 grid, int threads, int bytes, int cluster, void (*kernel)(A...), void** arguments) {
  int written = 0;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned first = 0; first < grid.x; first += cluster) {
        Cluster blocks(cluster, threads, bytes);
        std::vector<std::thread> running;
        for (int rank = 0; rank < cluster; rank++)
          for (int thread = 0; thread < threads; thread++)
            running.emplace_back([&, rank, thread] {
              Block* block = blocks.blocks[rank].get();
              here = {&blocks, block, block->warps[thread / 32].get(), unsigned(rank)};
              threadIdx = {unsigned(thread), 0, 0}, blockIdx = {first + rank, y, z}, blockDim = {unsigned(threads), 1, 1};
              call(kernel, arguments, std::index_sequence_for<A...>());
              here.warp->sync.arrive_and_drop();
            });
        for (auto& thread : running) thread.join();
        for (auto& block : blocks.blocks) written += block->written();
      }
  return written;
}
