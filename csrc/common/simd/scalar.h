// One float at a time: its bits, and the 16-bit formats.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef MMK_VARIANT
#error "compile with -DMMK_VARIANT=<name of the instruction set>"
#endif

#define MMK_INLINE inline __attribute__((always_inline))
#define MMK_STRING_(x) #x
#define MMK_STRING(x) MMK_STRING_(x)

namespace mmkernels {
// Everything that is compiled for one instruction set lies in an inline namespace of its name, so that the variants of
// one source can be linked into one library.
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

// These round to nearest, ties to even, and a NaN stays one.
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
    // The result is subnormal: adding 0.5 leaves it, rounded by the adder, in the low bits.
    return static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13);
}
MMK_INLINE float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
  if (rest >= 0x7C00) return from_bits(sign | ((rest << 13) + 0x70000000));  // infinity and NaN
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));        // moves the bias, subnormals included
}

}  // namespace MMK_VARIANT
}  // namespace mmkernels
