// The linear head's GEMM with the anchored softmax in its epilogue, for sm_90a; the contract is
// that of _head_kernel in r1kernels/_triton/head_kernels.py. bfloat16 operands, float32 sums.
//
// A persistent block: warpgroup 0 feeds, warpgroups 1 and 2 consume in ping-pong: each takes every
// other tile whole, so that the epilogue of one runs beside the products of the other. Blocks of a
// cluster (1 or 2) work on row tiles next to each other against the same vocabulary tile; each
// loads its share of that tile and multicasts it.
//
// Why no barrier is passed too early, and none hangs. A block counts its k-blocks over all its
// tiles: iteration t uses stage t % kStages, and is that stage's use n = t / kStages. A wait names
// only the parity of a phase, so it is sound while the barrier is in phase n or n + 1; in phase
// n - 1 it would return at once. Let full[s], empty[s] count their phases from 0.
//   full[s], phase n: one arrival, the producer's, which announces the bytes of use n, and those
//     bytes, a part of them sent by the other block. A sender waits for its own empty[s] phase
//     n - 1, on which the consumers of every block arrive, and these have seen full[s] phase n - 1
//     of their block: bytes of use n never count on phase n - 1. They may come before the local
//     arrival, but the phase stays open until that.
//   empty[s], phase n: the warps of the consumer in each block, after their products of use n are
//     done. The producer's wait before use n is for phase n - 1 (none before use 0: parity 1 of a new barrier
//     counts as complete). Phase n cannot complete before use n is filled, so the barrier is
//     in phase n - 1 or n.
//   A consumer waits for full[s] phase n. It cannot be in phase n + 2: that would need its own
//     release of use n. It is not in phase n - 1 if all waits of earlier iterations are over.
//     The tile before is the other consumer's: order[w] has a phase per tile of consumer w but
//     the block's first, completed by one arrival per warp of the other consumer after the last
//     full-wait of its tile.
//     Phases of order[w] alternate with those of order[1 - w], so each is at most one ahead.
//     The same order keeps the tensor cores on one tile at a time.
//   No cycle: the producer waits for releases of earlier uses only, consumer w for the main loop of
//     the tile before, and a main loop for its own loads and the releases before them. Epilogues
//     wait for nothing. Blocks of a cluster have the same tiles, hence the same iterations.
//   The end: a block's full-waits cover all that is sent to it, but the other's releases may come
//     late, so no block leaves before all threads of the cluster are done.
#pragma once
#include "cuda/layout.hpp"
#include "cuda/transform.cuh"

namespace r1k {

enum HeadMode { kSums, kStore, kGradient };

constexpr int kHeadThreads = 3 * kWarpgroup;
// 40 + 2 * 232 registers per thread of each warpgroup: all of the multiprocessor's 504 * 128.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
// Stored entries of a row about to be redone are held here, so that no inf is ever written.
constexpr float kStoreLimit = 0x1p100f;

struct HeadArgs {
  const int64_t* targets;  // [C]; a negative one is no column
  const float* anchor;     // [C]
  const float* per_tau;    // [C]
  const float* bias;       // [V] or null
  const float* alpha;      // [C], as the two below for kGradient only
  const float* beta;
  const float* centre;
  uint16_t* out;   // [C, columns] bfloat16; not for kSums
  float* partial;  // [planes, tiles_v, C]: s, u with entropy; what rounding took, if stored
  int C, V, blocks_d;
  int64_t columns;  // multiple of 16
  float scale, softcap;
  TileOrder order;  // its row tiles are those of a cluster
};

struct RowTerms {
  float anchor, per_tau, alpha, beta, centre;
  int target;  // column in the tile, or -1
};

// Four words per lane, word g of lane q being pair q of group g, to pair g of group q: afterwards
// a lane's words are eight neighbours in a row, one 16-byte store.
R1K_DEVICE void transpose_quad(uint32_t (&word)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int g = 0; g < 4; g += 2) {
    const uint32_t got = ptx::shuffle_xor(odd ? word[g] : word[g + 1], 1);
    word[g] = odd ? got : word[g];
    word[g + 1] = odd ? word[g + 1] : got;
  }
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    const uint32_t got = ptx::shuffle_xor(high ? word[g] : word[g + 2], 2);
    word[g] = high ? got : word[g];
    word[g + 2] = high ? word[g + 2] : got;
  }
}

R1K_DEVICE float sum_quad(float x) {
  x = ptx::add(x, ptx::shuffle_xor(x, 1));
  return ptx::add(x, ptx::shuffle_xor(x, 2));
}

