// float32 <-> bfloat16 / float16, whole segments at a time.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.hpp"
#include "vec.hpp"

namespace r1k {
namespace R1K_ISA {

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t body = h & 0x7fffu;
  if (body >= 0x7c00u)
    return bits_to_float(static_cast<int32_t>(sign | 0x7f800000u | ((body & 0x3ffu) << 13)));
  // Multiplying by 2^112 corrects the exponent, and turns subnormal halves into normal floats too.
  const float magnitude = bits_to_float(static_cast<int32_t>(body << 13)) * 5.192296858534828e+33f;
  return bits_to_float(
      static_cast<int32_t>(sign | static_cast<uint32_t>(float_to_bits(magnitude))));
#endif
}

inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(f, 0));
#else
  const uint32_t bits = static_cast<uint32_t>(float_to_bits(f));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t body = bits & 0x7fffffffu;
  if (body > 0x7f800000u) return sign | 0x7e00u;
  if (body >= 0x477ff000u) return sign | 0x7c00u;
  if (body < 0x38800000u) {
    // Adding 0.5 leaves a subnormal half, rounded to nearest even, in the low bits of the mantissa.
    const float shifted = bits_to_float(static_cast<int32_t>(body)) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000);
  }
  const uint32_t odd = (body >> 13) & 1u;
  return sign | static_cast<uint16_t>((body - 0x38000000u + 0xfffu + odd) >> 13);
#endif
}

inline uint16_t float_to_bfloat(float f) {
  const uint32_t bits = static_cast<uint32_t>(float_to_bits(f));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(f == f ? rounded : 0x7fc0u);
}

inline void load(Dtype dtype, const void* base, int64_t at, int64_t n, float* out) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(out, static_cast<const float*>(base) + at, sizeof(float) * n);
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(base) + at;
  if (dtype == Dtype::kBfloat16) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = bits_to_float(static_cast<int32_t>(in[j]) << 16);
    return;
  }
  int64_t j = 0;
#if defined(__F16C__) && defined(__AVX2__)
  for (; j + 8 <= n; j += 8)
    _mm256_storeu_ps(out + j,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + j))));
#endif
  for (; j < n; ++j) out[j] = half_to_float(in[j]);
}

inline void store(Dtype dtype, const float* x, int64_t n, void* base, int64_t at) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(static_cast<float*>(base) + at, x, sizeof(float) * n);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(base) + at;
  if (dtype == Dtype::kBfloat16) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = float_to_bfloat(x[j]);
    return;
  }
  int64_t j = 0;
#if defined(__F16C__) && defined(__AVX2__)
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + j), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; j < n; ++j) out[j] = float_to_half(x[j]);
}

inline void clear(Dtype dtype, void* base, int64_t at, int64_t n) {
  const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  std::memset(static_cast<char*>(base) + at * size, 0, static_cast<size_t>(n * size));
}

}  // namespace R1K_ISA
}  // namespace r1k
