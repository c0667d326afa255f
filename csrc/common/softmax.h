// Softmax statistics of the losses on the tile engine.
#pragma once

#include <cmath>
#include <cstring>

#include "engine.h"
#include "softmax_types.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

// Joins two parts of a row or column: the largest logit, and the sum of e^(logit - largest). The sum of the second part
// is relative to `reference` instead.
MMK_INLINE void join(Vec& max_a, Vec& sum_a, Vec max_b, Vec sum_b, Vec reference) {
  const Vec both = max(max_a, max_b);
  sum_a = sum_a * exp(max_a - both) + sum_b * exp(reference - both);
  max_a = both;
}

// What the columns of a tile have: the largest logit, the sum of e^(logit - reference), the sum of the logits.
struct ColumnStatistics {
  float largest[kMaxCols], sum[kMaxCols], total[kMaxCols], reference[kMaxCols];

  // Joins them into those of the panels before, which start at column col0; the `first` panel has none before it.
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

// Within this spread of its statistics a tile needs one exponential for rows and columns alike, e^(s - c) with one c.
// The largest term of each row and column is then at least e^-60, and floats keep their digits down to e^-87: terms
// lose digits only where they are e^-27 of the largest, and the last place of a sum is e^-16.6 (2^-24) of it. The
// statistics of a tile with a positive never use it: a loss near zero keeps its digits only if the positive's own
// exponential is 1.
constexpr float kOneExponentialSpread = 60.f;

// Finds the largest logit of a tile, `center`, and tells whether the largest logits of its rows and of its columns lie
// near it. With `cols` = 0 no column counts.
inline bool lie_near(const float* row_largest, int64_t rows, float* col_largest, int64_t cols, float& center) {
  Vec highest = Vec::set1(kNegativeInfinity), lowest = highest;
  for (int64_t r = 0; r < rows; ++r) {
    highest = max(highest, Vec::set1(row_largest[r]));
    lowest = max(lowest, Vec::set1(-row_largest[r]));
  }
  // The last column is repeated to fill the last vector.
  const int64_t padded_cols = round_up(cols, Vec::kLanes);
  for (int64_t c = cols; c < padded_cols; ++c) col_largest[c] = col_largest[cols - 1];
  for (int64_t c = 0; c < padded_cols; c += Vec::kLanes)
    lowest = max(lowest, Vec::set1(0.f) - Vec::load(col_largest + c));
  center = highest.largest();
  return center + lowest.largest() < kOneExponentialSpread;
}

// Computes the softmaxes over the rows and the columns of one tile, by one exponential where that is exact enough.
template <bool kColumns>
struct TileOfSoftmaxes {
  const Logits& logits;
  const SoftmaxWeights &row, &col;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float row_lse[kMaxRows], row_rest[kMaxRows], row_weight[kMaxRows], row_factor[kMaxRows];
  float col_lse[kMaxCols], col_factor[kMaxCols];
  float lowest_row = 0.f, highest_row = 0.f, center = 0.f;

  TileOfSoftmaxes(const Logits& logits, const SoftmaxWeights& row, const SoftmaxWeights& col)
      : logits(logits), row(row), col(col) {}

  void begin_panel(int64_t first_row, int64_t count) {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    read(row.lse, row_lse);
    read(row.lse_rest, row_rest);
    read(row.weight, row_weight);
    range(row_lse, padded_rows, lowest_row, highest_row);
  }

  // Reads what belongs to the rows of the panel. The last row is repeated to fill the last vector.
  void read(const float* from, float* to) const {
    std::memcpy(to, from + row0, rows * sizeof(float));
    for (int64_t r = rows; r < padded_rows; ++r) to[r] = to[rows - 1];
  }

  // Finds the range of x: two NaN if x holds one.
  static void range(const float* x, int64_t count, float& lowest, float& highest) {
    Vec low = Vec::set1(kNegativeInfinity), high = low, poison = Vec::set1(0.f);
    for (int64_t i = 0; i < count; i += Vec::kLanes) {
      const Vec v = Vec::load(x + i);
      low = max(low, Vec::set1(0.f) - v);
      high = max(high, v);
      poison = poison + (v - v);
    }
    lowest = -low.largest() + poison.sum();
    highest = high.largest() + poison.sum();
  }

