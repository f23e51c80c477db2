// Elementary functions on float: a plain loop over them vectorises on every ISA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// In the ISA's namespace: the linker must never merge copies compiled for different ISAs.
namespace r1k {
namespace R1K_ISA {

inline float bits_to_float(int32_t i) {
  float f;
  std::memcpy(&f, &i, sizeof f);
  return f;
}

inline int32_t float_to_bits(float f) {
  int32_t i;
  std::memcpy(&i, &f, sizeof i);
  return i;
}

// Below this exp() is no normal float. Callers clamp their argument here, which absorbs -inf too.
constexpr float kExpMin = -87.0f;
constexpr float kExpMax = 88.0f;

// exp(x) within 1 ulp for x in [kExpMin, kExpMax]. NaN passes through. The polynomial and the split
// of ln 2 are those of Cephes' expf.
inline float fast_exp(float x) {
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, on every ISA.
  constexpr float kRound = 12582912.0f;
  const float n = (x * 1.44269504088896341f + kRound) - kRound;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // A NaN n has no integer value; the product below is NaN whatever the exponent bits become.
  const float safe = n == n ? n : 0.0f;
  return p * bits_to_float((static_cast<int32_t>(safe) + 127) << 23);
}

// tanh(x): a polynomial near zero, where 1 - 2 / (exp(2x) + 1) would cancel; the two agree to 1 ulp
// at the seam. (Cephes' tanhf.)
inline float fast_tanh(float x) {
  const float a = std::fabs(x);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near_zero = p * z * x + x;
  const float capped = a < 20.0f ? a : 20.0f;
  const float t = 1.0f - 2.0f / (fast_exp(2.0f * capped) + 1.0f);
  const float far = x < 0.0f ? -t : t;
  const float y = a < 0.625f ? near_zero : far;
  return x == x ? y : x;
}

// The normal distribution function: erfc(-x / sqrt 2) / 2, whose tail keeps its digits below zero,
// where (1 + erf) / 2 would cancel. (The three polynomials of Cephes' erff and erfcf.)
inline float normal_cdf(float x) {
  const float s = x * 0.70710678118654752f;
  const float a = std::fabs(s);
  const float z = s * s;
  float p = 7.853861353153693e-5f;
  p = p * z - 8.010193625184903e-4f;
  p = p * z + 5.188327685732524e-3f;
  p = p * z - 2.685381193529856e-2f;
  p = p * z + 1.128358514861418e-1f;
  p = p * z - 3.761262582423300e-1f;
  p = p * z + 1.128379165726710f;
  const float near_zero = 0.5f + 0.5f * (s * p);
  const float q = 1.0f / (a > 1.0f ? a : 1.0f);
  const float y = q * q;
  float m = 2.326819970068386e-2f;
  m = m * y - 1.387039388740657e-1f;
  m = m * y + 3.687424674597105e-1f;
  m = m * y - 5.824733027278666e-1f;
  m = m * y + 6.210004621745983e-1f;
  m = m * y - 4.944515323274145e-1f;
  m = m * y + 3.404879937665872e-1f;
  m = m * y - 2.741127028184656e-1f;
  m = m * y + 5.638259427386472e-1f;
  float f = -1.047766399936249e1f;
  f = f * y + 1.297719955372516e1f;
  f = f * y - 7.495518717768503f;
  f = f * y + 2.921019019210786f;
  f = f * y - 1.015265279202700f;
  f = f * y + 4.218463358204948e-1f;
  f = f * y - 2.820767439740514e-1f;
  f = f * y + 5.641895067754075e-1f;
  const float e = z < -kExpMin ? fast_exp(-z) : 0.0f;
  const float tail = 0.5f * e * q * (a < 2.0f ? m : f);
  const float far = s < 0.0f ? tail : 1.0f - tail;
  const float cdf = a < 1.0f ? near_zero : far;
  return x == x ? cdf : x;
}

}  // namespace R1K_ISA
}  // namespace r1k
