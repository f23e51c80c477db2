// Log-probability, entropy and log-sum-exp of rows of stored logits, and their gradient; the
// contract is that of r1kernels/_triton/token_logp.py.
//
// row_forward_kernel: a cluster of blocks holds one row in shared memory, a slice each, read once
// by bulk copies. The gradient, if its upstream factors are given, is written from there: one read
// and one write, in place if wanted.
// row_backward_kernel: the gradient from statistics known before, one read and one write.
#pragma once
#include "cuda/layout.hpp"
#include "cuda/transform.cuh"

namespace r1k {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;
// Parts of a slice, each with a barrier: work begins when the first is there.
constexpr int kRowParts = 4;
constexpr int kBackwardUnits = 4;  // 16-byte units of a thread of row_backward_kernel
constexpr int64_t kIgnore = -100;  // r1kernels.check.IGNORE

// Blocks of row_backward_kernel for a row.
R1K_HD int64_t row_blocks(int64_t vocab, int per_unit) {
  const int64_t span = kRowThreads * kBackwardUnits;
  const int64_t blocks = (vocab / per_unit + span - 1) / span;
  return blocks > 0 ? blocks : 1;
}

struct RowArgs {
  const void* logits;  // [rows, vocab]
  void* out;           // dlogits; may be logits
  int64_t rows, vocab, stride, out_stride;
  // [rows]. kIgnore: the row is not read, its results are 0. Outside [0, vocab): they are NaN, as
  // with a temperature that is not positive and finite.
  const int64_t* targets;
  const float* per_tau;
  float scale, softcap;
  int entropy;
  const float *dlogp, *dentropy, *dlse;  // the last two may be null
  double *logp, *entropy_out, *lse;
  const float *anchor, *alpha, *beta, *at_target;
};

struct Bf16 {
  static constexpr int kPerUnit = 8;
  R1K_DEVICE static void unpack(const uint4& unit, float (&x)[8]) {
    const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = ptx::bits(words[i] << 16);
      x[2 * i + 1] = ptx::bits(words[i] & 0xffff0000u);
    }
  }
  R1K_DEVICE static uint4 pack(const float (&x)[8]) {
    return {ptx::pack_bf16(x[0], x[1]), ptx::pack_bf16(x[2], x[3]), ptx::pack_bf16(x[4], x[5]),
            ptx::pack_bf16(x[6], x[7])};
  }
  R1K_DEVICE static float load(const void* row, int64_t i) {
    return ptx::bits(uint32_t{static_cast<const uint16_t*>(row)[i]} << 16);
  }
  R1K_DEVICE static void store(void* row, int64_t i, float x) {
    static_cast<uint16_t*>(row)[i] = static_cast<uint16_t>(ptx::pack_bf16(x, 0.0f));
  }
};

struct Half {
  static constexpr int kPerUnit = 8;
  R1K_DEVICE static void unpack(const uint4& unit, float (&x)[8]) {
    const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = ptx::from_half(static_cast<uint16_t>(words[i]));
      x[2 * i + 1] = ptx::from_half(static_cast<uint16_t>(words[i] >> 16));
    }
  }
  R1K_DEVICE static uint32_t word(float low, float high) {
    return ptx::to_half(low) | uint32_t{ptx::to_half(high)} << 16;
  }
  R1K_DEVICE static uint4 pack(const float (&x)[8]) {
    return {word(x[0], x[1]), word(x[2], x[3]), word(x[4], x[5]), word(x[6], x[7])};
  }
  R1K_DEVICE static float load(const void* row, int64_t i) {
    return ptx::from_half(static_cast<const uint16_t*>(row)[i]);
  }
  R1K_DEVICE static void store(void* row, int64_t i, float x) {
    static_cast<uint16_t*>(row)[i] = ptx::to_half(x);
  }
};

struct Float {
  static constexpr int kPerUnit = 4;
  R1K_DEVICE static void unpack(const uint4& unit, float (&x)[4]) {
    x[0] = ptx::bits(unit.x), x[1] = ptx::bits(unit.y);
    x[2] = ptx::bits(unit.z), x[3] = ptx::bits(unit.w);
  }
  R1K_DEVICE static uint4 pack(const float (&x)[4]) {
    return {ptx::bits(x[0]), ptx::bits(x[1]), ptx::bits(x[2]), ptx::bits(x[3])};
  }
  R1K_DEVICE static float load(const void* row, int64_t i) {
    return static_cast<const float*>(row)[i];
  }
  R1K_DEVICE static void store(void* row, int64_t i, float x) { static_cast<float*>(row)[i] = x; }
};

