// Vectors of 32-bit lanes for the instruction set this file is compiled for.
//
// A lane holds a float, or a word of two bfloat16 for the pair product. Everything here sits in an inline namespace
// named after the instruction set, so that the variants of one source can be linked into one library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef MMK_VARIANT
#error "compile with -DMMK_VARIANT=<name of the instruction set>"
#endif

#define MMK_INLINE inline __attribute__((always_inline))
#define MMK_STRING_(x) #x
#define MMK_STRING(x) MMK_STRING_(x)

namespace mmkernels {
inline namespace MMK_VARIANT {

constexpr float kNegativeInfinity = -__builtin_inff();

MMK_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
MMK_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Rounded to nearest, ties to even; a NaN stays one.
MMK_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
MMK_INLINE uint16_t to_f16(float x) {
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (rest >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and more round to infinity
  if (rest < 0x38800000) {
    // Subnormal: adding 0.5 leaves the result, rounded by the adder, in the low bits.
    return static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13);
}
MMK_INLINE float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
  if (rest >= 0x7C00) return from_bits(sign | ((rest << 13) + 0x70000000));  // infinity and NaN
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));        // moves the bias, subnormals included
}

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  static MMK_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static MMK_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  // The first n lanes from p, zero elsewhere.
  static MMK_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
  static MMK_INLINE Vec load_bf16(const uint16_t* p, int n) {
    const __m256i half = _mm256_maskz_loadu_epi16(mask(n), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static MMK_INLINE Vec load_f16(const uint16_t* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p))};
  }
  // Lane i: p[i] in the low half, q[i] in the high half.
  static MMK_INLINE Vec load_pairs(const uint16_t* p, const uint16_t* q, int n) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), q));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  // The high halves of the lanes to p, the low halves to q: the inverse of load_pairs(q, p).
  MMK_INLINE void store_halves(uint16_t* p, uint16_t* q) const {
    const __m512i bits = _mm512_castps_si512(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm512_cvtepi32_epi16(bits));
  }
  MMK_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  // The first n lanes to p, rounded to its type.
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
// A NaN in b wins; one in a is lost. So in min.
MMK_INLINE Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
MMK_INLINE Vec min(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}
// The lane of x where the one of a is greater than the one of b, else of y, as where a or b is NaN.
MMK_INLINE Vec select_above(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
MMK_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
MMK_INLINE Vec minus_abs(Vec a) {
  return {_mm512_or_ps(a.v, _mm512_set1_ps(-0.f))};
}
// a where x has the sign bit, else b.
MMK_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x.v)), b.v, a.v)};
}
MMK_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole n, with underflow to zero.
MMK_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}
// The floats whose sign and exponent are the low nine bits of each lane.
MMK_INLINE Vec exponent_of_low_bits(Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
// Whether a lane of a is greater than its one of b.
MMK_INLINE bool any_above(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0;
}
// A bit for each lane of a that is not at most its one of b: greater, or one of them is NaN.
MMK_INLINE uint32_t lanes_beyond(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ);
}
// Whole numbers in the bits of the lanes, one more where a is not at most b, or equals c.
MMK_INLINE Vec count_beyond(Vec counts, Vec a, Vec b, Vec c) {
  const __mmask16 more = _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ) | _mm512_cmp_ps_mask(a.v, c.v, _CMP_EQ_OQ);
  const __m512i so_far = _mm512_castps_si512(counts.v);
  return {_mm512_castsi512_ps(_mm512_mask_add_epi32(so_far, more, so_far, _mm512_set1_epi32(1)))};
}
// The sum of lanes in doubles.
struct DoubleSum {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  MMK_INLINE void add(Vec a) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
  }
  MMK_INLINE double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

// rows[i] lane j <-> rows[j] lane i.
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