  // Returns whether one exponential serves the tile.
  bool begin_tile(int64_t col0, int64_t cols) {
    float lowest = lowest_row, highest = highest_row;
    if constexpr (kColumns) {
      const int64_t padded_cols = round_up(cols, Vec::kLanes);
      std::memcpy(col_lse, col.lse + col0, cols * sizeof(float));
      for (int64_t c = cols; c < padded_cols; ++c) col_lse[c] = col_lse[cols - 1];
      float low, high;
      range(col_lse, padded_cols, low, high);
      lowest = low < lowest ? low : lowest;
      highest = high > highest ? high : highest;
      if (low != low) highest = low;  // a NaN among the columns: no common reference
    }
    // A whole number takes no digits from the logits near it.
    center = std::nearbyint(0.5f * (lowest + highest));
    return highest - lowest < kOneExponentialSpread;
  }

  // Finds the factors that turn the one exponential into the softmax of each row and column.
  void find_factors(int64_t col0, int64_t cols) {
    const Vec middle = Vec::set1(center);
    for (int64_t r = 0; r < padded_rows; r += Vec::kLanes)
      (Vec::load(row_weight + r) * exp((middle - Vec::load(row_lse + r)) - Vec::load(row_rest + r)))
          .store(row_factor + r);
    for (int64_t c = 0; kColumns && c < cols; c += Vec::kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(Vec::kLanes, cols - c));
      const Vec rest = Vec::load(col.lse_rest + col0 + c, n);
      (Vec::load(col.weight + col0 + c, n) * exp((middle - Vec::load(col_lse + c)) - rest)).store(col_factor + c);
    }
  }

  // Holds what one column of the tile needs; of() makes the weighted softmaxes of a vector of its logits.
  template <bool kOne>
  struct Column {
    const TileOfSoftmaxes& tile;
    Vec scale, middle, lse, rest, weight;

    MMK_INLINE Column(const TileOfSoftmaxes& tile, int64_t col0, int64_t c)
        : tile(tile),
          scale(Vec::set1(tile.logits.scale)),
          middle(Vec::set1(tile.center)),
          lse(Vec::set1(kColumns ? tile.col_lse[c] : 0.f)),
          rest(Vec::set1(kColumns ? tile.col.lse_rest[col0 + c] : 0.f)),
          weight(Vec::set1(!kColumns ? 0.f
                           : kOne    ? tile.col_factor[c]
                                     : tile.col.weight[col0 + c])) {}

    // `last_edge` gives lanes past the last row a logit of minus infinity.
    MMK_INLINE Vec of(Vec product, int64_t r, Vec last_edge) const {
      Vec logits = product * scale;
      if (r + Vec::kLanes == tile.padded_rows) logits = logits + last_edge;
      if constexpr (kOne) {
        const Vec row = Vec::load(tile.row_factor + r);
        return exp(logits - middle) * (kColumns ? row + weight : row);
      } else {
        Vec g =
            exp((logits - Vec::load(tile.row_lse + r)) - Vec::load(tile.row_rest + r)) * Vec::load(tile.row_weight + r);
        if constexpr (kColumns) g = fma(exp((logits - lse) - rest), weight, g);
        return g;
      }
    }
  };
};

// Turns a tile of products into the gradients of its logits, and adds <gradients, products> to `product_of_logits`.
// `prepare(c)` reads what column c needs, and returns what makes gradients of a vector of the column's products, which
// begins at row r.
template <class Prepare>
MMK_INLINE void differentiate(float* s, int64_t cols, int64_t padded_rows, const Prepare& prepare,
                              double& product_of_logits) {
  for (int64_t c = 0; c < cols; ++c) {
    float* line = s + c * kTileStride;
    const auto gradients = prepare(c);
    Vec sum = Vec::set1(0.f);
    for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
      const Vec product = Vec::load(line + r);
      const Vec g = gradients(product, r);
      sum = fma(g, product, sum);
      g.store(line + r);
    }
    product_of_logits += sum.sum();
  }
}

}  // namespace MMK_VARIANT
}  // namespace mmkernels