// Behind a block's slice in shared memory; `s`, `u` and `top` are read by the whole cluster.
struct RowShared {
  uint64_t barrier[kRowParts];
  double s, u, top;
  double warp_s[kRowWarps], warp_u[kRowWarps];
  float warp_top[kRowWarps];
  float anchor, alpha, beta, at_target;
};

// 1 / temperature; NaN, which reaches every result, where the row has no result.
R1K_DEVICE float per_tau_of(const RowArgs& args, int64_t row) {
  const int64_t target = args.targets[row];
  const float per_tau = args.per_tau[row];
  const bool good = target >= 0 && target < args.vocab && per_tau > 0.0f && per_tau < INFINITY;
  return good ? per_tau : NAN;
}

// dL/dz of one logit: exp(l - anchor) (alpha + beta (l - anchor)), the slope and scale included.
template <bool kSoftcap>
R1K_DEVICE float row_gradient(float z, const RowArgs& args, float per_tau, float per_softcap,
                              float anchor, float alpha, float beta) {
  const float x = capped<kSoftcap>(z, args.scale, args.softcap, per_softcap);
  const float d = ptx::fma(x, per_tau, -anchor);
  const float value = weigh(exponential(d), ptx::fma(beta, d, alpha));
  const float factor = ptx::mul(args.scale, per_tau);
  return ptx::mul(value, kSoftcap ? ptx::mul(factor, slope_of(x, per_softcap)) : factor);
}

