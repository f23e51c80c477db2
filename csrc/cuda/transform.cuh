// The logit's transform and exponential, as in r1kernels/_triton/common.py.
#pragma once
#include "cuda/ptx.cuh"

namespace r1k {

constexpr float kLog2e = 1.44269504088896340736f;
// Stands for "no maximum yet" where -inf would turn a difference of two into NaN.
constexpr float kLowest = -3.0e38f;

// exp(x): one rounded product and MUFU.EX2. Relative error at most 2^-22 (the instruction's 2 ulp)
// + |x| 2^-24 (the product's rounding, half an ulp of x log2e, times ln 2) + |x| 2^-26 (log2e is
// 1.3e-8 from its float32): 1.7e-6 at |x| = 20. Below 2^-126 it is 0. The factor is not folded into
// the logit's scale: there its rounding would act on the logit, not on its distance from the
// anchor.
R1K_DEVICE float exponential(float x) { return ptx::exp2(ptx::mul(x, kLog2e)); }

// To about an ulp: an odd polynomial below 0.6, where the exponential form cancels.
R1K_DEVICE float tanh_of(float x) {
  const float a = fabsf(x), y = ptx::mul(a, a);
  float p = 0.002373515060383995f;
  p = ptx::fma(p, y, -0.008412553700501422f);
  p = ptx::fma(p, y, 0.021789107546519956f);
  p = ptx::fma(p, y, -0.053961653375862256f);
  p = ptx::fma(p, y, 0.13333313327847635f);
  p = ptx::fma(p, y, -0.33333333234569307f);
  const float decay = exponential(-2.0f * a);
  const float far = ptx::fma(-2.0f, ptx::divide(decay, 1.0f + decay), 1.0f);
  return copysignf(a < 0.6f ? ptx::fma(a, ptx::mul(y, p), a) : far, x);
}

// softcap tanh(z scale / softcap), or z scale without one; the temperature comes later.
template <bool kSoftcap>
R1K_DEVICE float capped(float z, float scale, float softcap, float per_softcap) {
  const float x = ptx::mul(z, scale);
  return kSoftcap ? ptx::mul(softcap, tanh_of(ptx::mul(x, per_softcap))) : x;
}

// What the softcap multiplies a derivative by, from the capped logit; 0 for one of -inf.
R1K_DEVICE float slope_of(float x, float per_softcap) {
  const float t = ptx::mul(x, per_softcap);
  return fmaxf(ptx::fma(-t, t, 1.0f), 0.0f);
}

// e * d with 0 * -inf = 0: a logit of -inf has probability 0 and adds nothing.
R1K_DEVICE float weigh(float e, float d) { return e > 0.0f ? ptx::mul(e, d) : 0.0f; }

}  // namespace r1k
