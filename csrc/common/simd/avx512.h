// 16 lanes: AVX-512 F, BW, VL and DQ (x86-64-v4), and AVX512-BF16 where it is compiled for. simd.h says what each does.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  __m512 v;

  static MMK_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static MMK_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static MMK_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static MMK_INLINE Vec load_bf16(const uint16_t* p, int n) {
    const __m256i half = _mm256_maskz_loadu_epi16(mask(n), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static MMK_INLINE Vec load_f16(const uint16_t* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))};
  }
  static MMK_INLINE Vec load_pairs(const uint16_t* p, const uint16_t* q, int n) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), q));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  MMK_INLINE void store_halves(uint16_t* p, uint16_t* q) const {
    const __m512i bits = _mm512_castps_si512(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_cvtepi32_epi16(bits));
  }
  MMK_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  MMK_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  MMK_INLINE void store_bf16(uint16_t* p, int n) const {
#if defined(__AVX512BF16__)
    _mm256_mask_storeu_epi16(p, mask(n), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
    const __m512i bits = _mm512_castps_si512(v),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), odd));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)));
#endif
  }
  MMK_INLINE void store_f16(uint16_t* p, int n) const {
    _mm256_mask_storeu_epi16(p, mask(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  MMK_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  MMK_INLINE float largest() const { return _mm512_reduce_max_ps(v); }
  static MMK_INLINE __mmask16 mask(int n) { return n >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }
};
MMK_INLINE Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
MMK_INLINE Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
MMK_INLINE Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
MMK_INLINE Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
MMK_INLINE Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
MMK_INLINE Vec min(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}
MMK_INLINE Vec select_above(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
MMK_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
MMK_INLINE Vec minus_abs(Vec a) {
  return {_mm512_or_ps(a.v, _mm512_set1_ps(-0.f))};
}
MMK_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.v)), b.v, a.v)};
}
#define MMK_HAS_SCALE 1
MMK_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MMK_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}
MMK_INLINE Vec exponent_of_low_bits(Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
MMK_INLINE Vec log(Vec x) {
  // x = m 2^n with m in [sqrt(1/2), sqrt(2)).
  __m512 m = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), n = _mm512_getexp_ps(x.v);
  const __mmask16 upper = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
  m = _mm512_mask_mul_ps(m, upper, m, _mm512_set1_ps(0.5f));
  n = _mm512_mask_add_ps(n, upper, n, _mm512_set1_ps(1.f));
  const Vec f = Vec{m} - Vec::set1(1.f), z = f * f;
  Vec p = Vec::set1(7.0376836292e-2f);
  p = fma(p, f, Vec::set1(-1.1514610310e-1f));
  p = fma(p, f, Vec::set1(1.1676998740e-1f));
  p = fma(p, f, Vec::set1(-1.2420140846e-1f));
  p = fma(p, f, Vec::set1(1.4249322787e-1f));
  p = fma(p, f, Vec::set1(-1.6668057665e-1f));
  p = fma(p, f, Vec::set1(2.0000714765e-1f));
  p = fma(p, f, Vec::set1(-2.4999993993e-1f));
  p = fma(p, f, Vec::set1(3.3333331174e-1f));
  Vec y = fma(Vec{n}, Vec::set1(-2.12194440e-4f), p * f * z);
  y = fma(z, Vec::set1(-0.5f), y);
  return fma(Vec{n}, Vec::set1(0.693359375f), f + y);
}
MMK_INLINE bool any_above(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0;
}
MMK_INLINE uint32_t lanes_beyond(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ);
}
MMK_INLINE Vec count_beyond(Vec counts, Vec a, Vec b, Vec c) {
  const __mmask16 more = _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ) | _mm512_cmp_ps_mask(a.v, c.v, _CMP_EQ_OQ);
  const __m512i so_far = _mm512_castps_si512(counts.v);
  return {_mm512_castsi512_ps(_mm512_mask_add_epi32(so_far, more, so_far, _mm512_set1_epi32(1)))};
}
struct DoubleSum {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  MMK_INLINE void add(Vec a) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
  }
  MMK_INLINE double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

MMK_INLINE void transpose(Vec (&rows)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    a[4 + j] = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xDD);
    a[8 + j] = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    a[12 + j] = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xDD);
  }
  for (int j = 0; j < 4; ++j) {
    rows[j].v = _mm512_shuffle_f32x4(a[j], a[8 + j], 0x88);
    rows[4 + j].v = _mm512_shuffle_f32x4(a[4 + j], a[12 + j], 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(a[j], a[8 + j], 0xDD);
    rows[12 + j].v = _mm512_shuffle_f32x4(a[4 + j], a[12 + j], 0xDD);
  }
}

MMK_INLINE Vec sums_of(const Vec (&rows)[16]) {
  const auto join = [](Vec x, Vec y, auto low, auto high) { return Vec{_mm512_add_ps(low(x.v, y.v), high(x.v, y.v))}; };
  const auto floats = [&](Vec x, Vec y) {
    return join(
        x, y, [](__m512 a, __m512 b) { return _mm512_unpacklo_ps(a, b); },
        [](__m512 a, __m512 b) { return _mm512_unpackhi_ps(a, b); });
  };
  const auto pairs = [&](Vec x, Vec y) {
    return join(
        x, y,
        [](__m512 a, __m512 b) {
          return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        },
        [](__m512 a, __m512 b) {
          return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
        });
  };
  const auto quarters = [&](Vec x, Vec y) {
    return join(
        x, y, [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x88); },
        [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0xDD); });
  };
  const auto four = [&](int i) { return pairs(floats(rows[i], rows[i + 1]), floats(rows[i + 2], rows[i + 3])); };
  return quarters(quarters(four(0), four(4)), quarters(four(8), four(12)));
}

#if defined(__AVX512BF16__)
#define MMK_HAS_BF16_PRODUCT 1
MMK_INLINE Vec fma_pairs(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
MMK_INLINE void store_bf16(Vec a, uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
MMK_INLINE Vec round_to_pairs(Vec a, Vec b) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b.v)));
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}
#endif

}  // namespace MMK_VARIANT
}  // namespace mmkernels
