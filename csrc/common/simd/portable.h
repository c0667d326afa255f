// 4 lanes: the compiler's own vectors (NEON on aarch64, SSE2 on plain x86-64). simd.h says what each operation does.
#pragma once

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "narrow.h"
#include "scalar.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

struct Vec {
  static constexpr int kLanes = 4;
#if defined(__aarch64__)
  static constexpr int kRegisters = 32;
#else
  static constexpr int kRegisters = 16;
#endif
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
  MMK_INLINE void store(float* p, int n) const { store_in_memory(*this, p, n); }
  MMK_INLINE void store_bf16(uint16_t* p, int n) const { store_in_memory<to_bf16>(*this, p, n); }
  MMK_INLINE void store_f16(uint16_t* p, int n) const { store_in_memory<to_f16>(*this, p, n); }
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
  typedef uint32_t Words __attribute__((vector_size(16)));
  return {reinterpret_cast<Vec::Floats>(reinterpret_cast<Words>(a.v) | 0x80000000u)};
}
MMK_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
  typedef int32_t Words __attribute__((vector_size(16)));
  return {reinterpret_cast<Words>(x.v) < 0 ? a.v : b.v};
}
MMK_INLINE Vec exponent_of_low_bits(Vec a) {
  typedef uint32_t Words __attribute__((vector_size(16)));
  return {reinterpret_cast<Vec::Floats>(reinterpret_cast<Words>(a.v) << 23)};
}
MMK_INLINE Vec log(Vec a) {
  return log_in_memory(a);
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
  return {reinterpret_cast<Vec::Floats>(so_far - more)};  // a comparison's true is -1
}
struct DoubleSum {
  double lanes[Vec::kLanes] = {};
  MMK_INLINE void add(Vec a) {
    for (int i = 0; i < Vec::kLanes; ++i) lanes[i] += a.v[i];
  }
  MMK_INLINE double total() const { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }
};

MMK_INLINE void transpose(Vec (&rows)[Vec::kLanes]) {
  transpose_in_memory(rows);
}
MMK_INLINE Vec sums_of(const Vec (&rows)[Vec::kLanes]) {
  return sums_in_memory(rows);
}

}  // namespace MMK_VARIANT
}  // namespace mmkernels
