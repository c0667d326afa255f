// InfoNCE as an epilogue of the tile engine. Compiled once for each instruction set (MMK_VARIANT).
#include "cpu_kernels.h"

#include <cmath>

#include "../common/engine.h"
#include "../common/softmax.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

// Within this spread of its statistics a tile needs one exponential for rows and columns alike: e^(s - c) with one c
// neither overflows nor loses a term that counts.
constexpr float kOneExponentialSpread = 60.f;

// Running statistics of rows and columns: loss = lse - positive, lse = max + log(sum).
template <bool kColumns, bool kTotals>
struct InfoNceStatistics {
  explicit InfoNceStatistics(const InfoNceForward& p) : p(p) {}

  const InfoNceForward& p;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float row_max[kMaxRows], row_sum[kMaxRows], row_total[kMaxRows], row_positive[kMaxRows];
  float tile_row_max[kMaxRows];  // of the tile at hand
  ColumnStatistics col;

  void begin_panel(int64_t first_row, int64_t count) {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    for (int64_t r = 0; r < padded_rows; ++r) {
      row_max[r] = kNegativeInfinity;
      row_sum[r] = row_total[r] = 0.f;
      row_positive[r] = __builtin_nanf("");
    }
  }

  void tile(float* s, int64_t col0, int64_t cols) {
    scale_and_find_maxima(s, cols);
    for_each_target(p.targets, row0, rows, col0, cols, s, [&](int64_t r, float& logit) { row_positive[r] = logit; });
    // Columns past the last are repeats of it, for whole vectors.
    const int64_t padded_cols = round_up(cols, Vec::kLanes);
    Vec highest = Vec::set1(kNegativeInfinity), lowest = highest;
    for (int64_t r = 0; r < rows; ++r) {
      highest = max(highest, Vec::set1(tile_row_max[r]));
      lowest = max(lowest, Vec::set1(-tile_row_max[r]));
    }
    if constexpr (kColumns) {
      for (int64_t c = cols; c < padded_cols; ++c) col.largest[c] = col.largest[cols - 1];
      for (int64_t c = 0; c < padded_cols; c += Vec::kLanes)
        lowest = max(lowest, Vec::set1(0.f) - Vec::load(col.largest + c));
    }
    const float center = highest.largest();
    if (center + lowest.largest() < kOneExponentialSpread) {
      add_exponentials<true>(s, cols, center);
    } else {
      add_exponentials<false>(s, cols, center);
    }
  }

  void scale_and_find_maxima(float* s, int64_t cols) {
    const Vec scale = Vec::set1(p.logits.scale), last_edge = edge_of(rows);
    for (int64_t r = 0; r < padded_rows; ++r) tile_row_max[r] = kNegativeInfinity;
    for (int64_t c = 0; c < cols; ++c) {
      float* row = s + c * kTileStride;
      Vec highest = Vec::set1(kNegativeInfinity), total = Vec::set1(0.f);
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        Vec logits = Vec::load(row + r) * scale;
        if constexpr (kTotals) {
          (Vec::load(row_total + r) + logits).store(row_total + r);
          total = total + logits;  // lanes past the last row hold zero
        }
        if (r + Vec::kLanes == padded_rows) logits = logits + last_edge;
        logits.store(row + r);
        max(Vec::load(tile_row_max + r), logits).store(tile_row_max + r);
        highest = max(highest, logits);
      }
      col.largest[c] = highest.largest();
      if constexpr (kTotals) col.total[c] = total.sum();
    }
  }

  // Adds e^(s - reference) to the sums: one reference for all, or one a row and one a column.
  template <bool kOne>
  void add_exponentials(const float* s, int64_t cols, float center) {
    float sums[kMaxRows];
    for (int64_t r = 0; r < padded_rows; ++r) sums[r] = 0.f;
    for (int64_t c = 0; c < cols; ++c) {
      const float* row = s + c * kTileStride;
      const Vec reference = Vec::set1(kOne ? center : col.largest[c]);
      Vec total = Vec::set1(0.f);
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        const Vec logits = Vec::load(row + r);
        if constexpr (kOne) {
          const Vec e = exp(logits - reference);
          (Vec::load(sums + r) + e).store(sums + r);
          total = total + e;
        } else {
          (Vec::load(sums + r) + exp(logits - Vec::load(tile_row_max + r))).store(sums + r);
          if constexpr (kColumns) total = total + exp(logits - reference);
        }
      }
      if constexpr (kColumns) {
        col.sum[c] = total.sum();
        col.reference[c] = kOne ? center : col.largest[c];
      }
    }
    for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
      Vec largest = Vec::load(row_max + r), sum = Vec::load(row_sum + r);
      const Vec in_tile = Vec::load(tile_row_max + r);
      join(largest, sum, in_tile, Vec::load(sums + r), kOne ? Vec::set1(center) : in_tile);
      largest.store(row_max + r);
      sum.store(row_sum + r);
    }
  }

  void update_columns(int64_t col0, int64_t cols) {
    if constexpr (kColumns) col.join_to<kTotals>(col0, cols, row0 == 0, p.col_max, p.col_sum, p.col_total);
  }

  void end_panel(int64_t) {
    const auto write = [&](const float* from, float* to) { std::memcpy(to + row0, from, rows * sizeof(float)); };
    write(row_max, p.row_max);
    write(row_sum, p.row_sum);
    write(row_positive, p.row_positive);
    if constexpr (kTotals) write(row_total, p.row_total);
  }
};

// Turns a tile of products into d loss / d logits: softmax over rows and columns by one exponential where it can.
template <bool kColumns, bool kShift>
struct InfoNceGradient {
  explicit InfoNceGradient(const InfoNceBackward& p) : p(p) {}

