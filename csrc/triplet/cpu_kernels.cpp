// The triplet loss as epilogues of the tile engine. This file is compiled once for each instruction set (MMK_VARIANT).
#include "cpu_kernels.h"

#include <cfloat>
#include <cmath>
#include <vector>

#include "../common/engine.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

// It stands in place of a similarity that is no negative's: below all that count, and finite, so that no NaN comes of
// it. Its opposite stands for the positive of a row or column that has none.
constexpr float kExcluded = -1e38f;

// How many hinges of a row are added in float32, 15 roundings of at most 2^-24 each; the rest is added in double.
constexpr int64_t kShortSum = 16;

// The panel at hand and the positives of its rows.
struct TripletPanel {
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float positive[kMaxRows];

  void begin(const float* positives, int64_t first, int64_t count) {
    row0 = first;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    std::memcpy(positive, positives + row0, rows * sizeof(float));
    std::fill(positive + rows, positive + padded_rows, -kExcluded);
  }

  // Puts `value` where a tile holds no negative: on the diagonal and past the last row.
  void exclude(float* s, int64_t col0, int64_t cols, float value) const {
    for_each_target(nullptr, row0, rows, col0, cols, s, [&](int64_t, float& similarity) { similarity = value; });
    for (int64_t c = 0; c < cols && rows < padded_rows; ++c)
      std::fill(s + c * kTileStride + rows, s + c * kTileStride + padded_rows, value);
  }
};

// Sums the hinges of rows and columns. kGradient: it also turns a tile of similarities into the gradient of the
// weighted sum of its hinges.
template <bool kColumns, bool kGradient>
struct Hinges final : Epilogue {
  explicit Hinges(const TripletHinges& problem) : problem(problem) {}

  const TripletHinges& problem;
  TripletPanel panel;
  float row_weight[kMaxRows], row_count[kMaxRows];
  float short_sum[kMaxRows];  // of kShortSum columns: a long sum in float32 would lose digits
  double row_sum[kMaxRows];
  float col_sum[kMaxCols], col_count[kMaxCols];

  void begin_panel(int64_t first_row, int64_t count) override {
    panel.begin(problem.positives, first_row, count);
    // Without a negative there is no hinge, whatever the positive; at -inf every one would be infinite.
    if (problem.logits.keys.rows == 1) std::fill(panel.positive, panel.positive + panel.padded_rows, -kExcluded);
    std::fill(row_sum, row_sum + panel.padded_rows, 0.);
    std::fill(short_sum, short_sum + panel.padded_rows, 0.f);
    std::fill(row_count, row_count + panel.padded_rows, 0.f);
    std::fill(row_weight, row_weight + panel.padded_rows, 0.f);
    if (kGradient) std::memcpy(row_weight, problem.weights + first_row, count * sizeof(float));
  }

  // Returns 1 for a hinge above 0, NaN for one that is not finite, else 0.
  static MMK_INLINE Vec counted(Vec above) {
    const Vec zero = Vec::set1(0.f);
    return fma(above, zero, select_above(above, zero, Vec::set1(1.f), zero));
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    panel.exclude(s, col0, cols, kExcluded);
    const int64_t padded_rows = panel.padded_rows;
    const Vec zero = Vec::set1(0.f), margin = Vec::set1(problem.margin);
    for (int64_t c = 0; c < cols; ++c) {
      float* row = s + c * kTileStride;
      const bool has_positive = kColumns && col0 + c < problem.logits.queries.rows;
      const Vec positive =
          Vec::set1(has_positive && problem.logits.queries.rows > 1 ? problem.positives[col0 + c] : -kExcluded);
      const Vec weight = Vec::set1(kGradient && has_positive ? problem.weights[col0 + c] : 0.f);
      Vec sum = zero, count = zero;
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        const Vec similarity = Vec::load(row + r);
        const Vec above = (similarity - Vec::load(panel.positive + r)) + margin;
        (Vec::load(short_sum + r) + max(zero, above)).store(short_sum + r);
        Vec grad = zero;
        if constexpr (kGradient) {
          const Vec one = counted(above);
          (Vec::load(row_count + r) + one).store(row_count + r);
          grad = one * Vec::load(row_weight + r);
        }
        if constexpr (kColumns) {
          const Vec above_column = (similarity - positive) + margin;
          sum = sum + max(zero, above_column);
          if constexpr (kGradient) {
            const Vec one = counted(above_column);
            count = count + one;
            grad = fma(one, weight, grad);
          }
        }
        if constexpr (kGradient) grad.store(row + r);
      }
      if constexpr (kColumns) {
        col_sum[c] = sum.sum();
        col_count[c] = count.sum();
      }
      if ((c + 1) % kShortSum == 0 || c + 1 == cols) add_short_sums();
    }
  }

  void add_short_sums() {
    for (int64_t r = 0; r < panel.padded_rows; ++r) row_sum[r] += short_sum[r];
    std::fill(short_sum, short_sum + panel.padded_rows, 0.f);
  }

  bool has_columns() const override { return kColumns; }

  void update_columns(int64_t col0, int64_t cols) override {
    const bool first = panel.row0 == 0;
    for (int64_t c = 0; c < std::min(cols, problem.logits.queries.rows - col0); ++c) {
      problem.col_sum[col0 + c] = col_sum[c] + (first ? 0. : problem.col_sum[col0 + c]);
      if (kGradient) problem.col_count[col0 + c] = col_count[c] + (first ? 0.f : problem.col_count[col0 + c]);
    }
  }

  void end_panel(int64_t) override {
    std::copy(row_sum, row_sum + panel.rows, problem.row_sum + panel.row0);
    if (kGradient) std::copy(row_count, row_count + panel.rows, problem.row_count + panel.row0);
  }
};

