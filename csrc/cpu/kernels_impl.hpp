// The CPU kernels. Included once per instruction set, whose namespace R1K_ISA names.
//
// One pass over a tile of logits that a GEMM has just written: a row segment of a few thousand
// floats stays in L1 while it is transformed, its maximum is taken, and the exponentials are
// summed. Traffic is one read and at most one write of the tile, from cache.
#pragma once

#include <algorithm>
#include <limits>

#include "dtype.hpp"
#include "kernels.hpp"
#include "vec.hpp"

namespace r1k {
namespace R1K_ISA {

// A row whose tile tops the anchor by more than this many nats gets a new anchor. The bound is
// small so that entropy = log S - u / S never subtracts large numbers, and the same without entropy
// so that logp does not depend on it.
constexpr float kReanchor = 8.0f;

constexpr float kLowest = std::numeric_limits<float>::lowest();

// Independent accumulators: enough to hide the latency of an add, and as many on every ISA, so that
// the order of the sum does not depend on it.
constexpr int64_t kLanes = 64;

struct Sums {
  double exp_sum = 0.0;
  double weighted = 0.0;
};

// z -> l in place; returns the largest l, ignoring NaN.
inline float transform_row(float* x, int64_t n, const float* bias, const Transform& t,
                           float inv_temperature) {
  if (bias) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) x[j] += bias[j];
  }
  if (t.softcap > 0.0f) {
    const float in = t.logit_scale / t.softcap;
    const float out = t.softcap * inv_temperature;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) x[j] = fast_tanh(x[j] * in) * out;
  } else {
    const float k = t.logit_scale * inv_temperature;
    if (k != 1.0f) {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) x[j] *= k;
    }
  }
  float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = x[j] > top ? x[j] : top;
  return top;
}

// Sums of exp(l - anchor) and of exp(l - anchor) (l - anchor); with kKeep the former replace l.
template <bool kEntropy, bool kKeep>
inline Sums exp_row(float* x, int64_t n, float anchor) {
  float s[kLanes] = {0.0f};
  float u[kLanes] = {0.0f};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
    for (int64_t k = 0; k < kLanes; ++k) {
      float d = x[j + k] - anchor;
      // NaN stays NaN; -inf becomes 0.
      d = d < kExpMin ? kExpMin : d;
      const float e = d <= kExpMin ? 0.0f : fast_exp(d);
      s[k] += e;
      if (kEntropy) u[k] += e * d;
      if (kKeep) x[j + k] = e;
    }
  }
  Sums out;
  for (; j < n; ++j) {
    float d = x[j] - anchor;
    d = d < kExpMin ? kExpMin : d;
    const float e = d <= kExpMin ? 0.0f : fast_exp(d);
    out.exp_sum += e;
    if (kEntropy) out.weighted += e * d;
    if (kKeep) x[j] = e;
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    out.exp_sum += s[k];
    if (kEntropy) out.weighted += u[k];
  }
  return out;
}

template <bool kKeep>
inline Sums exp_row(float* x, int64_t n, float anchor, bool entropy) {
  return entropy ? exp_row<true, kKeep>(x, n, anchor) : exp_row<false, kKeep>(x, n, anchor);
}

// Moves (sum, weighted) from one anchor to a higher one.
inline void reanchor(double& sum, double& weighted, double delta) {
  if (sum == 0.0) return;  // nothing to move, and delta may be infinite (a target at -inf)
  const double f = std::exp(-delta);
  weighted = f * (weighted - delta * sum);
  sum *= f;
}

inline float inv_temperature(const Transform& t, int64_t row) {
  return t.temperature ? 1.0f / t.temperature[row] : 1.0f;
}

