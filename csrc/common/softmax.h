// Softmax statistics of the losses on the tile engine.
#pragma once

#include <cstring>

#include "engine.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

// The largest logit of a row or column, and the sums relative to it, joined from two parts. `reference` is what the
// sum of the second part is relative to.
MMK_INLINE void join(Vec& max_a, Vec& sum_a, Vec max_b, Vec sum_b, Vec reference) {
  const Vec both = max(max_a, max_b);
  sum_a = sum_a * exp(max_a - both) + sum_b * exp(reference - both);
  max_a = both;
}

// Of the columns of a tile: the largest logit, the sum of e^(logit - reference), the sum of the logits.
struct ColumnStatistics {
  float largest[kMaxCols], sum[kMaxCols], total[kMaxCols], reference[kMaxCols];

  // Joined into those of the panels before, of the columns col0 and following; `first`: there are none.
  template <bool kTotals>
  void join_to(int64_t col0, int64_t cols, bool first, float* all_max, float* all_sum, float* all_total) const {
    for (int64_t c = 0; c < cols; c += Vec::kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(Vec::kLanes, cols - c));
      Vec highest = Vec::load(largest + c), sums = Vec::load(sum + c);
      Vec totals = kTotals ? Vec::load(total + c) : sums;
      if (first) {
        sums = sums * exp(Vec::load(reference + c) - highest);
      } else {
        Vec so_far = Vec::load(all_max + col0 + c, n), sum_so_far = Vec::load(all_sum + col0 + c, n);
        join(so_far, sum_so_far, highest, sums, Vec::load(reference + c));
        highest = so_far;
        sums = sum_so_far;
        if constexpr (kTotals) totals = totals + Vec::load(all_total + col0 + c, n);
      }
      highest.store(all_max + col0 + c, n);
      sums.store(all_sum + col0 + c, n);
      if constexpr (kTotals) totals.store(all_total + col0 + c, n);
    }
  }
};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
