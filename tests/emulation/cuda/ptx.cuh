// csrc/cuda/ptx.cuh on a CPU: a thread of the operating system per GPU thread, so that a kernel's
// own source runs and its protocol is put to the test. Copies land late and out of order, products
// read their operands as late as the waits allow, and a barrier's wait sees no more than a parity.
// Formats (descriptor, swizzle, accumulators) are written down a second time here.
#pragma once
#include <barrier>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#define R1K_DEVICE inline
#define R1K_KERNEL(threads) void
#define R1K_KERNEL_SHARED(threads, blocks) void
#define R1K_GRID_CONSTANT

struct uint4 {
  uint32_t x, y, z, w;
};

namespace r1k::ptx {

struct TensorMap {
  const uint16_t* data;
  int64_t rows, columns, stride;
  int box_rows;
};

struct MBarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

struct Cluster;
struct Block {
  Block(Cluster& cluster, int rank, int threads);
  Cluster& cluster;
  int rank;
  int64_t index = 0;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  std::mutex mutex;
  std::condition_variable changed;
  std::map<uint32_t, MBarrier> barriers;
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<double> lanes;

  void settle(MBarrier& b) {
    if (b.pending == 0 && b.bytes == 0) {
      b.pending = b.arrivals;
      ++b.phase;
      changed.notify_all();
    }
  }
  void arrived(uint32_t at, int64_t bytes) {
    std::lock_guard lock(mutex);
    MBarrier& b = barriers.at(at);
    if (--b.pending < 0) std::puts("too many arrivals"), std::exit(3);
    b.bytes += bytes;
    settle(b);
  }
  void landed(uint32_t at, int64_t bytes) {
    std::lock_guard lock(mutex);
    MBarrier& b = barriers.at(at);
    b.bytes -= bytes;
    settle(b);
  }
};

struct Cluster {
  Cluster(int ranks, int threads) : meet(ranks * threads), engine([this] { copy(); }) {
    for (int rank = 0; rank < ranks; ++rank)
      blocks.push_back(std::make_unique<Block>(*this, rank, threads));
  }
  ~Cluster() {
    {
      std::lock_guard lock(mutex);
      over = true;
    }
    changed.notify_all();
    engine.join();
  }
  // The copy engine: takes any pending copy, not the first.
  void copy() {
    std::mt19937 random(1);
    for (;;) {
      std::function<void()> next;
      {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return over || !copies.empty(); });
        if (copies.empty()) return;
        const size_t at = random() % copies.size();
        next = copies[at];
        copies.erase(copies.begin() + at);
      }
      if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
      next();
    }
  }
  void start(std::function<void()> job) {
    std::lock_guard lock(mutex);
    copies.push_back(std::move(job));
    changed.notify_all();
  }
  std::vector<std::unique_ptr<Block>> blocks;
  std::barrier<> meet;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> copies;
  bool over = false;
  std::thread engine;
};

inline Block::Block(Cluster& owner, int rank, int threads)
    : cluster(owner), rank(rank), memory(240 * 1024, 0xff), all(threads), lanes(threads) {
  const auto start = reinterpret_cast<std::uintptr_t>(memory.data());
  shared = memory.data() + (1024 - start % 1024) % 1024;
  for (int warp = 0; warp < threads / 32; ++warp)
    warps.push_back(std::make_unique<std::barrier<>>(32));
}

struct Product {
  float* acc;
  uint64_t a, b;
  bool accumulate;
};
struct Thread {
  Block* block;
  int index;
  int64_t grid;
  std::deque<std::vector<Product>> groups{1};
  std::unique_ptr<std::barrier<>::arrival_token> token;
};
inline thread_local Thread self;

// Runs body() in every thread of every block, one cluster after the other.
template <class Body>
void launch(int64_t blocks, int ranks, int threads, Body body) {
  for (int64_t first = 0; first < blocks; first += ranks) {
    Cluster cluster(ranks, threads);
    std::vector<std::thread> running;
    for (int rank = 0; rank < ranks; ++rank) {
      cluster.blocks[rank]->index = first + rank;
      for (int thread = 0; thread < threads; ++thread)
        running.emplace_back([&, rank, thread] {
          self.block = cluster.blocks[rank].get();
          self.index = thread;
          self.grid = blocks;
          body();
        });
    }
    for (auto& thread : running) thread.join();
  }
}

inline int thread_index() { return self.index; }
inline int64_t block_index() { return self.block->index; }
inline int64_t grid_size() { return self.grid; }
inline unsigned char* shared_pointer() { return self.block->shared; }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - self.block->shared);
}
inline void sync_block() { self.block->all.arrive_and_wait(); }
template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(double));
  auto& warp = *self.block->warps[self.index / 32];
  std::memcpy(&self.block->lanes[self.index], &value, sizeof(T));
  warp.arrive_and_wait();
  std::memcpy(&value, &self.block->lanes[self.index ^ mask], sizeof(T));
  warp.arrive_and_wait();
  return value;
}
inline bool any(bool value) {
  int found = value;
  for (int mask = 16; mask > 0; mask /= 2) found |= shuffle_xor(found, mask);
  return found;
}

