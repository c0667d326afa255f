// InfoNCE as an epilogue of the tile engine. This file is compiled once for each instruction set (MMK_VARIANT).
#include "cpu_kernels.h"

#include <algorithm>

#include "../common/engine.h"
#include "../common/softmax.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

// Calls visit(row, column, element of the tile) for every pair of a positive in the tile.
template <class Visit>
void for_each_positive(const Positives& positives, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float* tile,
                       const Visit& visit) {
  for (int64_t c = 0; c < cols; ++c) {
    const int64_t* const after = positives.queries + positives.after[col0 + c];
    const int64_t* at = std::lower_bound(positives.queries + positives.first[col0 + c], after, row0);
    for (; at != after && *at < row0 + rows; ++at) visit(*at - row0, c, tile[c * kTileStride + *at - row0]);
  }
}

// Keeps running statistics of rows and columns: loss = lse - positive, lse = max + log(sum).
template <bool kColumns, bool kTotals>
struct InfoNceStatistics final : Epilogue {
  explicit InfoNceStatistics(const InfoNceForward& problem) : problem(problem) {}

  const InfoNceForward& problem;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float row_max[kMaxRows], row_sum[kMaxRows], row_total[kMaxRows];
  double row_positive[kMaxRows], col_positive[kMaxCols];  // double: exact enough for the sum of thousands
  float tile_row_max[kMaxRows];                           // of the tile at hand
  ColumnStatistics col;

  void begin_panel(int64_t first_row, int64_t count) override {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    for (int64_t r = 0; r < padded_rows; ++r) {
      row_max[r] = kNegativeInfinity;
      row_sum[r] = row_total[r] = 0.f;
      row_positive[r] = problem.positives.queries != nullptr ? 0. : __builtin_nan("");
    }
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    keep_tile(problem.logits, s, row0, rows, col0, cols, problem.products);
    scale_and_find_maxima(s, cols);
    bool has_positive = false;
    if (problem.positives.queries != nullptr) {
      std::fill(col_positive, col_positive + cols, 0.);
      for_each_positive(problem.positives, row0, rows, col0, cols, s, [&](int64_t r, int64_t c, float logit) {
        row_positive[r] += logit;
        col_positive[c] += logit;
        has_positive = true;
      });
    } else {
      for_each_target(problem.targets, row0, rows, col0, cols, s, [&](int64_t r, float& logit) {
        row_positive[r] = logit;
        has_positive = true;
      });
    }
    float center;
    if (lie_near(tile_row_max, rows, col.largest, kColumns ? cols : 0, center) && !has_positive) {
      add_exponentials<true>(s, cols, center);
    } else {
      add_exponentials<false>(s, cols, center);
    }
  }

  void scale_and_find_maxima(float* s, int64_t cols) {
    const Vec scale = Vec::set1(problem.logits.scale), last_edge = edge_of(rows);
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

  // Adds e^(s - reference) to the sums. kOne: all share one reference; else each row and each column has its own.
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

  bool has_columns() const override { return kColumns; }

  void update_columns(int64_t col0, int64_t cols) override {
    if constexpr (kColumns) {
      col.join_to<kTotals>(col0, cols, row0 == 0, problem.col_max, problem.col_sum, problem.col_total);
      for (int64_t c = 0; problem.positives.queries != nullptr && c < cols; ++c)
        problem.col_positive[col0 + c] = (row0 == 0 ? 0. : problem.col_positive[col0 + c]) + col_positive[c];
    }
  }

  void end_panel(int64_t) override {
    const auto write = [&](const auto* from, auto* to) { std::memcpy(to + row0, from, rows * sizeof(*from)); };
    write(row_max, problem.row_max);
    write(row_sum, problem.row_sum);
    write(row_positive, problem.row_positive);
    if constexpr (kTotals) write(row_total, problem.row_total);
  }
};

// Turns a tile of products into d loss / d logits: softmax over rows and columns by one exponential where it can.
template <bool kColumns, bool kShift>
struct InfoNceGradient final : Epilogue {
  explicit InfoNceGradient(const InfoNceBackward& problem)
      : problem(problem), softmaxes(problem.logits, problem.row, problem.col) {}

  const InfoNceBackward& problem;
  TileOfSoftmaxes<kColumns> softmaxes;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float row_shift[kMaxRows];
  double product_of_logits = 0.;  // <d loss / d logits, logits / scale> of the panel

  void begin_panel(int64_t first_row, int64_t count) override {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    product_of_logits = 0.;
    softmaxes.begin_panel(first_row, count);
    if constexpr (kShift) softmaxes.read(problem.row_shift, row_shift);
  }

  bool recall(float* s, int64_t col0, int64_t cols) const override {
    return recall_tile(problem.logits, problem.products, row0, rows, col0, cols, s);
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    // Calls visit(weight in the gradient, element) for each positive in the tile.
    const auto visit_positives = [&](const auto& visit) {
      if (problem.positives.queries == nullptr) {
        for_each_target(problem.targets, row0, rows, col0, cols, s,
                        [&](int64_t r, float& element) { visit(problem.positive_weight[row0 + r], element); });
      } else {
        for_each_positive(problem.positives, row0, rows, col0, cols, s, [&](int64_t r, int64_t c, float& element) {
          const float of_column = kColumns ? problem.col_positive_weight[col0 + c] : 0.f;
          visit(problem.positive_weight[row0 + r] + of_column, element);
        });
      }
    };
    visit_positives([&](float weight, float& product) { product_of_logits -= static_cast<double>(weight) * product; });
    if (softmaxes.begin_tile(col0, cols)) {
      softmaxes.find_factors(col0, cols);
      differentiate_tile<true>(s, col0, cols);
    } else {
      differentiate_tile<false>(s, col0, cols);
    }
    visit_positives([](float weight, float& grad) { grad -= weight; });
  }

  void end_panel(int64_t panel) override {
    if (problem.grad_scale != nullptr) problem.grad_scale[panel] = product_of_logits;
  }

  template <bool kOne>
  void differentiate_tile(float* s, int64_t col0, int64_t cols) {
    using Column = typename TileOfSoftmaxes<kColumns>::template Column<kOne>;
    const Vec last_edge = edge_of(rows);
    const auto prepare = [&](int64_t c) {
      const Vec col_shift = Vec::set1(kColumns && kShift ? problem.col_shift[col0 + c] : 0.f);
      return [&, column = Column(softmaxes, col0, c), col_shift](Vec product, int64_t r) {
        const Vec g = column.of(product, r, last_edge);
        if constexpr (kShift) return g - (Vec::load(row_shift + r) + col_shift);
        return g;
      };
    };
    differentiate(s, cols, padded_rows, prepare, product_of_logits);
  }
};

void info_nce_forward(const InfoNceForward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flags(p.columns, p.totals, [&](auto columns, auto totals) {
    InfoNceStatistics<columns(), totals()> epilogue(p);
    forward_panels(p.logits, t, wave, scratch, epilogue);
  });
}

void info_nce_backward(const InfoNceBackward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flags(p.col.lse != nullptr, p.row_shift != nullptr, [&](auto columns, auto shift) {
    InfoNceGradient<columns(), shift()> epilogue(p);
    backward_panels(p.logits, p.grads, t, wave, scratch, epilogue);
  });
}

}  // namespace

extern const InfoNceKernels info_nce_kernels;
const InfoNceKernels info_nce_kernels{MMK_STRING(MMK_VARIANT), tiling_of, info_nce_forward, info_nce_backward};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