// Finds the worst negative of rows and columns, the first of equals. Indices are whole numbers in the bits of the
// lanes.
template <bool kColumns, bool kSemiHard>
struct WorstNegatives final : Epilogue {
  explicit WorstNegatives(const TripletWorst& problem) : problem(problem) {}

  const TripletWorst& problem;
  TripletPanel panel;
  float row_below[kMaxRows], row_best[kMaxRows], row_index[kMaxRows];
  float col_best[kMaxCols];
  int32_t col_index[kMaxCols];

  // Returns the next number below y. x > below(y) is x >= y, and false for a NaN.
  static float below(float x) { return x == 0.f ? -FLT_MIN : std::nextafter(x, kNegativeInfinity); }

  void begin_panel(int64_t first_row, int64_t count) override {
    panel.begin(problem.positives, first_row, count);
    std::fill(row_best, row_best + panel.padded_rows, kNegativeInfinity);
    std::fill(row_index, row_index + panel.padded_rows, 0.f);
    for (int64_t r = 0; r < panel.padded_rows; ++r) row_below[r] = below(panel.positive[r]);
  }

  // Returns `value`, or minus infinity where a similarity does not lie within the margin below the positive. A NaN
  // passes.
  MMK_INLINE Vec candidate(Vec value, Vec similarity, Vec positive, Vec below_positive, Vec margin) const {
    if constexpr (!kSemiHard) return value;
    const Vec none = Vec::set1(kNegativeInfinity), above = (similarity - positive) + margin;
    value = select_above(similarity, below_positive, none, value);
    return select_above(Vec::set1(FLT_MIN), above, none, value);
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    panel.exclude(s, col0, cols, kNegativeInfinity);
    const int64_t padded_rows = panel.padded_rows;
    const Vec none = Vec::set1(kNegativeInfinity), margin = Vec::set1(problem.margin);
    for (int64_t c = 0; c < cols; ++c) {
      const float* row = s + c * kTileStride;
      const bool has_positive = kColumns && col0 + c < problem.logits.queries.rows;
      const float own = has_positive ? problem.positives[col0 + c] : -kExcluded;
      const Vec positive = Vec::set1(own), below_positive = Vec::set1(below(own));
      const Vec index = Vec::set1(from_bits(static_cast<uint32_t>(col0 + c)));
      Vec best = none, best_index = Vec::set1(0.f);
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        const Vec similarity = Vec::load(row + r);
        const Vec value = min(similarity, Vec::set1(-kNegativeInfinity));  // a NaN is the worst of all
        const Vec of_row =
            candidate(value, similarity, Vec::load(panel.positive + r), Vec::load(row_below + r), margin);
        const Vec so_far = Vec::load(row_best + r);
        select_above(of_row, so_far, index, Vec::load(row_index + r)).store(row_index + r);
        max(so_far, of_row).store(row_best + r);
        if constexpr (kColumns) {
          const Vec of_column = candidate(value, similarity, positive, below_positive, margin);
          best_index = select_above(of_column, best, Vec::set1(from_bits(static_cast<uint32_t>(r))), best_index);
          best = max(best, of_column);
        }
      }
      if constexpr (kColumns) find_first(best, best_index, c);
    }
  }

  // Finds the largest of the lanes, and the first of the rows that have it.
  void find_first(Vec best, Vec best_index, int64_t c) {
    float values[Vec::kLanes], indices[Vec::kLanes];
    best.store(values);
    best_index.store(indices);
    col_best[c] = best.largest();
    col_index[c] = INT32_MAX;
    for (int i = 0; i < Vec::kLanes; ++i) {
      const int32_t at = static_cast<int32_t>(panel.row0 + to_bits(indices[i])) + i;
      if (values[i] == col_best[c] && at < col_index[c]) col_index[c] = at;
    }
  }

  bool has_columns() const override { return kColumns; }

  void update_columns(int64_t col0, int64_t cols) override {
    for (int64_t c = 0; c < std::min(cols, problem.logits.queries.rows - col0); ++c) {
      if (panel.row0 > 0 && !(col_best[c] > problem.col_best[col0 + c])) continue;
      problem.col_best[col0 + c] = col_best[c];
      problem.col_index[col0 + c] = col_index[c];
    }
  }

  void end_panel(int64_t) override {
    std::copy(row_best, row_best + panel.rows, problem.row_best + panel.row0);
    std::memcpy(problem.row_index + panel.row0, row_index, panel.rows * sizeof(float));
  }
};

