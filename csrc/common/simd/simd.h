// Vectors of 32-bit lanes for the instruction set this file is compiled for: avx512.h, avx2.h or portable.h, each with
// the operations that the concept Simd below lists; math.h makes exp and log1p of them.
//
// A lane holds a float, or a word of two bfloat16 for the pair product. What the kernels assume of every set:
//   - lanes are IEEE floats, rounded to nearest, with subnormals (no flush to zero); memory needs no alignment;
//   - +, -, *, / round once each, and no compiler joins them (-ffp-contract=off). fma rounds once on AVX-512, AVX2 and
//     aarch64, and twice (a product, then a sum) on plain x86-64, which has no such instruction;
//   - max and min return their second operand if either is NaN, as x86's do: a NaN in b stays, one in a is lost;
//   - sums over the lanes are in an order of the set's own: results differ between sets in the last bits, and never
//     from run to run.
#pragma once

#include <concepts>

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#include "portable.h"
#endif

#include "math.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

// The operations that every instruction set must offer.
template <class V>
concept Simd = requires(V a, V b, V c, float x, int n, const float* from, float* to, const uint16_t* halves,
                        uint16_t* to_halves, V (&rows)[V::kLanes]) {
  { V::set1(x) } -> std::same_as<V>;
  // Loads; with n, the first n lanes from memory and zero in the others. bfloat16 and float16 are widened.
  { V::load(from) } -> std::same_as<V>;
  { V::load(from, n) } -> std::same_as<V>;
  { V::load_bf16(halves, n) } -> std::same_as<V>;
  { V::load_f16(halves, n) } -> std::same_as<V>;
  // Lane i of load_pairs(p, q, n): p[i] in the low half, q[i] in the high half. store_halves(p, q) writes the high
  // halves of the lanes to p and the low ones to q: the inverse of load_pairs(q, p, kLanes).
  { V::load_pairs(halves, halves, n) } -> std::same_as<V>;
  a.store_halves(to_halves, to_halves);
  // Stores; with n, the first n lanes. To 16 bits they round to nearest, ties to even, and a NaN stays one.
  a.store(to);
  a.store(to, n);
  a.store_bf16(to_halves, n);
  a.store_f16(to_halves, n);
  // These reduce the lanes to one float.
  { a.sum() } -> std::same_as<float>;
  { a.largest() } -> std::same_as<float>;

  { a + b } -> std::same_as<V>;
  { a - b } -> std::same_as<V>;
  { a * b } -> std::same_as<V>;
  { a / b } -> std::same_as<V>;
  { fma(a, b, c) } -> std::same_as<V>;  // a b + c
  { max(a, b) } -> std::same_as<V>;
  { min(a, b) } -> std::same_as<V>;
  { minus_abs(a) } -> std::same_as<V>;  // -|a|
  // Lanes of the third operand where a > b, else of the fourth, as where a or b is NaN.
  { select_above(a, b, a, b) } -> std::same_as<V>;
  // Lanes of the second operand where the first has its sign bit set, else of the third.
  { where_negative(a, b, c) } -> std::same_as<V>;
  // The natural logarithm of a positive finite a, subnormals included, within 0.9 units of the last place.
  { log(a) } -> std::same_as<V>;
  // The floats whose sign and exponent are the low nine bits of each lane.
  { exponent_of_low_bits(a) } -> std::same_as<V>;
  // Whether any lane of a is greater than its lane of b.
  { any_above(a, b) } -> std::same_as<bool>;
  // A bit for each lane of a that is not at most its lane of b: it is greater, or one of them is NaN.
  { lanes_beyond(a, b) } -> std::same_as<uint32_t>;
  // Lanes of whole numbers in their bits, one more where a is not at most b, or equals c: count_beyond(counts, a, b,
  // c).
  { count_beyond(a, a, b, c) } -> std::same_as<V>;
  // Lane j of rows[i] becomes lane i of rows[j].
  transpose(rows);
  // Lane i: the sum of the lanes of rows[i].
  { sums_of(rows) } -> std::same_as<V>;
};
static_assert(Simd<Vec>);

// Sums of lanes in doubles.
static_assert(requires(DoubleSum sum, Vec a) {
  sum.add(a);
  { sum.total() } -> std::same_as<double>;
});

#ifdef MMK_HAS_SCALE
// These exist where the machine scales floats by powers of 2.
static_assert(requires(Vec a, Vec n) {
  { round(a) } -> std::same_as<Vec>;                   // to a whole number, ties to even
  { scale_by_power_of_2(a, n) } -> std::same_as<Vec>;  // a 2^n for whole n, rounded where it is subnormal
});
#endif

#ifdef MMK_HAS_BF16_PRODUCT
// These exist where the machine multiplies pairs of bfloat16.
static_assert(requires(Vec a, Vec b, Vec c, uint16_t* to) {
  { fma_pairs(a, b, c) } -> std::same_as<Vec>;    // c + the sum of the products of the two bfloat16 of each lane
  { round_to_pairs(a, b) } -> std::same_as<Vec>;  // lane i: a[i] in the low half, b[i] in the high half, rounded
  store_bf16(a, to);                              // all lanes, rounded
});
#endif

}  // namespace MMK_VARIANT
}  // namespace mmkernels
