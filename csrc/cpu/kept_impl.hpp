// The head over ragged lists of kept ids: gathered dot products and sums of gathered rows. A 16-bit
// row is widened into a buffer that stays in L1; nothing but one number per id is stored.
#pragma once

#include <vector>

#include "kernels_impl.hpp"

namespace r1k {
namespace R1K_ISA {

// A row in float32: in place, or widened into `buffer`.
inline const float* row_of(Dtype dtype, const void* base, int64_t at, int64_t n, float* buffer) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(base) + at;
  load(dtype, base, at, n, buffer);
  return buffer;
}

inline float dot(const float* a, const float* b, int64_t n) {
  float s[kLanes] = {0.0f};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
    for (int64_t k = 0; k < kLanes; ++k) s[k] += a[j + k] * b[j + k];
  }
  double total = 0.0;
  for (; j < n; ++j) total += a[j] * b[j];
  for (int64_t k = 0; k < kLanes; ++k) total += s[k];
  return static_cast<float>(total);
}

inline void add_scaled(float* out, float factor, const float* x, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] += factor * x[j];
}

void kept_forward(const KeptForward& a, int threads) {
  const KeptHead& h = a.head;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> hidden(h.width), weight(h.width);
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < h.rows; ++i) {
      const int64_t first = h.offsets[i], n = h.offsets[i + 1] - first;
      float* x = a.logits + first;
      float& target = a.logits[h.offsets[h.rows] + i];
      if (h.targets[i] < 0) {
        std::fill(x, x + n, 0.0f);
        target = 0.0f;
        a.logp[i] = a.lse[i] = 0.0;
        if (a.entropy) a.entropy_out[i] = 0.0;
        continue;
      }
      const float* row = row_of(h.dtype, h.hidden, i * h.hidden_ld, h.width, hidden.data());
      const auto logit = [&](int64_t id) {
        const float z =
            dot(row, row_of(h.dtype, h.weight, id * h.weight_ld, h.width, weight.data()), h.width);
        return a.bias ? z + a.bias[id] : z;
      };
      const float inv = inv_temperature(a.transform, i);
      target = logit(h.targets[i]);
      float anchor = transform_row(&target, 1, nullptr, a.transform, inv);
      for (int64_t k = 0; k < n; ++k) x[k] = h.ids[first + k] < 0 ? 0.0f : logit(h.ids[first + k]);
      transform_row(x, n, nullptr, a.transform, inv);
      for (int64_t k = 0; k < n; ++k) {
        if (h.ids[first + k] < 0) x[k] = -std::numeric_limits<float>::infinity();
        anchor = x[k] > anchor ? x[k] : anchor;
      }
      // Finite even where every logit is -inf, or their differences would be NaN.
      anchor = anchor < kLowest ? kLowest : anchor;
      const Sums sums = exp_row<false>(x, n, anchor, a.entropy);
      finish_row(static_cast<double>(target) - anchor, anchor, sums.exp_sum, sums.weighted,
                 a.logp + i, a.lse + i, a.entropy ? a.entropy_out + i : nullptr);
    }
  }
}

void kept_backward(const KeptBackward& a, int threads) {
  const KeptHead& h = a.head;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> sum(h.width), weight(h.width);
#pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < h.rows; ++i) {
      const int64_t first = h.offsets[i], n = h.offsets[i + 1] - first;
      const int64_t last = h.offsets[h.rows] + i;
      float* g = a.dlogits + first;
      if (h.targets[i] < 0) {
        std::fill(g, g + n, 0.0f);
        a.dlogits[last] = 0.0f;
        if (a.dhidden) clear(h.dtype, a.dhidden, i * h.width, h.width);
        continue;
      }
      const RowGrad r =
          row_grad(a.transform, i, a.anchor[i], a.shift, a.logp_grad, a.ent_grad, a.centre);
      std::copy(a.logits + first, a.logits + first + n, g);
      grad_row(g, n, r);
      a.dlogits[last] = slope(r, a.logits[last]) * a.target_grad[i];
      std::fill(sum.begin(), sum.end(), 0.0f);
      const auto add = [&](int64_t id, float factor) {
        if (a.dhidden)
          add_scaled(sum.data(), factor,
                     row_of(h.dtype, h.weight, id * h.weight_ld, h.width, weight.data()), h.width);
      };
      add(h.targets[i], a.dlogits[last]);
      for (int64_t k = 0; k < n; ++k) {
        // Under a softcap the slope at -inf is none, and the product above not a number.
        if (h.ids[first + k] < 0)
          g[k] = 0.0f;
        else
          add(h.ids[first + k], g[k]);
      }
      if (a.dhidden) store(h.dtype, sum.data(), h.width, a.dhidden, i * h.width);
    }
  }
}

void kept_weight(const KeptWeight& a, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> sum(a.width), hidden(a.width);
#pragma omp for schedule(dynamic, 8)
    for (int64_t k = 0; k < a.segments; ++k) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      double bias = 0.0;
      for (int64_t p = a.starts[k]; p < a.starts[k + 1]; ++p) {
        const float factor = a.dlogits[a.order[p]];
        const int64_t row = a.rows[a.order[p]];
        bias += factor;
        if (a.dweight)
          add_scaled(sum.data(), factor,
                     row_of(a.dtype, a.hidden, row * a.hidden_ld, a.width, hidden.data()), a.width);
      }
      if (a.dweight) store(a.weight_dtype, sum.data(), a.width, a.dweight, a.ids[k] * a.width);
      if (a.dbias) a.dbias[a.ids[k]] = static_cast<float>(bias);
    }
  }
}

}  // namespace R1K_ISA
}  // namespace r1k