void positives(const Logits& x, const int64_t* own, int64_t row0, int64_t rows, float* out) {
  const ListedFeatures keys{x.keys.data, x.keys.dtype, own + row0, x.keys.row_stride};
  std::vector<float> scratch(2 * x.size * kPanel);
  products_of_pairs(x.queries, row0, keys, rows, x.size, scratch.data(), out + row0);
}

void hinges(const TripletHinges& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flag(p.columns, [&](auto columns) {
    Hinges<columns(), false> epilogue(p);
    forward_panels(p.logits, t, wave, scratch, epilogue);
  });
}

void hinge_gradients(const TripletHinges& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flag(p.columns, [&](auto columns) {
    Hinges<columns(), true> epilogue(p);
    backward_panels(p.logits, p.grads, t, wave, scratch, epilogue);
  });
}

void worst(const TripletWorst& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flags(p.columns, p.semi_hard, [&](auto columns, auto semi_hard) {
    WorstNegatives<columns(), semi_hard()> epilogue(p);
    forward_panels(p.logits, t, wave, scratch, epilogue);
  });
}

void subtract_rows(const Features& x, const float* weights, int64_t begin, int64_t end, int64_t size, float* grads) {
  with_dtype(x.dtype, [&](auto dtype) {
    for (int64_t i = begin; i < end; ++i) {
      const Vec weight = Vec::set1(-weights[i]);
      float* grad = grads + i * size;
      for (int64_t d = 0; d < size; d += Vec::kLanes) {
        const Vec sum = load_floats<Dtype::kFloat32>(grad, d, size);
        store_floats<Dtype::kFloat32>(fma(load_floats<dtype()>(x.row(i), d, size), weight, sum), grad, d, size);
      }
    }
  });
}

void multiply_sparse(const SparseRows& matrix, const Features& x, int64_t begin, int64_t end, int64_t size, void* out) {
  std::vector<float> sums(round_up(size, Vec::kLanes));
  with_dtype(x.dtype, [&](auto dtype) {
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t e = matrix.starts[i]; e < matrix.starts[i + 1]; ++e) {
        const Vec value = Vec::set1(matrix.values[e]);
        const void* row = x.row(matrix.columns[e]);
        for (int64_t d = 0; d < size; d += Vec::kLanes)
          fma(load_floats<dtype()>(row, d, size), value, Vec::load(&sums[d])).store(&sums[d]);
      }
      void* to = static_cast<char*>(out) + i * size * bytes_of(dtype());
      for (int64_t d = 0; d < size; d += Vec::kLanes) store_floats<dtype()>(Vec::load(&sums[d]), to, d, size);
    }
  });
}

}  // namespace

extern const TripletKernels triplet_kernels;
const TripletKernels triplet_kernels{tiling_of, positives,     hinges,         hinge_gradients,
                                     worst,     subtract_rows, multiply_sparse};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