template <class T, bool kSoftcap, bool kWrite>
R1K_KERNEL_SHARED(kRowThreads, 1)
row_forward_kernel(const RowArgs args) {
  constexpr int kPer = T::kPerUnit;
  const int rank = ptx::cluster_rank(), ranks = ptx::cluster_size(), thread = ptx::thread_index();
  const int64_t row = ptx::block_index() / ranks;
  const char* source = static_cast<const char*>(args.logits) + row * args.stride * (16 / kPer);
  char* out = static_cast<char*>(args.out) + row * args.out_stride * (16 / kPer);
  const int64_t units = args.vocab / kPer, from = slice_begin(units, rank, ranks);
  const int count = static_cast<int>(slice_begin(units, rank + 1, ranks) - from);
  // The last block also has the logits that fill no unit, one to a thread.
  const int64_t odd = rank == ranks - 1 && thread < args.vocab % kPer ? units * kPer + thread : -1;

  const int64_t given = args.targets[row];
  if (given == kIgnore) {  // the same in the whole cluster
    if (kWrite) {
      for (int i = thread; i < count; i += kRowThreads)
        reinterpret_cast<uint4*>(out)[from + i] = uint4{0, 0, 0, 0};
      if (odd >= 0) T::store(out, odd, 0.0f);
    }
    if (rank == 0 && thread == 0) {
      args.logp[row] = args.lse[row] = 0.0;
      if (args.entropy) args.entropy_out[row] = 0.0;
    }
    return;
  }

  // Slices differ by a unit: all blocks put what follows at the longest one's end, so that its
  // addresses agree.
  uint4* slice = reinterpret_cast<uint4*>(ptx::shared_pointer());
  RowShared& shared = *reinterpret_cast<RowShared*>(slice + (units + ranks - 1) / ranks);
  const uint32_t barriers = ptx::shared_address(shared.barrier);
  if (thread == 0) {
    for (int part = 0; part < kRowParts; ++part) ptx::barrier_init(barriers + 8 * part, 1);
    ptx::fence_barrier_init();
    for (int part = 0; part < kRowParts; ++part) {
      const int begin = static_cast<int>(slice_begin(count, part, kRowParts));
      const int bytes = 16 * (static_cast<int>(slice_begin(count, part + 1, kRowParts)) - begin);
      ptx::arrive_expect(barriers + 8 * part, bytes);
      if (bytes > 0)
        ptx::load_bytes(ptx::shared_address(slice + begin), source + 16 * (from + begin), bytes,
                        barriers + 8 * part);
    }
  }
  // Read by every block before the first cluster barrier, written by its owner only after that.
  const int64_t target = given >= 0 && given < args.vocab ? given : 0;
  const float z_target = T::load(source, target), per_tau = per_tau_of(args, row);
  const float z_odd = odd >= 0 ? T::load(source, odd) : -INFINITY;
  ptx::sync_block();

  const float per_softcap = kSoftcap ? ptx::divide(1.0f, args.softcap) : 0.0f;
  auto logit = [&](float z) {
    return ptx::mul(capped<kSoftcap>(z, args.scale, args.softcap, per_softcap), per_tau);
  };
  float x[kPer], top = z_odd;
  for (int part = 0; part < kRowParts; ++part) {
    // Each barrier has one phase.
    ptx::wait(barriers + 8 * part, 0);
    const int begin = static_cast<int>(slice_begin(count, part, kRowParts));
    const int end = static_cast<int>(slice_begin(count, part + 1, kRowParts));
    for (int i = begin + thread; i < end; i += kRowThreads) {
      T::unpack(slice[i], x);
#pragma unroll
      for (int j = 0; j < kPer; ++j) top = fmaxf(top, x[j]);
    }
  }
  // The transform grows with the logit, so the largest logit has the largest value.
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, ptx::shuffle_xor(top, mask));
  if (thread % 32 == 0) shared.warp_top[thread / 32] = top;
  ptx::sync_block();
  for (int warp = 0; warp < kRowWarps; ++warp) top = fmaxf(top, shared.warp_top[warp]);
  top = fmaxf(logit(top), kLowest);

  float s = 0.0f, u = 0.0f;
  auto weight = [&](float z, int64_t column) {
    if (column == target) return;
    const float d = ptx::sub(logit(z), top), e = exponential(d);
    s += e;
    if (args.entropy) u += weigh(e, d);
  };
  for (int i = thread; i < count; i += kRowThreads) {
    T::unpack(slice[i], x);
#pragma unroll
    for (int j = 0; j < kPer; ++j) weight(x[j], (from + i) * kPer + j);
  }
  if (odd >= 0) weight(z_odd, odd);
  double sum = s, mean = u;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += ptx::shuffle_xor(sum, mask);
    mean += ptx::shuffle_xor(mean, mask);
  }
  if (thread % 32 == 0) {
    shared.warp_s[thread / 32] = sum;
    shared.warp_u[thread / 32] = mean;
  }
  ptx::sync_block();
  if (thread == 0) {
    sum = mean = 0.0;
    for (int warp = 0; warp < kRowWarps; ++warp) {
      sum += shared.warp_s[warp];
      mean += shared.warp_u[warp];
    }
    shared.s = sum;
    shared.u = mean;
    shared.top = top;
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (thread == 0 && (kWrite || rank == 0)) {
    // Every block adds the slices up in the order of their ranks, so all get the same bits.
    const uint32_t s_at = ptx::shared_address(&shared.s), u_at = ptx::shared_address(&shared.u);
    const uint32_t top_at = ptx::shared_address(&shared.top);
    const double l_target = logit(z_target);
    double highest = fmax(l_target, static_cast<double>(kLowest));
    for (int r = 0; r < ranks; ++r) highest = fmax(highest, ptx::load_remote(top_at, r));
    sum = mean = 0.0;
    for (int r = 0; r < ranks; ++r) {
      const double down = ptx::load_remote(top_at, r) - highest, factor = exp(down);
      const double part = ptx::load_remote(s_at, r);
      sum += factor * part;
      // A slice of probability 0 adds nothing; 0 * -inf would be NaN.
      if (part > 0.0) mean += factor * (ptx::load_remote(u_at, r) + down * part);
    }
    const double q = l_target - highest, e = exp(q), total = sum + e, log_total = log(total);
    // log1p keeps the digits of a logp near 0; far from it e may leave the range.
    const double logp = q > -60.0 ? -log1p(sum / e) : q - log_total;
    const double entropy = log_total - (mean + (e > 0.0 ? e * q : 0.0)) / total;
    const double lse = highest + log_total;
    if (rank == 0) {
      args.logp[row] = logp;
      args.lse[row] = lse;
      if (args.entropy) args.entropy_out[row] = entropy;
    }
    if (kWrite) {
      const double g = args.dlogp[row], z = args.dlse == nullptr ? 0.0 : args.dlse[row];
      const double h = args.dentropy == nullptr ? 0.0 : args.dentropy[row];
      // What float32 takes from the log-sum-exp is in every probability, and goes into the factor.
      const float anchor = static_cast<float>(lse);
      const double lost = anchor - lse, factor = exp(lost), p = exp(logp);
      shared.anchor = anchor;
      shared.alpha = static_cast<float>(factor * (z - g - h * (entropy + lost)));
      shared.beta = static_cast<float>(-factor * h);
      double at_target = -g * expm1(logp) + z * p;
      if (h != 0.0) at_target -= h * p * (fmax(logp, -1e4) + entropy);
      const float slope =
          kSoftcap
              ? slope_of(capped<true>(z_target, args.scale, args.softcap, per_softcap), per_softcap)
              : 1.0f;
      shared.at_target = static_cast<float>(at_target * args.scale * per_tau * slope);
    }
  }
  // No block leaves while another may read its sums.
  ptx::cluster_arrive();
  if (kWrite) {
    ptx::sync_block();
    const float anchor = shared.anchor, alpha = shared.alpha, beta = shared.beta;
    auto gradient = [&](float z, int64_t column) {
      return column == target
                 ? shared.at_target
                 : row_gradient<kSoftcap>(z, args, per_tau, per_softcap, anchor, alpha, beta);
    };
    for (int i = thread; i < count; i += kRowThreads) {
      T::unpack(slice[i], x);
#pragma unroll
      for (int j = 0; j < kPer; ++j) x[j] = gradient(x[j], (from + i) * kPer + j);
      reinterpret_cast<uint4*>(out)[from + i] = T::pack(x);
    }
    if (odd >= 0) T::store(out, odd, gradient(z_odd, odd));
  }
  ptx::cluster_wait();
}