// Lane i: the sum of the lanes of rows[i].
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
// c + the sum of the products of the two bfloat16 in each lane.
MMK_INLINE Vec fma_pairs(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
// The lanes rounded to bfloat16, to p.
MMK_INLINE void store_bf16(Vec a, uint16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
// Lane i: a[i] in the low half, b[i] in the high half, both rounded to bfloat16.
MMK_INLINE Vec round_to_pairs(Vec a, Vec b) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b.v)));
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}
#endif

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kLanes = 8;
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
    store_low_halves(_mm256_srli_epi32(bits, 16), p);
    store_low_halves(_mm256_and_si256(bits, _mm256_set1_epi32(0xFFFF)), q);
  }
  static MMK_INLINE void store_low_halves(__m256i words, uint16_t* p) {
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  MMK_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  MMK_INLINE void store(float* p, int n) const {
    if (n >= kLanes) return store(p);
    float lanes[kLanes];
    store(lanes);
    std::memcpy(p, lanes, n * sizeof(float));
  }
  MMK_INLINE void store_bf16(uint16_t* p, int n) const {
    float lanes[kLanes];
    store(lanes);
    for (int i = 0; i < kLanes && i < n; ++i) p[i] = to_bf16(lanes[i]);
  }
  MMK_INLINE void store_f16(uint16_t* p, int n) const {
    float lanes[kLanes];
    store(lanes);
    for (int i = 0; i < kLanes && i < n; ++i) p[i] = to_f16(lanes[i]);
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
MMK_INLINE Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
MMK_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
  // 2^n by its exponent bits. Below 2^-126 it is zero; above 2^127, infinity. max and min let a NaN in n through.
  const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(128.f), _mm256_max_ps(_mm256_set1_ps(-127.f), n.v));
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(clamped), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bits))};
}
MMK_INLINE Vec exponent_of_low_bits(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
MMK_INLINE bool any_above(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}
MMK_INLINE uint32_t lanes_beyond(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)));
}
MMK_INLINE Vec count_beyond(Vec counts, Vec a, Vec b, Vec c) {
  const __m256 more = _mm256_or_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ), _mm256_cmp_ps(a.v, c.v, _CMP_EQ_OQ));
  // True is -1.
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

#else

// Portable: the compiler's own vectors (NEON on aarch64, SSE2 on plain x86-64).
struct Vec {
  static constexpr int kLanes = 4;
  typedef float Floats __attribute__((vector_size(16)));
  Floats v;