inline uint32_t cluster_rank() { return self.block->rank; }
inline uint32_t cluster_size() { return self.block->cluster.blocks.size(); }
inline void cluster_arrive() {
  self.token = std::make_unique<std::barrier<>::arrival_token>(self.block->cluster.meet.arrive());
}
inline void cluster_wait() { self.block->cluster.meet.wait(std::move(*self.token)); }
inline double load_remote(uint32_t address, uint32_t rank) {
  double value;
  std::memcpy(&value, self.block->cluster.blocks[rank]->shared + address, sizeof value);
  return value;
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  std::lock_guard lock(self.block->mutex);
  self.block->barriers[barrier] = {static_cast<int>(arrivals), static_cast<int>(arrivals)};
}
inline void fence_barrier_init() {}
inline void wait(uint32_t barrier, uint32_t parity) {
  std::unique_lock lock(self.block->mutex);
  MBarrier& b = self.block->barriers.at(barrier);
  self.block->changed.wait(lock, [&] { return b.phase % 2 != parity; });
}
inline void arrive(uint32_t barrier) { self.block->arrived(barrier, 0); }
inline void arrive_at(uint32_t barrier, uint32_t rank) {
  self.block->cluster.blocks[rank]->arrived(barrier, 0);
}
inline void arrive_expect(uint32_t barrier, uint32_t bytes) {
  self.block->arrived(barrier, bytes);
}

inline uint32_t swizzle(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void load_box_to(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier,
                        uint16_t ranks) {
  Cluster& cluster = self.block->cluster;
  for (size_t rank = 0; rank < cluster.blocks.size(); ++rank) {
    if (!(ranks >> rank & 1)) continue;
    Block* block = cluster.blocks[rank].get();
    cluster.start([=] {
      for (int r = 0; r < map.box_rows; ++r)
        for (int c = 0; c < 64; ++c) {
          const bool inside = row + r < map.rows && column + c < map.columns;
          const uint16_t x = inside ? map.data[(row + r) * map.stride + column + c] : 0;
          std::memcpy(block->shared + swizzle(to + r * 128 + c * 2), &x, 2);
        }
      block->landed(barrier, map.box_rows * 128);
    });
  }
}
inline void load_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  load_box_to(to, map, column, row, barrier, uint16_t(1 << self.block->rank));
}
inline void prefetch(const TensorMap&) {}
inline void load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  Block* block = self.block;
  block->cluster.start([=] {
    std::memcpy(block->shared + to, from, bytes);
    block->landed(barrier, bytes);
  });
}

template <int kRegisters>
void shrink_registers() {}
template <int kRegisters>
void grow_registers() {}

inline float bits(uint32_t word) { return std::bit_cast<float>(word); }
inline uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }

inline float operand(uint64_t descriptor, int row, int k) {
  if (descriptor >> 62 != 1) std::puts("not the 128-byte swizzle"), std::exit(3);
  const uint32_t start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  uint16_t x;
  const uint32_t at = start + row / 8 * group + row % 8 * 128 + 2 * k;
  std::memcpy(&x, self.block->shared + swizzle(at), 2);
  return bits(uint32_t{x} << 16);
}
// These instructions are executed by whole warps at once.
inline void sync_warp() { self.block->warps[self.index / 32]->arrive_and_wait(); }
inline void products_begin() { sync_warp(); }
inline void products_commit() { self.groups.emplace_back(); }
template <int kPending>
void products_wait() {
  while (self.groups.size() > kPending + 1) {
    for (const Product& p : self.groups.front()) {
      const int thread = self.index % 128;
      for (int i = 0; i < 64; ++i) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + (i & 2 ? 8 : 0);
        const int column = i / 4 * 8 + thread % 4 * 2 + (i & 1);
        float sum = p.accumulate ? p.acc[i] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += operand(p.a, row, k) * operand(p.b, column, k);
        p.acc[i] = sum;
      }
    }
    self.groups.pop_front();
  }
  sync_warp();
}
inline void product(float (&acc)[64], uint64_t a, uint64_t b, bool accumulate) {
  self.groups.back().push_back({acc, a, b, accumulate});
}
inline void pin(float&) {}

inline float add(float a, float b) { return a + b; }
inline float sub(float a, float b) { return a - b; }
inline float mul(float a, float b) { return a * b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float divide(float a, float b) { return a / b; }
inline float exp2(float x) { return std::exp2(x); }
inline uint32_t round_bf16(float x) {
  const uint32_t word = bits(x);
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) {
  return round_bf16(low) | round_bf16(high) << 16;
}
inline float from_half(uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                    : std::ldexp(float(fraction), -24);
  return x >> 15 ? -size : size;
}
inline uint16_t to_half(float x) {
  const float size = std::fabs(x);
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (!(size < 65520.0f)) return sign | (std::isnan(x) ? 0x7e00 : 0x7c00);
  int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  if (steps == 2048) steps = 1024, ++exponent;
  return sign | (steps < 1024 ? steps : (exponent + 15) << 10 | (steps - 1024));
}

}  // namespace r1k::ptx
