// y = x W^T + b for prompts, with W written in 16 bits just ahead of the products that read it; compiled at run time.
//
// Compile-time switches: those of codes.cuh, INPUT_SCALE 0|1, GROUPS (warpgroups that multiply, 64 rows of the weight each),
// NB (8-row blocks of x) and STAGES (of 64 columns of x and of the weight in flight).
//
// A weight is finished once, whatever the rows of x: spare warps of all blocks write it to global memory, which is to say
// to the L2 cache, in the image that wgmma reads, t included. They draw pieces as tickets, in the order in which the tiles
// of y want them, and stay a few chunks ahead of their own block, so that what they write is still in the cache when it is
// read. A writer waits for its own block alone, whose tiles need nothing but what was drawn before: any number of blocks at
// work gets through. Warpgroups that do nothing but multiply take both operands from shared memory, as a 16-bit product
// would: W by bulk copies, x by box copies that every block of a cluster shares with the others. Blocks stay and take one
// tile of y after the other.
//
// TOGETHER: that many weights of the same columns in one launch, of which each has its own rows of tiles.

#include "prompt.cuh"

#define SPARE 4                                    // warps that do not multiply: one fetches, the others write
#define X_BYTES (8 * NB * 128)                     // 64 columns
#define W_BYTES (STRIPS * 2048)                    // 64 columns
#define PIECE (BITS == 8 ? 2 : 4)                  // strips that a warp writes at a time
#define LEAD 6                                     // chunks of a tile that the writers of a block may be ahead of it
#define X_TOGETHER 8                               // tiles along x that are multiplied side by side, for the cache

struct Problem {
  Weight each[TOGETHER];
  const float* codebook;  // [16] or null
  int M, chunks;
  int row_blocks, x_blocks, clusters;  // tiles of y: clusters of blocks along N, blocks along M; clusters at work
  u8* image;              // [row blocks][blocks of a cluster][2 * chunks][W_BYTES]
  u32* ready;             // [row blocks][blocks of a cluster][chunks] zeros: how many strips are there; then tickets
};

extern "C" __global__ void clear_flags(u32* flags, int count) {
  allow_next_kernel();
  await_previous_kernel();  // which may read them
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) flags[i] = 0;
}

// Tiles of y in the order in which they are multiplied: X_TOGETHER side by side, then the next rows of the weight.
struct Tile {
  int row_block, x_block;
  __device__ __forceinline__ Tile(const Problem& p, int tile) {
    const int group = tile / (p.row_blocks * X_TOGETHER), width = min(X_TOGETHER, p.x_blocks - group * X_TOGETHER);
    tile -= group * p.row_blocks * X_TOGETHER;
    row_block = tile / width, x_block = group * X_TOGETHER + tile - row_block * width;
  }
};

// What a ticket stands for: a chunk of PIECE adjacent strips, so that one wait for what was written serves several. Rows of
// tiles that are multiplied at a time make a band, within which all first chunks come first.
struct Piece {
  int row_block, strip, chunk, place;  // strip of the cluster's, the first; place: in chunks of the tiles of a block
  __device__ __forceinline__ Piece(const Problem& p, int ticket, int strips, int rows_at_a_time) {
    const int pieces = strips / PIECE, band = ticket / (rows_at_a_time * pieces * p.chunks);
    const int rows = min(rows_at_a_time, p.row_blocks - band * rows_at_a_time), lines = rows * pieces;
    ticket -= band * rows_at_a_time * pieces * p.chunks;
    chunk = ticket / lines;
    const int line = ticket - chunk * lines;
    place = band * p.chunks + chunk;
    row_block = band * rows_at_a_time + line / pieces, strip = line % pieces * PIECE;
  }
};