template <class T, bool kSoftcap>
R1K_KERNEL_SHARED(kRowThreads, 1)
row_backward_kernel(const RowArgs args) {
  constexpr int kPer = T::kPerUnit, kSpan = kRowThreads * kBackwardUnits;
  const int64_t units = args.vocab / kPer, blocks = row_blocks(args.vocab, kPer);
  const int64_t row = ptx::block_index() / blocks;
  const int64_t first = ptx::block_index() % blocks * kSpan + ptx::thread_index();
  const char* source = static_cast<const char*>(args.logits) + row * args.stride * (16 / kPer);
  char* out = static_cast<char*>(args.out) + row * args.out_stride * (16 / kPer);
  const int64_t target = args.targets[row];
  // The last block also has the logits that fill no unit, one to a thread.
  const bool last = ptx::block_index() % blocks == blocks - 1;
  const int64_t odd =
      last && ptx::thread_index() < args.vocab % kPer ? units * kPer + ptx::thread_index() : -1;
  if (target == kIgnore) {
#pragma unroll
    for (int i = 0; i < kBackwardUnits; ++i) {
      const int64_t unit = first + i * kRowThreads;
      if (unit < units) reinterpret_cast<uint4*>(out)[unit] = uint4{0, 0, 0, 0};
    }
  }
  const float per_tau = per_tau_of(args, row), anchor = args.anchor[row];
  const float alpha = args.alpha[row], beta = args.beta[row], at_target = args.at_target[row];
  const float per_softcap = kSoftcap ? ptx::divide(1.0f, args.softcap) : 0.0f;
  auto gradient = [&](float z, int64_t column) {
    if (column == target) return at_target;
    return row_gradient<kSoftcap>(z, args, per_tau, per_softcap, anchor, alpha, beta);
  };
  if (target != kIgnore) {
    uint4 unit[kBackwardUnits];
#pragma unroll
    for (int i = 0; i < kBackwardUnits; ++i) {
      const int64_t at = first + i * kRowThreads;
      if (at < units) unit[i] = reinterpret_cast<const uint4*>(source)[at];
    }
#pragma unroll
    for (int i = 0; i < kBackwardUnits; ++i) {
      const int64_t at = first + i * kRowThreads;
      if (at >= units) continue;
      float x[kPer];
      T::unpack(unit[i], x);
#pragma unroll
      for (int j = 0; j < kPer; ++j) x[j] = gradient(x[j], at * kPer + j);
      reinterpret_cast<uint4*>(out)[at] = T::pack(x);
    }
  }
  if (odd >= 0) T::store(out, odd, target == kIgnore ? 0.0f : gradient(T::load(source, odd), odd));
}

}  // namespace r1k
