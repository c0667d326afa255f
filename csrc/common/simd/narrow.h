// What instruction sets of few lanes do through memory, lane by lane.
#pragma once

#include <cmath>
#include <cstring>

#include "scalar.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

template <class Vec>
MMK_INLINE void store_in_memory(const Vec& a, float* p, int n) {
  if (n >= Vec::kLanes) return a.store(p);
  float lanes[Vec::kLanes];
  a.store(lanes);
  std::memcpy(p, lanes, n * sizeof(float));
}

template <uint16_t (*kRound)(float), class Vec>
MMK_INLINE void store_in_memory(const Vec& a, uint16_t* p, int n) {
  float lanes[Vec::kLanes];
  a.store(lanes);
  for (int i = 0; i < Vec::kLanes && i < n; ++i) p[i] = kRound(lanes[i]);
}

template <class Vec>
MMK_INLINE void transpose_in_memory(Vec* rows) {
  float lanes[Vec::kLanes][Vec::kLanes], turned[Vec::kLanes][Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) rows[i].store(lanes[i]);
  for (int i = 0; i < Vec::kLanes; ++i)
    for (int j = 0; j < Vec::kLanes; ++j) turned[j][i] = lanes[i][j];
  for (int i = 0; i < Vec::kLanes; ++i) rows[i] = Vec::load(turned[i]);
}

// The C library takes the logarithms: the kernels need few, one per row.
template <class Vec>
MMK_INLINE Vec log_in_memory(Vec a) {
  float lanes[Vec::kLanes];
  a.store(lanes);
  for (float& lane : lanes) lane = std::log(lane);
  return Vec::load(lanes);
}

template <class Vec>
MMK_INLINE Vec sums_in_memory(const Vec* rows) {
  float sums[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) sums[i] = rows[i].sum();
  return Vec::load(sums);
}

}  // namespace MMK_VARIANT
}  // namespace mmkernels