// Read after the main loop: held through it, the terms would cost registers it does not have.
template <int kMode>
R1K_DEVICE RowTerms load_row(int row, int tile_v, const HeadArgs& args) {
  RowTerms terms = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, -1};
  if (row >= args.C) return terms;
  const int64_t target = args.targets[row] - int64_t{tile_v} * HeadShape::kTileV;
  if (target >= 0 && target < HeadShape::kTileV) terms.target = static_cast<int>(target);
  terms.anchor = args.anchor[row];
  terms.per_tau = args.per_tau[row];
  if (kMode == kGradient) {
    terms.alpha = args.alpha[row];
    terms.beta = args.beta[row];
    terms.centre = args.centre[row];
  }
  return terms;
}

// The accumulators of 64 rows to sums and stored entries; a thread has two rows, eight apart.
// Every sum has one order whatever the mode: a thread's columns from left to right, then the four
// threads of a row.
template <int kMode, bool kSoftcap, bool kEntropy>
R1K_DEVICE void epilogue(float (&acc)[HeadShape::kTileV / 2], int first_row, int tile_v,
                         const HeadArgs& args) {
  constexpr int kCount = HeadShape::kTileV / 2;
  const int thread = ptx::thread_index() % kWarpgroup, lane = thread % 4;
  const int first = tile_v * HeadShape::kTileV;  // column
  const float per_softcap = kSoftcap ? ptx::divide(1.0f, args.softcap) : 0.0f;

  if (args.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = first + accumulator_place(thread, i).column;
      acc[i] = ptx::add(acc[i], column < args.V ? args.bias[column] : 0.0f);
    }
  }
  if (kSoftcap) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      acc[i] = capped<true>(acc[i], args.scale, args.softcap, per_softcap);
  }

  // One row after the other, so that the terms of one are in registers at a time.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + accumulator_place(thread, 2 * half).row;
    const RowTerms terms = load_row<kMode>(row, tile_v, args);
    // The target column and those beyond V get no weight. Few warps meet either, so the others
    // pay one vote.
    const int width = args.V - first;
    if (ptx::any(width < HeadShape::kTileV || terms.target >= 0)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i / 2 % 2 != half) continue;
        const int column = accumulator_place(thread, i).column;
        if (column >= width || column == terms.target) acc[i] = -INFINITY;
      }
    }

    float s = 0.0f, u = 0.0f, residue = 0.0f;
#pragma unroll
    for (int chunk = 2 * half; chunk < kCount; chunk += 16) {
      uint32_t word[4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        float value[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& z = acc[chunk + 4 * pair + i];
          ptx::pin(z);
          const float x = kSoftcap ? z : ptx::mul(z, args.scale);
          const float d = ptx::fma(x, terms.per_tau, -terms.anchor);
          // No inf is ever stored; a row that meets the limit is redone, so its sum may have it
          // too.
          const float exact = exponential(d);
          const float e = kMode == kStore ? fminf(exact, kStoreLimit) : exact;
          if (kMode != kGradient) {
            s = ptx::add(s, e);
            if (kEntropy) u = ptx::add(u, weigh(e, d));
          }
          const float slope = kSoftcap ? slope_of(x, per_softcap) : 1.0f;
          if (kMode == kStore) {
            value[i] = kSoftcap ? ptx::mul(e, slope) : e;
          }
          if (kMode == kGradient) {
            const float tilt = ptx::fma(terms.beta, ptx::add(d, terms.centre), terms.alpha);
            value[i] = weigh(e, kSoftcap ? ptx::mul(slope, tilt) : tilt);
          }
        }
        if (kMode != kSums) {
          word[pair] = ptx::pack_bf16(value[0], value[1]);
          const float low = ptx::sub(value[0], ptx::bits(word[pair] << 16));
          const float high = ptx::sub(value[1], ptx::bits(word[pair] & 0xffff0000u));
          residue = ptx::add(residue, ptx::add(low, high));
        }
      }
      if (kMode != kSums) {
        const int lane = ptx::thread_index() % 4;
        transpose_quad(word, lane);
        const int column = first + 2 * (chunk - 2 * half) + 8 * lane;
        if (row < args.C && column < args.columns)
          *reinterpret_cast<uint4*>(args.out + row * args.columns + column) =
              uint4{word[0], word[1], word[2], word[3]};
      }
    }

    int plane = 0;
    auto put = [&](float sum) {
      sum = sum_quad(sum);
      if (lane == 0 && row < args.C)
        args.partial[partial_index(plane, tile_v, row, args.order.tiles_v, args.C)] = sum;
      ++plane;
    };
    if (kMode != kGradient) put(s);
    if (kMode != kGradient && kEntropy) put(u);
    if (kMode != kSums) put(residue);
  }
}

