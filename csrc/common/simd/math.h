// exp and log1p of vectors. log is an operation of each instruction set.
#pragma once

#include "scalar.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

// e^x for x <= 88.37, minus infinity and NaN included, within 1.1 units of the last place: x = n ln 2 + f with
// |f| <= ln 2 / 2, e^f by a polynomial of degree 7. Further up to 88.72, where floats end, AVX-512 stays finite and the
// others give infinity; results below 2^-126 are subnormal with AVX-512, and may be 0 with the others. Infinity may
// give NaN. A softmax takes off its largest logit first, so that no x is far above 0.
MMK_INLINE Vec exp(Vec x) {
#ifdef MMK_HAS_SCALE
  // Below -110 the result is 0 anyway, as e^-104 is less than half of the least subnormal. max keeps a NaN in x.
  x = max(Vec::set1(-110.f), x);
  const Vec n = round(x * Vec::set1(1.44269504088896341f));
#else
  // From -88 down n is -127, whose power of 2 shall be 0, and from 88.38 up 128, whose power shall be infinity: just
  // what the exponent bits n + 127 mean. max and min keep a NaN in x.
  x = max(Vec::set1(-88.f), min(Vec::set1(89.f), x));
  // A float of 1.5 x 2^23 and more has no fraction: the sum is rounded to n + 127 in its low bits.
  const Vec shifted = fma(x, Vec::set1(1.44269504088896341f), Vec::set1(12582912.f + 127.f));
  const Vec n = shifted - Vec::set1(12582912.f + 127.f);
#endif
  Vec f = fma(n, Vec::set1(-0.693359375f), x);
  f = fma(n, Vec::set1(2.12194440e-4f), f);
  Vec p = Vec::set1(1.9875691500e-4f);
  p = fma(p, f, Vec::set1(1.3981999507e-3f));
  p = fma(p, f, Vec::set1(8.3334519073e-3f));
  p = fma(p, f, Vec::set1(4.1665795894e-2f));
  p = fma(p, f, Vec::set1(1.6666665459e-1f));
  p = fma(p, f, Vec::set1(5.0000001201e-1f));
  p = fma(p, f * f, f) + Vec::set1(1.f);
#ifdef MMK_HAS_SCALE
  return scale_by_power_of_2(p, n);
#else
  return p * exponent_of_low_bits(shifted);
#endif
}

// log(1 + x) for 0 <= x <= 1, within 2 units of the last place (1.63 with a true fma): x + x^2 R(x), R of degree 8 for
// the least relative error. A sum 1 + x would lose the digits of a small x.
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
