// The gated activation of an MLP, forward and backward, in place: one read and one write of each
// tile. A segment is widened into buffers that stay in L1.
#pragma once

#include "kernels_impl.hpp"

namespace r1k {
namespace R1K_ISA {

// Of three float buffers of a segment, which fit L1 together.
constexpr int64_t kGluSegment = 1024;

struct ActSlope {
  float act, slope;
};

template <Activation kActivation>
inline ActSlope act_and_slope(float x) {
  if (kActivation == Activation::kSilu) {
    // Clamped where the sigmoid is 1, or nothing beside a float that is normal.
    const float t = x < -kExpMax ? -kExpMax : (x > -kExpMin ? -kExpMin : x);
    const float sigmoid = 1.0f / (1.0f + fast_exp(-t));
    return {x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid))};
  }
  if (kActivation == Activation::kGelu) {
    const float below = normal_cdf(x);
    const float z = 0.5f * x * x;
    const float e = z < -kExpMin ? fast_exp(-z) : 0.0f;
    return {x * below, below + x * e * 0.39894228040143268f};
  }
  const float t = fast_tanh(0.79788456080286536f * (x + 0.044715f * x * x * x));
  const float half = 0.5f + 0.5f * t;
  const float inner = 0.79788456080286536f * (1.0f + 0.134145f * x * x);
  return {x * half, half + 0.5f * x * (1.0f - t * t) * inner};
}

template <Activation kActivation>
inline void glu_segment(float* gate, float* up, float* dh, int64_t n) {
  if (!dh) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) gate[j] = act_and_slope<kActivation>(gate[j]).act * up[j];
    return;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const ActSlope a = act_and_slope<kActivation>(gate[j]);
    const float d = dh[j], u = up[j];
    dh[j] = a.act * u;
    gate[j] = d * u * a.slope;
    up[j] = d * a.act;
  }
}

template <Activation kActivation>
inline void glu(const Glu& a, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < a.count; i += kGluSegment) {
    alignas(64) float gate[kGluSegment], up[kGluSegment], dh[kGluSegment];
    const int64_t n = std::min(kGluSegment, a.count - i);
    load(a.dtype, a.gate, i, n, gate);
    load(a.dtype, a.up, i, n, up);
    if (a.dh) load(a.dtype, a.dh, i, n, dh);
    glu_segment<kActivation>(gate, up, a.dh ? dh : nullptr, n);
    store(a.dtype, gate, n, a.gate, i);
    if (!a.dh) continue;
    store(a.dtype, up, n, a.up, i);
    store(a.dtype, dh, n, a.dh, i);
  }
}

inline void glu(const Glu& a, int threads) {
  switch (a.activation) {
    case Activation::kSilu:
      return glu<Activation::kSilu>(a, threads);
    case Activation::kGelu:
      return glu<Activation::kGelu>(a, threads);
    case Activation::kGeluTanh:
      return glu<Activation::kGeluTanh>(a, threads);
  }
}

void glu_forward(const Glu& a, int threads) { glu(a, threads); }

void glu_backward(const Glu& a, int threads) { glu(a, threads); }

}  // namespace R1K_ISA
}  // namespace r1k