template <int kMode, bool kSoftcap, bool kEntropy>
R1K_KERNEL(kHeadThreads)
head_kernel(const R1K_GRID_CONSTANT ptx::TensorMap hidden,
            const R1K_GRID_CONSTANT ptx::TensorMap weight, const HeadArgs args) {
  constexpr int kStages = HeadShape::kStages, kBlocksC = HeadShape::kBlocksC,
                kTileV = HeadShape::kTileV;
  const uint32_t shared = (ptx::shared_address(ptx::shared_pointer()) + 1023) & ~1023u;
  const uint32_t barriers = shared + kStages * HeadShape::kStageBytes;
  auto full = [&](int stage) { return barriers + 8 * stage; };
  auto empty = [&](int stage) { return barriers + 8 * (kStages + stage); };
  auto order = [&](int consumer) { return barriers + 8 * (2 * kStages + consumer); };

  const int rank = ptx::cluster_rank(), ranks = ptx::cluster_size();
  const int cluster = static_cast<int>(ptx::block_index()) / ranks;
  const int clusters = static_cast<int>(ptx::grid_size()) / ranks, tiles = args.order.count();
  const int warpgroup = ptx::thread_index() / kWarpgroup;

  if (ptx::thread_index() == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(full(stage), 1);
      ptx::barrier_init(empty(stage), HeadShape::kWarps * ranks);
    }
    for (int consumer = 0; consumer < 2; ++consumer)
      ptx::barrier_init(order(consumer), HeadShape::kWarps);
    ptx::fence_barrier_init();
    ptx::prefetch(hidden);
    ptx::prefetch(weight);
  }
  // Also keeps a block from arriving on the other's barriers before they are there.
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warpgroup == 0) {
    ptx::shrink_registers<kProducerRegisters>();
    if (ptx::thread_index() == 0) {
      Ring<kStages> ring;
      const int share = kTileV / ranks;
      for (int tile = cluster; tile < tiles; tile += clusters) {
        const Place at = args.order.at(tile);
        const int row = (at.row * ranks + rank) * HeadShape::kTileC;
        const int column = at.column * kTileV + rank * share;
#pragma unroll 1
        for (int k = 0; k < args.blocks_d; ++k) {
          const uint32_t a = shared + ring.stage * HeadShape::kStageBytes;
          const uint32_t b = a + HeadShape::kBytesA + rank * (HeadShape::kBytesB / ranks);
          ptx::wait(empty(ring.stage), ring.parity ^ 1);
          ptx::arrive_expect(full(ring.stage), HeadShape::kStageBytes);
          ptx::load_box(a, hidden, k * HeadShape::kTileD, row, full(ring.stage));
          if (ranks == 1)
            ptx::load_box(b, weight, k * HeadShape::kTileD, column, full(ring.stage));
          else
            ptx::load_box_to(b, weight, k * HeadShape::kTileD, column, full(ring.stage),
                             static_cast<uint16_t>((1 << ranks) - 1));
          ring.advance();
        }
      }
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
  } else {
    ptx::grow_registers<kConsumerRegisters>();
    const int consumer = warpgroup - 1;
    const int lane = ptx::thread_index() % 32;
    float acc[kBlocksC][kTileV / 2] = {};
    Ring<kStages> ring;
    // A warp's share of the stage is read: one lane tells each block of the cluster.
    auto release = [&](int stage) {
      if (lane < ranks) ptx::arrive_at(empty(stage), lane);
    };

    ring.skip(consumer * args.blocks_d);
    // Consumer 0 begins: parity 1 of a new barrier counts as complete.
    uint32_t order_parity = consumer ^ 1;
    for (int tile = cluster + consumer * clusters; tile < tiles; tile += 2 * clusters) {
      const Place at = args.order.at(tile);
      const int row = (at.row * ranks + ptx::cluster_rank()) * HeadShape::kTileC;
      ptx::wait(order(consumer), order_parity);
      order_parity ^= 1;
      int held = ring.stage;
      for (int k = 0; k < args.blocks_d; ++k) {
        const uint32_t a = shared + ring.stage * HeadShape::kStageBytes;
        ptx::wait(full(ring.stage), ring.parity);
        ptx::products_begin();
#pragma unroll
        for (int step = 0; step < HeadShape::kTileD / 16; ++step) {
          const uint64_t right = descriptor(a + HeadShape::kBytesA) + 2 * step;
#pragma unroll
          for (int b = 0; b < kBlocksC; ++b)
            ptx::product(acc[b], descriptor(a + b * (64 * 128)) + 2 * step, right,
                         k > 0 || step > 0);
        }
        ptx::products_commit();
        // One group stays in flight; the stage before it is free.
        if (k > 0) {
          ptx::products_wait<1>();
          release(held);
        }
        held = ring.stage;
        ring.advance();
      }
      if (lane == 0) ptx::arrive(order(consumer ^ 1));
      ptx::products_wait<0>();
#pragma unroll
      for (int b = 0; b < kBlocksC; ++b) {
#pragma unroll
        for (int i = 0; i < kTileV / 2; ++i) ptx::pin(acc[b][i]);
      }
      release(held);
      ring.skip(args.blocks_d);
#pragma unroll
      for (int b = 0; b < kBlocksC; ++b)
        epilogue<kMode, kSoftcap, kEntropy>(acc[b], row + 64 * b, at.column, args);
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace r1k
