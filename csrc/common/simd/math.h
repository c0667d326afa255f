// exp, log and log1p of vectors.
#pragma once

#include <cmath>

#include "scalar.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

// The natural logarithm of a positive finite x, subnormals included, within 0.9 units of the last place. AVX-512 has
// instructions that read exponent and mantissa; the other sets ask the C library lane by lane, as the kernels take few
// logarithms: one a row.
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

// e^x for x <= 88.37, minus infinity and NaN included, within 1.1 units of the last place: x = n ln 2 + f with
// |f| <= ln 2 / 2, e^f by a polynomial of degree 7. Further up to 88.72, where floats end, AVX-512 stays finite and the
// others give infinity; results below 2^-126 are subnormal with AVX-512, and may be 0 with the others. Infinity may
// give NaN. A softmax takes off its largest logit first, so that no x is far above 0.
MMK_INLINE Vec exp(Vec x) {
  // Below -110 the result is 0 anyway, as e^-104 is less than half of the least subnormal. max keeps a NaN in x.
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