  static MMK_INLINE Vec load(const float* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  static MMK_INLINE Vec set1(float x) { return {Floats{x, x, x, x}}; }
  static MMK_INLINE Vec load(const float* p, int n) {
    Vec r{};
    for (int i = 0; i < kLanes && i < n; ++i) r.v[i] = p[i];
    return r;
  }
  static MMK_INLINE Vec load_bf16(const uint16_t* p, int n) {
    static const uint16_t zeros[kLanes] = {};
    return load_pairs(zeros, p, n);
  }
  static MMK_INLINE Vec load_f16(const uint16_t* p, int n) {
    Vec r{};
    for (int i = 0; i < kLanes && i < n; ++i) r.v[i] = from_f16(p[i]);
    return r;
  }
  static MMK_INLINE Vec load_pairs(const uint16_t* p, const uint16_t* q, int n) {
    uint32_t words[kLanes] = {};
    for (int i = 0; i < kLanes && i < n; ++i) words[i] = p[i] | static_cast<uint32_t>(q[i]) << 16;
    Vec r;
    std::memcpy(&r.v, words, sizeof(r.v));
    return r;
  }
  MMK_INLINE void store_halves(uint16_t* p, uint16_t* q) const {
    uint32_t words[kLanes];
    std::memcpy(words, &v, sizeof(v));
    for (int i = 0; i < kLanes; ++i) {
      p[i] = static_cast<uint16_t>(words[i] >> 16);
      q[i] = static_cast<uint16_t>(words[i]);
    }
  }
  MMK_INLINE void store(float* p) const { std::memcpy(p, &v, sizeof(v)); }
  MMK_INLINE void store(float* p, int n) const {
    if (n >= kLanes) return store(p);
    float lanes[kLanes];
    store(lanes);
    std::memcpy(p, lanes, n * sizeof(float));
  }
  MMK_INLINE void store_bf16(uint16_t* p, int n) const {
    float lanes[kLanes];
    store(lanes);
    for (int i = 0; i < kLanes && i < n; ++i) p[i] = to_bf16(lanes[i]);
  }
  MMK_INLINE void store_f16(uint16_t* p, int n) const {
    float lanes[kLanes];
    store(lanes);
    for (int i = 0; i < kLanes && i < n; ++i) p[i] = to_f16(lanes[i]);
  }
  MMK_INLINE float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  MMK_INLINE float largest() const {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
};
MMK_INLINE Vec operator+(Vec a, Vec b) {
  return {a.v + b.v};
}
MMK_INLINE Vec operator-(Vec a, Vec b) {
  return {a.v - b.v};
}
MMK_INLINE Vec operator*(Vec a, Vec b) {
  return {a.v * b.v};
}
MMK_INLINE Vec operator/(Vec a, Vec b) {
  return {a.v / b.v};
}
MMK_INLINE Vec max(Vec a, Vec b) {
  return {a.v > b.v ? a.v : b.v};
}
MMK_INLINE Vec min(Vec a, Vec b) {
  return {a.v < b.v ? a.v : b.v};
}
MMK_INLINE Vec select_above(Vec a, Vec b, Vec x, Vec y) {
  return {a.v > b.v ? x.v : y.v};
}
MMK_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__ARM_NEON)
  return {vfmaq_f32(c.v, a.v, b.v)};
#else
  return {a.v * b.v + c.v};
#endif
}
MMK_INLINE Vec minus_abs(Vec a) {
  for (int i = 0; i < Vec::kLanes; ++i) a.v[i] = from_bits(to_bits(a.v[i]) | 0x80000000u);
  return a;
}
MMK_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
  for (int i = 0; i < Vec::kLanes; ++i) b.v[i] = to_bits(x.v[i]) >> 31 ? a.v[i] : b.v[i];
  return b;
}
MMK_INLINE Vec round(Vec a) {
  // Adding and taking off 1.5 x 2^23 rounds to a whole number: no fused contraction may join the two.
  Vec shifted = a + Vec::set1(12582912.f);
  __asm__("" : "+m"(shifted));
  return shifted - Vec::set1(12582912.f);
}
MMK_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
  Vec r;
  for (int i = 0; i < Vec::kLanes; ++i) {
    const float clamped = n.v[i] < -127.f ? -127.f : n.v[i] > 128.f ? 128.f : n.v[i];
    const uint32_t bits =
        clamped == clamped ? static_cast<uint32_t>(static_cast<int>(clamped) + 127) << 23 : 0x7FC00000u;
    float power;
    std::memcpy(&power, &bits, 4);
    r.v[i] = a.v[i] * power;
  }
  return r;
}
MMK_INLINE Vec exponent_of_low_bits(Vec a) {
  uint32_t bits[Vec::kLanes];
  std::memcpy(bits, &a.v, sizeof(bits));
  for (uint32_t& lane : bits) lane <<= 23;
  std::memcpy(&a.v, bits, sizeof(bits));
  return a;
}
MMK_INLINE bool any_above(Vec a, Vec b) {
  return a.v[0] > b.v[0] || a.v[1] > b.v[1] || a.v[2] > b.v[2] || a.v[3] > b.v[3];
}
MMK_INLINE uint32_t lanes_beyond(Vec a, Vec b) {
  uint32_t lanes = 0;
  for (int i = 0; i < Vec::kLanes; ++i) lanes |= static_cast<uint32_t>(!(a.v[i] <= b.v[i])) << i;
  return lanes;
}
MMK_INLINE Vec count_beyond(Vec counts, Vec a, Vec b, Vec c) {
  typedef int32_t Words __attribute__((vector_size(16)));
  const Words more = ~(a.v <= b.v) | (a.v == c.v), so_far = reinterpret_cast<Words>(counts.v);
  return {reinterpret_cast<Vec::Floats>(so_far - more)};  // true is -1
}
struct DoubleSum {
  double lanes[Vec::kLanes] = {};
  MMK_INLINE void add(Vec a) {
    for (int i = 0; i < Vec::kLanes; ++i) lanes[i] += a.v[i];
  }
  MMK_INLINE double total() const { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }
};

#endif

#if !defined(__AVX512F__)
MMK_INLINE void transpose(Vec (&rows)[Vec::kLanes]) {
  float lanes[Vec::kLanes][Vec::kLanes], turned[Vec::kLanes][Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) rows[i].store(lanes[i]);
  for (int i = 0; i < Vec::kLanes; ++i)
    for (int j = 0; j < Vec::kLanes; ++j) turned[j][i] = lanes[i][j];
  for (int i = 0; i < Vec::kLanes; ++i) rows[i] = Vec::load(turned[i]);
}
MMK_INLINE Vec sums_of(const Vec (&rows)[Vec::kLanes]) {
  float sums[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) sums[i] = rows[i].sum();
  return Vec::load(sums);
}
#endif

