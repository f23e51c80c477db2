// Index arithmetic of the CUDA kernels, free of device code so that a host compiler can check it:
// who holds which accumulator, how shared memory is swizzled, which block does which tile, and
// which stage and phase of the pipeline an iteration meets.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define R1K_HD __host__ __device__ __forceinline__
#else
#define R1K_HD inline
#endif

namespace r1k {

constexpr int kWarpgroup = 128;  // threads

struct Place {
  int row, column;
};

// Where register `i` of a warpgroup's thread lies in the result of wgmma m64nNk16.
R1K_HD Place accumulator_place(int thread, int i) {
  return {16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2),
          8 * (i / 4) + 2 * (thread % 4) + i % 2};
}

// Byte offset of byte `byte` of row `row` in a box of 128-byte rows under TMA's 128-byte swizzle:
// 16-byte units change places with those 1 to 7 units away, by the row within its group of eight.
// The box starts at a multiple of 1024.
R1K_HD uint32_t swizzled(uint32_t row, uint32_t byte) { return row * 128 + (byte ^ row % 8 * 16); }

// wgmma's view of such a box, its rows being the M or N axis and K contiguous: bits 0-13 address
// / 16, 16-29 leading offset (not read under a swizzle), 32-45 bytes between groups of eight rows
// / 16, 62-63 the 128-byte swizzle. Adding bytes / 16 moves along K inside the 128-byte row: the
// swizzle acts on address bits, so the advanced address is swizzled like the base.
R1K_HD uint64_t descriptor(uint32_t address) {
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// Groups of `group` row tiles; in a group all rows of one vocabulary tile come before the next, so
// that the blocks at work share a weight tile and a group's hidden rows in L2.
struct TileOrder {
  int tiles_c, tiles_v, group;
  R1K_HD int count() const { return tiles_c * tiles_v; }
  R1K_HD Place at(int tile) const {
    const int first = tile / (group * tiles_v) * group, place = tile % (group * tiles_v);
    const int rows = tiles_c - first < group ? tiles_c - first : group;
    return {first + place % rows, place / rows};
  }
};

// Stage of a pipeline and the parity of the phase its barriers are in at that iteration.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  R1K_HD void skip(int iterations) {
    const int to = stage + iterations;
    stage = to % kStages;
    parity ^= to / kStages & 1;
  }
  R1K_HD void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Element of the partial sums [planes, tiles_v, C].
R1K_HD int64_t partial_index(int plane, int tile_v, int row, int tiles_v, int C) {
  return (int64_t{plane} * tiles_v + tile_v) * C + row;
}

// First of the 16-byte units that rank `rank` of `ranks` holds of a row of `units`.
R1K_HD int64_t slice_begin(int64_t units, int rank, int ranks) { return units * rank / ranks; }

// Shape of the head's GEMM: a tile and the pipeline that feeds it.
struct HeadShape {
  static constexpr int kTileC = 128, kTileV = 128, kTileD = 64, kStages = 6;
  static constexpr int kBlocksC = kTileC / 64;  // wgmma's rows
  static constexpr int kWarps = 4;              // of a consumer, that read a stage
  static constexpr int kBytesA = kTileC * kTileD * 2, kBytesB = kTileV * kTileD * 2;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  // Barriers full and empty of each stage, two that order the consumers, and room to align.
  static constexpr int kSharedBytes = kStages * kStageBytes + (2 * kStages + 2) * 8 + 1024;
};

static_assert(HeadShape::kSharedBytes <= 232448, "more than a block of sm_90 may have");

}  // namespace r1k