  const InfoNceBackward& p;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float row_lse[kMaxRows], row_lse_rest[kMaxRows], row_weight[kMaxRows], row_shift[kMaxRows];
  float row_factor[kMaxRows], col_lse[kMaxCols], col_factor[kMaxCols];
  float lowest_row = 0.f, highest_row = 0.f;
  double product_of_logits = 0.;  // <d loss / d logits, logits / scale> of the panel

  void begin_panel(int64_t first_row, int64_t count) {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    product_of_logits = 0.;
    const auto read = [&](const float* from, float* to) {
      std::memcpy(to, from + row0, rows * sizeof(float));
      for (int64_t r = rows; r < padded_rows; ++r) to[r] = to[rows - 1];
    };
    read(p.row_lse, row_lse);
    read(p.row_lse_rest, row_lse_rest);
    read(p.row_weight, row_weight);
    if constexpr (kShift) read(p.row_shift, row_shift);
    range(row_lse, padded_rows, lowest_row, highest_row);
  }

  static constexpr bool recall(float*, int64_t, int64_t) { return false; }

  // The range of x; NaN if x holds one.
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

  void tile(float* s, int64_t col0, int64_t cols) {
    float lowest = lowest_row, highest = highest_row;
    if constexpr (kColumns) {
      const int64_t padded_cols = round_up(cols, Vec::kLanes);
      std::memcpy(col_lse, p.col_lse + col0, cols * sizeof(float));
      for (int64_t c = cols; c < padded_cols; ++c) col_lse[c] = col_lse[cols - 1];
      float low, high;
      range(col_lse, padded_cols, low, high);
      lowest = low < lowest ? low : lowest;
      highest = high > highest ? high : highest;
      if (low != low) highest = low;  // a NaN among the columns: no common reference
    }
    // Whole, so that the logits near it lose nothing when it is taken off.
    const float center = std::nearbyint(0.5f * (lowest + highest));
    for_each_target(p.targets, row0, rows, col0, cols, s, [&](int64_t r, float& product) {
      product_of_logits -= static_cast<double>(p.positive_weight[row0 + r]) * product;
    });
    if (highest - lowest < kOneExponentialSpread) {
      differentiate<true>(s, col0, cols, center);
    } else {
      differentiate<false>(s, col0, cols, center);
    }
    for_each_target(p.targets, row0, rows, col0, cols, s,
                    [&](int64_t r, float& grad) { grad -= p.positive_weight[row0 + r]; });
  }

  void end_panel(int64_t panel) {
    if (p.grad_scale != nullptr) p.grad_scale[panel] = product_of_logits;
  }

  template <bool kOne>
  void differentiate(float* s, int64_t col0, int64_t cols, float center) {
    const Vec scale = Vec::set1(p.logits.scale), middle = Vec::set1(center), last_edge = edge_of(rows);
    if constexpr (kOne) {
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes)
        (Vec::load(row_weight + r) * exp((middle - Vec::load(row_lse + r)) - Vec::load(row_lse_rest + r)))
            .store(row_factor + r);
      for (int64_t c = 0; kColumns && c < cols; c += Vec::kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(Vec::kLanes, cols - c));
        const Vec rest = Vec::load(p.col_lse_rest + col0 + c, n);
        (Vec::load(p.col_weight + col0 + c, n) * exp((middle - Vec::load(col_lse + c)) - rest)).store(col_factor + c);
      }
    }
    for (int64_t c = 0; c < cols; ++c) {
      float* row = s + c * kTileStride;
      const Vec lse = Vec::set1(kColumns ? col_lse[c] : 0.f);
      const Vec lse_rest = Vec::set1(kColumns ? p.col_lse_rest[col0 + c] : 0.f);
      const Vec weight = Vec::set1(!kColumns ? 0.f : kOne ? col_factor[c] : p.col_weight[col0 + c]);
      const Vec shift = Vec::set1(kColumns && kShift ? p.col_shift[col0 + c] : 0.f);
      Vec sum = Vec::set1(0.f);
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        const Vec product = Vec::load(row + r);
        Vec logits = product * scale, g;
        if (r + Vec::kLanes == padded_rows) logits = logits + last_edge;
        if constexpr (kOne) {
          const Vec both = kColumns ? Vec::load(row_factor + r) + weight : Vec::load(row_factor + r);
          g = exp(logits - middle) * both;
        } else {
          const Vec row_rest = Vec::load(row_lse_rest + r);
          g = exp((logits - Vec::load(row_lse + r)) - row_rest) * Vec::load(row_weight + r);
          if constexpr (kColumns) g = fma(exp((logits - lse) - lse_rest), weight, g);
        }
        if constexpr (kShift) g = g - (Vec::load(row_shift + r) + shift);
        sum = fma(g, product, sum);
        g.store(row + r);
      }
      product_of_logits += sum.sum();
    }
  }
};

void info_nce_forward(const InfoNceForward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_product(p.logits.queries.dtype, [&](auto product) {
    with_flags(p.columns, p.totals, [&](auto columns, auto totals) {
      InfoNceStatistics<columns(), totals()> epilogue(p);
      forward_panels<decltype(product)>(p.logits, t, wave, scratch, epilogue);
    });
  });
}

void info_nce_backward(const InfoNceBackward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_product(p.logits.queries.dtype, [&](auto product) {
    with_flags(p.col_lse != nullptr, p.row_shift != nullptr, [&](auto columns, auto shift) {
      InfoNceGradient<columns(), shift()> epilogue(p);
      backward_panels<decltype(product)>(p.logits, p.grads, t, wave, scratch, epilogue);
    });
  });
}

}  // namespace

extern const ContrastiveKernels contrastive_kernels;
const ContrastiveKernels contrastive_kernels{MMK_STRING(MMK_VARIANT), tiling_of, info_nce_forward, info_nce_backward};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