void exp_tile(const ExpTile& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.rows; ++i) {
    float* x = a.tile + i * a.ld;
    // The sums leave the target out: at -inf its column counts for nothing. Its exact value is in
    // the caller's anchor.
    const int64_t y = a.targets[i] - a.first_column;
    const bool here = y >= 0 && y < a.cols;
    const float inv = inv_temperature(a.transform, i);
    float kept = 0.0f;
    if (here) {
      kept = x[y];
      x[y] = -std::numeric_limits<float>::infinity();
    }
    float top = transform_row(x, a.cols, a.bias, a.transform, inv);
    if (here && a.transform.softcap > 0.0f) {
      // A softcap maps -inf to -softcap: set the column again, take the maximum over the others.
      x[y] = -std::numeric_limits<float>::infinity();
      top = -std::numeric_limits<float>::infinity();
      for (int64_t j = 0; j < a.cols; ++j) top = x[j] > top ? x[j] : top;
    }
    if (top - a.anchor[i] > kReanchor) {
      double weighted = a.entropy ? a.weighted[i] : 0.0;
      reanchor(a.sum[i], weighted, static_cast<double>(top) - a.anchor[i]);
      if (a.entropy) a.weighted[i] = weighted;
      a.anchor[i] = top;
    }
    const Sums sums = a.store == Store::kExp ? exp_row<true>(x, a.cols, a.anchor[i], a.entropy)
                                             : exp_row<false>(x, a.cols, a.anchor[i], a.entropy);
    a.sum[i] += sums.exp_sum;
    if (a.entropy) a.weighted[i] += sums.weighted;
    if (here) {
      x[y] = kept;
      if (a.store == Store::kExp) x[y] = 0.0f;
      if (a.store == Store::kLogit)
        transform_row(x + y, 1, a.bias ? a.bias + y : nullptr, a.transform, inv);
    }
  }
}

struct RowGrad {
  float anchor, shift, k, logp_grad, ent_grad, centre, cap;  // cap: temperature / softcap, or 0
};

template <bool kEntropy, bool kSoftcap>
inline void grad_row(float* x, int64_t n, const RowGrad& r) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float l = x[j];
    // l may be -inf where p is 0; a finite difference keeps the product 0.
    float d = l - r.anchor;
    d = d < -1e30f ? -1e30f : d;
    float logp = d + r.shift;
    logp = logp < kExpMin ? kExpMin : logp;
    const float p = logp <= kExpMin ? 0.0f : fast_exp(logp);
    float c = r.logp_grad;
    if (kEntropy) c += r.ent_grad * (d + r.centre);
    float g = -r.k * p * c;
    if (kSoftcap) {
      const float t = l * r.cap;
      g *= 1.0f - t * t;
    }
    x[j] = g;
  }
}

inline void grad_row(float* x, int64_t n, const RowGrad& r) {
  if (r.cap > 0.0f) {
    r.ent_grad != 0.0f ? grad_row<true, true>(x, n, r) : grad_row<false, true>(x, n, r);
  } else {
    r.ent_grad != 0.0f ? grad_row<true, false>(x, n, r) : grad_row<false, false>(x, n, r);
  }
}

inline RowGrad row_grad(const Transform& t, int64_t i, float anchor, const float* shift,
                        const float* logp_grad, const float* ent_grad, const float* centre) {
  const float temperature = t.temperature ? t.temperature[i] : 1.0f;
  const float cap = t.softcap > 0.0f ? temperature / t.softcap : 0.0f;
  return {anchor,
          shift[i],
          t.logit_scale / temperature,
          logp_grad[i],
          ent_grad ? ent_grad[i] : 0.0f,
          ent_grad ? centre[i] : 0.0f,
          cap};
}

// d l / d z at a transformed logit, which without softcap may be -inf.
inline float slope(const RowGrad& r, float l) {
  return r.cap > 0.0f ? r.k * (1.0f - (l * r.cap) * (l * r.cap)) : r.k;
}

void grad_tile(const GradTile& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.rows; ++i) {
    float* x = a.tile + i * a.ld;
    const RowGrad r =
        row_grad(a.transform, i, a.anchor[i], a.shift, a.logp_grad, a.ent_grad, a.centre);
    if (!a.transformed)
      transform_row(x, a.cols, a.bias, a.transform, inv_temperature(a.transform, i));
    const int64_t y = a.targets[i] - a.first_column;
    const bool here = y >= 0 && y < a.cols;
    const float target_slope = here ? slope(r, x[y]) : 0.0f;
    grad_row(x, a.cols, r);
    if (here) x[y] = target_slope * a.target_grad[i];
  }
}