// The natural logarithm of x >= 1, to about one unit in the last place.
MMK_INLINE Vec log(Vec x) {
#if defined(__AVX512F__)
  // x = m 2^n with m in [sqrt(1/2), sqrt(2)).
  __m512 mantissa = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), exponent = _mm512_getexp_ps(x.v);
  const __mmask16 upper = _mm512_cmp_ps_mask(mantissa, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
  mantissa = _mm512_mask_mul_ps(mantissa, upper, mantissa, _mm512_set1_ps(0.5f));
  exponent = _mm512_mask_add_ps(exponent, upper, exponent, _mm512_set1_ps(1.f));
  const Vec f{_mm512_sub_ps(mantissa, _mm512_set1_ps(1.f))}, n{exponent}, z = f * f;
  Vec p = Vec::set1(7.0376836292e-2f);
  p = fma(p, f, Vec::set1(-1.1514610310e-1f));
  p = fma(p, f, Vec::set1(1.1676998740e-1f));
  p = fma(p, f, Vec::set1(-1.2420140846e-1f));
  p = fma(p, f, Vec::set1(1.4249322787e-1f));
  p = fma(p, f, Vec::set1(-1.6668057665e-1f));
  p = fma(p, f, Vec::set1(2.0000714765e-1f));
  p = fma(p, f, Vec::set1(-2.4999993993e-1f));
  p = fma(p, f, Vec::set1(3.3333331174e-1f));
  Vec y = fma(n, Vec::set1(-2.12194440e-4f), p * f * z);
  y = fma(z, Vec::set1(-0.5f), y);
  return fma(n, Vec::set1(0.693359375f), f + y);
#else
  float lanes[Vec::kLanes];
  x.store(lanes);
  for (float& lane : lanes) lane = std::log(lane);
  return Vec::load(lanes);
#endif
}

// e^x to about one unit in the last place: x = n ln 2 + f with |f| <= ln 2 / 2, e^f by a polynomial of degree 7.
MMK_INLINE Vec exp(Vec x) {
  // Past these bounds the result is 0 or infinity anyway; max lets a NaN in its second operand through.
  x = max(Vec::set1(-110.f), x);
  const Vec n = round(x * Vec::set1(1.44269504088896341f));
  Vec f = fma(n, Vec::set1(-0.693359375f), x);
  f = fma(n, Vec::set1(2.12194440e-4f), f);
  Vec p = Vec::set1(1.9875691500e-4f);
  p = fma(p, f, Vec::set1(1.3981999507e-3f));
  p = fma(p, f, Vec::set1(8.3334519073e-3f));
  p = fma(p, f, Vec::set1(4.1665795894e-2f));
  p = fma(p, f, Vec::set1(1.6666665459e-1f));
  p = fma(p, f, Vec::set1(5.0000001201e-1f));
  p = fma(p, f * f, f) + Vec::set1(1.f);
  return scale_by_power_of_2(p, n);
}

// log(1 + x) for 0 <= x <= 1, to about one unit in the last place: x + x^2 R(x), R of degree 8 for the least relative
// error. A sum 1 + x would lose the digits of a small x.
MMK_INLINE Vec log1p(Vec x) {
  Vec p = Vec::set1(-3.3184550703e-3f);
  p = fma(p, x, Vec::set1(2.0204504952e-2f));
  p = fma(p, x, Vec::set1(-5.7664297521e-2f));
  p = fma(p, x, Vec::set1(1.0680540651e-1f));
  p = fma(p, x, Vec::set1(-1.5355387330e-1f));
  p = fma(p, x, Vec::set1(1.9695398211e-1f));
  p = fma(p, x, Vec::set1(-2.4958586693e-1f));
  p = fma(p, x, Vec::set1(3.3330512047e-1f));
  p = fma(p, x, Vec::set1(-4.9999931455e-1f));
  return fma(x * x, p, x);
}

}  // namespace MMK_VARIANT
}  // namespace mmkernels
