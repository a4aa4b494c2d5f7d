// The instructions that the kernels use beyond C++. tests/kernels/emulator.h has the same in plain C++, which runs the
// kernels' logic on a CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef BF16
#define BF16 0
#endif
#ifndef PLAIN
#define PLAIN 0
#endif

#ifdef EMULATE
#include "emulator.h"
#else
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) u8 name[]
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
__device__ __forceinline__ u32 two_half(float low, float high) {
  u32 v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
#if PLAIN  // below compute capability 9.0: no clusters, and kernels start one after the other
__device__ __forceinline__ u32 cluster_size() { return 1; }
__device__ __forceinline__ u32 cluster_index() { return blockIdx.x; }
__device__ __forceinline__ u32 cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ float4 remote(u32, u32) { return {}; }
__device__ __forceinline__ void store_remote(u32, u32, float4) {}
__device__ __forceinline__ void await_previous_kernel() {}
__device__ __forceinline__ void allow_next_kernel() {}
#else
__device__ __forceinline__ u32 cluster_size() {
  u32 v;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(v));
  return v;
}
__device__ __forceinline__ u32 cluster_index() {  // blockIdx.x / cluster_size()
  u32 v;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(v));
  return v;
}
__device__ __forceinline__ u32 cluster_rank() {
  u32 v;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v));
  return v;
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
__device__ __forceinline__ void store_remote(u32 address, u32 rank, float4 v) {
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nst.shared::cluster.v4.f32 [there], {%2,%3,%4,%5};\n}"
      ::"r"(address), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
#endif
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
__device__ __forceinline__ void barrier_init(u32 bar, u32 arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
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
// A map of x `[M, K]` that the driver encodes: boxes of 64 columns, 128 bytes, swizzled by row as wgmma reads them.
struct alignas(64) Map { u64 words[16]; };
// The box at (column, row) to `to` in every block of `blocks` (one bit each; 0: this block alone), and its bytes to their
// barriers at `bar`.
__device__ __forceinline__ void box_copy(u32 to, const Map& map, int column, int row, u32 bar, u32 blocks) {
  if (blocks == 0)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(bar) : "memory");
  else
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(bar), "h"(u16(blocks)) : "memory");
}
// At the barrier of block `rank` of the cluster, if `now`; without a branch, which would end what may overlap a wgmma.
__device__ __forceinline__ void barrier_arrive(u32 bar, u32 rank, bool now) {
  asm volatile("{\n.reg .u32 there;\n.reg .pred now;\nsetp.ne.b32 now, %2, 0;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "@now mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(bar), "r"(rank), "r"(int(now)) : "memory");
}
__device__ __forceinline__ void warpgroup_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}
// Four 8 x 8 matrices of 16-bit floats, transposed; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void store_transposed(u32 to, const u32 (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
template <int COUNT> __device__ __forceinline__ void fewer_registers() {  // of every thread of a warpgroup, for others
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
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

// Two 16-bit floats at a time.
#if BF16
#define PAIR "bf16x2"
#else
#define PAIR "f16x2"
#endif
__device__ __forceinline__ u32 minus2(u32 a, u32 b) {
  u32 d;
  asm("sub." PAIR " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn." PAIR " %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ u32 times2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn." PAIR " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// wgmma: between `open` and `wait` the accumulators and A belong to the tensor core. d[16 rows of each warp][8 NB] +=
// A * B^T, where B `[8 NB rows][16 columns]` lies in shared memory at `b` (see descriptor in wide_linear.cu).
#ifdef NB
#define R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define R16 R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define R24 R16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define R32 R24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define R48 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define R64 R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define R72 R64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define R96                                                                                                      \
  R72 ",%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define R128                                                                                                     \
  R96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116," \
      "%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#if BF16
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 "
#else
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 "
#endif
// With A in registers; of the first 8 B rows of B alone, if a block has no more of them.
template <int B = NB> __device__ __forceinline__ void wgmma(float (&d)[4 * NB], const u32 (&a)[4], u64 b) {
#define A_IN_REGISTERS(n, registers, a0, a1, a2, a3, b) \
  WGMMA(n) "{" registers "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1, 0;"
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
  if constexpr (B == 2) asm volatile(A_IN_REGISTERS(16, R8, 8, 9, 10, 11, 12) : D8(0) : OPERANDS);
  else if constexpr (B == 4) asm volatile(A_IN_REGISTERS(32, R16, 16, 17, 18, 19, 20) : D8(0), D8(8) : OPERANDS);
  else if constexpr (B == 6) asm volatile(A_IN_REGISTERS(48, R24, 24, 25, 26, 27, 28) : D8(0), D8(8), D8(16) : OPERANDS);
  else if constexpr (B == 8) asm volatile(A_IN_REGISTERS(64, R32, 32, 33, 34, 35, 36) : D32(0) : OPERANDS);
  else if constexpr (B == 12)
    asm volatile(A_IN_REGISTERS(96, R48, 48, 49, 50, 51, 52) : D32(0), D8(32), D8(40) : OPERANDS);
  else if constexpr (B == 16) asm volatile(A_IN_REGISTERS(128, R64, 64, 65, 66, 67, 68) : D32(0), D32(32) : OPERANDS);
  else if constexpr (B == 18)
    asm volatile(A_IN_REGISTERS(144, R72, 72, 73, 74, 75, 76) : D32(0), D32(32), D8(64) : OPERANDS);
  else if constexpr (B == 24)
    asm volatile(A_IN_REGISTERS(192, R96, 96, 97, 98, 99, 100) : D32(0), D32(32), D32(64) : OPERANDS);
  else if constexpr (B == 32)
    asm volatile(A_IN_REGISTERS(256, R128, 128, 129, 130, 131, 132) : D32(0), D32(32), D32(64), D32(96) : OPERANDS);
}
__device__ __forceinline__ void wgmma_open() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wgmma_wait() {  // until at most LEFT committed groups are under way
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
#endif
#endif

__device__ __forceinline__ float from_bf16(u16 v) { return __uint_as_float(u32(v) << 16); }
__device__ __forceinline__ float load16(u16 v) { return BF16 ? from_bf16(v) : from_half(v); }
__device__ __forceinline__ u16 store16(float f) { return BF16 ? to_bf16(f) : to_half(f); }
__device__ __forceinline__ u32 round2(float low, float high) { return BF16 ? two_bf16(low, high) : two_half(low, high); }