void rescale_tile(float* tile, int64_t rows, int64_t cols, int64_t ld, const float* factor,
                  int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const float f = factor[i];
    if (f == 1.0f) continue;
    float* x = tile + i * ld;
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) x[j] *= f;
  }
}

// Segment of a row of stored logits that is worked on at a time; as float32 it fits L1.
constexpr int64_t kSegment = 4096;

// Results of a row whose target lies q above the anchor, from the sums over the others.
inline void finish_row(double q, double anchor, double sum, double weighted, double* logp,
                       double* lse, double* entropy) {
  const double e = std::exp(q);
  const double total = sum + e;
  // log1p keeps the digits of a logp near 0; far below, where e may underflow, the plain form is
  // exact.
  *logp = q > -30.0 ? -std::log1p(sum / e) : q - std::log(total);
  *lse = anchor + std::log(total);
  if (!entropy) return;
  // log S - (u + e q) / S cancels where the target holds most of the mass; its rearrangement around
  // log1p does not.
  const double h = sum < e ? std::log1p(sum / e) + (q * sum - weighted) / total
                           : std::log(total) - (weighted + (e > 0.0 ? e * q : 0.0)) / total;
  *entropy = h < 0.0 ? 0.0 : h;  // NaN stays NaN
}

void token_forward(const TokenForward& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t y = a.targets[i];
    if (y < 0) {
      a.logp[i] = a.lse[i] = 0.0;
      if (a.entropy) a.entropy_out[i] = 0.0;
      continue;
    }
    alignas(64) float x[kSegment];
    const float inv = inv_temperature(a.transform, i);
    const int64_t row = i * a.ld;
    load(a.dtype, a.logits, row + y, 1, x);
    transform_row(x, 1, nullptr, a.transform, inv);
    const float target = x[0];
    // No prior here: the anchor starts at the target and moves up when a segment tops it. It stays
    // finite for a target of -inf, or a segment that is all -inf would come to NaN.
    float anchor = target < kLowest ? kLowest : target;
    double sum = 0.0, weighted = 0.0;
    for (int64_t j = 0; j < a.vocab; j += kSegment) {
      const int64_t n = std::min(kSegment, a.vocab - j);
      load(a.dtype, a.logits, row + j, n, x);
      float top = transform_row(x, n, nullptr, a.transform, inv);
      if (y >= j && y < j + n) x[y - j] = -std::numeric_limits<float>::infinity();
      if (top - anchor > kReanchor) {
        reanchor(sum, weighted, static_cast<double>(top) - anchor);
        anchor = top;
      }
      const Sums s = exp_row<false>(x, n, anchor, a.entropy);
      sum += s.exp_sum;
      weighted += s.weighted;
    }
    finish_row(static_cast<double>(target) - anchor, anchor, sum, weighted, a.logp + i, a.lse + i,
               a.entropy ? a.entropy_out + i : nullptr);
  }
}

void token_backward(const TokenBackward& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.rows; ++i) {
    const int64_t y = a.targets[i];
    if (y < 0) {
      clear(a.dtype, a.grad, i * a.grad_ld, a.vocab);
      continue;
    }
    alignas(64) float x[kSegment];
    const float inv = inv_temperature(a.transform, i);
    const RowGrad r =
        row_grad(a.transform, i, a.anchor[i], a.shift, a.logp_grad, a.ent_grad, a.centre);
    for (int64_t j = 0; j < a.vocab; j += kSegment) {
      const int64_t n = std::min(kSegment, a.vocab - j);
      load(a.dtype, a.logits, i * a.ld + j, n, x);
      transform_row(x, n, nullptr, a.transform, inv);
      const bool here = y >= j && y < j + n;
      const float target_slope = here ? slope(r, x[y - j]) : 0.0f;
      grad_row(x, n, r);
      if (here) x[y - j] = target_slope * a.target_grad[i];
      store(a.dtype, x, n, a.grad, i * a.grad_ld + j);
    }
  }
}

}  // namespace R1K_ISA
}  // namespace r1k
