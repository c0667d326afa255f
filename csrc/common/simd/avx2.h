// 8 lanes: AVX2, FMA and F16C (x86-64-v3). simd.h says what each operation does.
#pragma once

#include <immintrin.h>

#include "narrow.h"
#include "scalar.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  __m256 v;

  static MMK_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static MMK_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static MMK_INLINE Vec load(const float* p, int n) {
    if (n >= 8) return load(p);
    alignas(32) float part[8] = {};
    std::memcpy(part, p, n * sizeof(float));
    return load(part);
  }
  static MMK_INLINE __m128i load_halves(const uint16_t* p, int n) {
    if (n >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    alignas(16) uint16_t part[8] = {};
    std::memcpy(part, p, n * sizeof(uint16_t));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(part));
  }
  static MMK_INLINE Vec load_bf16(const uint16_t* p, int n) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p, n)), 16))};
  }
  static MMK_INLINE Vec load_f16(const uint16_t* p, int n) { return {_mm256_cvtph_ps(load_halves(p, n))}; }
  static MMK_INLINE Vec load_pairs(const uint16_t* p, const uint16_t* q, int n) {
    const __m256i low = _mm256_cvtepu16_epi32(load_halves(p, n));
    const __m256i high = _mm256_cvtepu16_epi32(load_halves(q, n));
    return {_mm256_castsi256_ps(_mm256_or_si256(low, _mm256_slli_epi32(high, 16)))};
  }
  MMK_INLINE void store_halves(uint16_t* p, uint16_t* q) const {
    const __m256i bits = _mm256_castps_si256(v);
    store_halves(packed_halves(_mm256_srli_epi32(bits, 16)), p, 8);
    store_halves(packed_halves(_mm256_and_si256(bits, _mm256_set1_epi32(0xFFFF))), q, 8);
  }
  static MMK_INLINE __m128i packed_halves(__m256i words) {
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  static MMK_INLINE void store_halves(__m128i halves, uint16_t* p, int n) {
    if (n >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
    alignas(16) uint16_t part[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(part), halves);
    std::memcpy(p, part, n * sizeof(uint16_t));
  }
  MMK_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  MMK_INLINE void store(float* p, int n) const { store_in_memory(*this, p, n); }
  MMK_INLINE void store_bf16(uint16_t* p, int n) const {
    const __m256i bits = _mm256_castps_si256(v),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7FFF), odd));
    const __m256 quiet = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
    const __m256 high = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    store_halves(packed_halves(_mm256_srli_epi32(_mm256_castps_si256(high), 16)), p, n);
  }
  MMK_INLINE void store_f16(uint16_t* p, int n) const {
    store_halves(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), p, n);
  }
  MMK_INLINE float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  MMK_INLINE float largest() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
};
MMK_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.v, b.v)};
}
MMK_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
MMK_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
MMK_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.v, b.v)};
}
MMK_INLINE Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}
MMK_INLINE Vec min(Vec a, Vec b) {
  return {_mm256_min_ps(a.v, b.v)};
}
MMK_INLINE Vec select_above(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ))};
}
MMK_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
MMK_INLINE Vec minus_abs(Vec a) {
  return {_mm256_or_ps(a.v, _mm256_set1_ps(-0.f))};
}
MMK_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, x.v)};
}
MMK_INLINE Vec exponent_of_low_bits(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
MMK_INLINE Vec log(Vec a) {
  return log_in_memory(a);
}
MMK_INLINE bool any_above(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}
MMK_INLINE uint32_t lanes_beyond(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)));
}
MMK_INLINE Vec count_beyond(Vec counts, Vec a, Vec b, Vec c) {
  const __m256 more = _mm256_or_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ), _mm256_cmp_ps(a.v, c.v, _CMP_EQ_OQ));
  // A comparison's true is -1.
  return {_mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(counts.v), _mm256_castps_si256(more)))};
}
struct DoubleSum {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  MMK_INLINE void add(Vec a) {
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
  }
  MMK_INLINE double total() const {
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(low, high));
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  }
};

MMK_INLINE void transpose(Vec (&rows)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d x = _mm256_castps_pd(a[i + j]), y = _mm256_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      b[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
  }
  for (int j = 0; j < 4; ++j) {
    rows[j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    rows[4 + j].v = _mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
}

MMK_INLINE Vec sums_of(const Vec (&rows)[8]) {
  const auto four = [&](int i) {
    return _mm256_hadd_ps(_mm256_hadd_ps(rows[i].v, rows[i + 1].v), _mm256_hadd_ps(rows[i + 2].v, rows[i + 3].v));
  };
  const __m256 low = four(0), high = four(4);
  return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
}

}  // namespace MMK_VARIANT
}  // namespace mmkernels