extern "C" __global__ void __launch_bounds__(128 * GROUPS + 32 * SPARE, 1)
ahead_linear(const __grid_constant__ Map x, const __grid_constant__ Problem p) {
  SHARED_MEMORY(smem);
  const u32 share = cluster_size(), rank = cluster_rank();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int tiles = p.row_blocks * p.x_blocks, first_tile = int(cluster_index());
  const u32 w_stages = shared(smem) + STAGES * X_BYTES, turn = w_stages + STAGES * W_BYTES;
  const u32 full = turn + STRIPS * 512, empty = full + 8 * STAGES;
  volatile int* fetched = reinterpret_cast<volatile int*>(smem + (empty + 8 * STAGES - shared(smem)));  // chunks of tiles
  if (threadIdx.x == 0) {
    *fetched = 0;
#pragma unroll 1
    for (int s = 0; s < STAGES; s++) barrier_init(full + 8 * s), barrier_init(empty + 8 * s, STRIPS * share);
    publish_barriers();
  }
  if (share > 1) cluster_sync();
  else __syncthreads();
  allow_next_kernel();

  if (warp >= STRIPS) {
    u32* tickets = p.ready + p.row_blocks * int(share) * p.chunks;
    if (warp == STRIPS) {  // fetches
      await_previous_kernel();  // which may write x
      int stage = 0;
      u32 parity = 1;
      int before = 0;  // chunks of the block's earlier tiles
#pragma unroll 1
      for (int tile = first_tile; tile < tiles; tile += p.clusters, before += p.chunks) {
        const Tile at(p, tile);
        const int block = at.row_block * int(share) + int(rank), m0 = at.x_block * 8 * NB + int(rank * (8 * NB / share));
        const u8* from = p.image + u64(block) * p.chunks * (2 * W_BYTES);
        int known = 0;  // so many chunks have been written
#pragma unroll 1
        for (int half = 0; half < 2 * p.chunks; half++) {
          while (known <= half / 2) {
            const int chunk = known + lane;
            const bool there = chunk >= p.chunks || load_flag(p.ready + block * p.chunks + chunk) == STRIPS;
            known += leading(there);
          }
          if (lane == 0) *fetched = before + half / 2;
          barrier_wait(empty + 8 * stage, parity);
          if (lane == 0) {
            const u32 bar = full + 8 * stage;
            barrier_expect(bar, X_BYTES + W_BYTES);
            box_copy(shared(smem) + stage * X_BYTES + rank * (X_BYTES / share), x, half * 64, m0, bar, (1u << share) - 1);
            see_written();
            bulk_copy(w_stages + stage * W_BYTES, from + u64(half) * W_BYTES, W_BYTES, bar);
          }
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
      if (lane == 0) *fetched = 1 << 30;  // what is left is for others
    } else {  // writes
      const int g = lane / 4, tig = lane % 4, strips = STRIPS * int(share);
      const int rows_at_a_time = (p.clusters + min(X_TOGETHER, p.x_blocks) - 1) / min(X_TOGETHER, p.x_blocks);
      const int pieces = p.row_blocks * (strips / PIECE) * p.chunks;
      Table table = {};
#if CODEBOOK
      table = load_table(p.codebook);
#endif
      auto load = [&](const Piece& piece, Codes (&codes)[PIECE]) {
        const Weight& weight = weight_at(p.each, piece.row_block);
        const int first = (piece.row_block - weight.first) * strips + piece.strip;
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
          const u8* from = weight.tiles + (u64(min(first + i, weight.strips - 1)) * p.chunks + piece.chunk) * CHUNK;
          codes[i] = load_codes<true>(from + lane_codes(lane), from + lane_aux(lane));
        }
      };
      auto write = [&](const Piece& piece, const Codes (&codes)[PIECE]) {
        const int block = piece.row_block * int(share) + piece.strip / STRIPS;
        u8* to = p.image + (u64(block) * p.chunks + piece.chunk) * (2 * W_BYTES) + piece.strip % STRIPS * 2048 + g * 128;
        const u16* t = weight_at(p.each, piece.row_block).t + piece.chunk * 128 + 8 * tig;
        auto unit = [&](auto index) {
          constexpr int U = decltype(index)::value;
          u32 f[4];
          if (INPUT_SCALE) {
            const uint4 raw = *reinterpret_cast<const uint4*>(t + 32 * U);
            f[0] = factors(raw.x), f[1] = factors(raw.y), f[2] = factors(raw.z), f[3] = factors(raw.w);
          }
#pragma unroll
          for (int strip = 0; strip < PIECE; strip++) {
            u32 a[2][4];
            weights<U>(codes[strip], table, a);
#pragma unroll
            for (int r = 0; r < 2; r++) {
              u32 v[4] = {a[0][r], a[0][2 + r], a[1][r], a[1][2 + r]};
#pragma unroll
              for (int i = 0; i < 4; i++)
                if (INPUT_SCALE) v[i] = times2(v[i], f[i]);
              u8* at = to + U / 2 * W_BYTES + strip * 2048 + r * 1024 + (((U % 2 * 4 + tig) ^ g) << 4);
              *reinterpret_cast<uint4*>(at) = {v[0], v[1], v[2], v[3]};
            }
          }
        };
        unit(Index<0>{}), unit(Index<1>{}), unit(Index<2>{}), unit(Index<3>{});
        show_written();
        __syncwarp();
        if (lane == 0) add_to_flag(p.ready + block * p.chunks + piece.chunk, PIECE);
      };
      await_previous_kernel();  // which may read the image
      int ticket = from_first(draw_ticket(tickets, lane)), next = draw_ticket(tickets, lane);
      if (ticket < pieces) {
        Piece piece(p, ticket, strips, rows_at_a_time);
        Codes codes[PIECE], coming[PIECE];
        load(piece, codes);
#pragma unroll 1
        while (true) {
          ticket = from_first(next);  // drawn a piece ago
          const bool more = ticket < pieces;
          if (more) next = draw_ticket(tickets, lane);
          const Piece behind = more ? Piece(p, ticket, strips, rows_at_a_time) : piece;
          load(behind, coming);
          while (*fetched + LEAD < piece.place) rest();
          write(piece, codes);
          if (!more) break;
          piece = behind;
#pragma unroll
          for (int i = 0; i < PIECE; i++) codes[i] = coming[i];
        }
      }
    }
  } else {
    int stage = 0, held = 0;
    u32 parity = 0;
    float acc[4 * NB];
    const u32 rows = w_stages + warp / 4 * 8192;  // of this warpgroup, in a stage
#pragma unroll 1
    for (int tile = first_tile; tile < tiles; tile += p.clusters) {
#pragma unroll
      for (int i = 0; i < 4 * NB; i++) acc[i] = 0.f;
#pragma unroll 1
      for (int half = 0; half < 2 * p.chunks; half++) {
        barrier_wait(full + 8 * stage, parity);
        const u64 a = descriptor(rows + stage * W_BYTES), b = descriptor(shared(smem) + stage * X_BYTES);
        wgmma_open();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_shared(acc, a + 2 * k, b + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        barrier_arrive(empty + 8 * held, lane, half > 0 && lane < share);
        held = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      barrier_arrive(empty + 8 * held, lane, lane < share);
      const Tile at(p, tile);
      const Weight& weight = weight_at(p.each, at.row_block);
      const int strip = int((at.row_block - weight.first) * share + rank) * STRIPS + warp / 4 * 4;
      const u32 mine = turn + warp / 4 * 2048;
      store_tile(acc, weight, strip * 16, at.x_block * 8 * NB, p.M, mine, smem + (mine - shared(smem)), warp / 4);
    }
  }
  if (share > 1) cluster_sync();  // until then others copy into this block's memory and arrive at its barriers
}
