// Distillation as an epilogue of the tile engine: the engine makes the student's tile, a Companion the teacher's. This
// file is compiled once for each instruction set (MMK_VARIANT).
#include "cpu_kernels.h"

#include <cstring>

#include "../common/engine.h"
#include "../common/softmax.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

// It is below every logit that counts, and finite, so that a sum of nothing is not NaN.
constexpr float kLowest = -3e38f;

// DistillationSums of one vector of rows or columns.
struct Sums {
  Vec largest, sum, teacher_largest, teacher_sum, weighted;

  static MMK_INLINE Sums none() {
    const Vec lowest = Vec::set1(kLowest), zero = Vec::set1(0.f);
    return {lowest, zero, lowest, zero, zero};
  }
  static MMK_INLINE Sums load(const DistillationSums& from, int64_t at, int n) {
    return {Vec::load(from.largest + at, n), Vec::load(from.sum + at, n), Vec::load(from.teacher_largest + at, n),
            Vec::load(from.teacher_sum + at, n), Vec::load(from.weighted + at, n)};
  }
  MMK_INLINE void store(const DistillationSums& to, int64_t at, int n) const {
    largest.store(to.largest + at, n);
    sum.store(to.sum + at, n);
    teacher_largest.store(to.teacher_largest + at, n);
    teacher_sum.store(to.teacher_sum + at, n);
    weighted.store(to.weighted + at, n);
  }
  // Joins those of another part, whose sums of exponentials are relative to the references.
  MMK_INLINE void join(const Sums& part, Vec reference, Vec teacher_reference) {
    const Vec both = max(largest, part.largest), teacher_both = max(teacher_largest, part.teacher_largest);
    const Vec factor = exp(teacher_largest - teacher_both), part_factor = exp(teacher_reference - teacher_both);
    const Vec mass = teacher_sum * factor, part_mass = part.teacher_sum * part_factor;
    sum = sum * exp(largest - both) + part.sum * exp(reference - both);
    weighted =
        fma(mass, largest - both, weighted * factor) + fma(part_mass, part.largest - both, part.weighted * part_factor);
    teacher_sum = mass + part_mass;
    largest = both;
    teacher_largest = teacher_both;
  }
};

// Storage for DistillationSums of the rows or columns of a tile.
template <int64_t kCount>
struct SumsOf {
  float values[5][kCount];
  operator DistillationSums() { return {values[0], values[1], values[2], values[3], values[4]}; }
};

// loss = log(sum) - weighted / teacher_sum: the cross-entropy of the student's softmax under the teacher's.
template <bool kColumns>
struct DistillationStatistics final : Epilogue {
  DistillationStatistics(const DistillationForward& problem, const Tiling& t, float* scratch)
      : problem(problem), teacher(problem.teacher, t, scratch) {}

  const DistillationForward& problem;
  Companion teacher;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float positive[kMaxRows];
  SumsOf<kMaxRows> row_storage, tile_row_storage;
  SumsOf<kMaxCols> col_storage;
  DistillationSums row = row_storage, tile_row = tile_row_storage, col = col_storage;
  float col_reference[kMaxCols], col_teacher_reference[kMaxCols];

  void begin_panel(int64_t first_row, int64_t count) override {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) Sums::none().store(row, r, Vec::kLanes);
    std::fill(positive, positive + rows, __builtin_nanf(""));
    teacher.begin_panel(first_row, count);
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    float* t = teacher.products(col0, cols);
    keep_tile(problem.logits, s, row0, rows, col0, cols, problem.products);
    keep_tile(problem.teacher, t, row0, rows, col0, cols, problem.teacher_products);
    scale_and_find_maxima(s, problem.logits.scale, cols, tile_row.largest, col.largest);
    scale_and_find_maxima(t, problem.teacher.scale, cols, tile_row.teacher_largest, col.teacher_largest);
    bool has_positive = false;
    for_each_target(nullptr, row0, rows, col0, cols, s, [&](int64_t r, float& logit) {
      positive[r] = logit;
      has_positive = true;
    });
    float center, teacher_center;
    const int64_t counted = kColumns ? cols : 0;
    const bool near = lie_near(tile_row.largest, rows, col.largest, counted, center);
    const bool teacher_near = lie_near(tile_row.teacher_largest, rows, col.teacher_largest, counted, teacher_center);
    if (!has_positive && near && teacher_near) {
      add_exponentials<true>(s, t, cols, center, teacher_center);
    } else {
      add_exponentials<false>(s, t, cols, center, teacher_center);
    }
  }

  // Lanes past the last row hold zero, and no maximum counts them.
  void scale_and_find_maxima(float* tile, float by, int64_t cols, float* row_largest, float* col_largest) {
    const Vec scale = Vec::set1(by), last_edge = edge_of(rows);
    for (int64_t r = 0; r < padded_rows; ++r) row_largest[r] = kNegativeInfinity;
    for (int64_t c = 0; c < cols; ++c) {
      float* line = tile + c * kTileStride;
      Vec highest = Vec::set1(kNegativeInfinity);
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        Vec logits = Vec::load(line + r) * scale;
        logits.store(line + r);
        if (r + Vec::kLanes == padded_rows) logits = logits + last_edge;
        max(Vec::load(row_largest + r), logits).store(row_largest + r);
        highest = max(highest, logits);
      }
      col_largest[c] = highest.largest();
    }
  }

  // Adds a tile to the sums. kOne: all exponentials share one reference; else each row and each column has its own.
  template <bool kOne>
  void add_exponentials(const float* s, const float* t, int64_t cols, float center, float teacher_center) {
    const Vec last_edge = edge_of(rows), middle = Vec::set1(center), teacher_middle = Vec::set1(teacher_center);
    for (float* sums : {tile_row.sum, tile_row.teacher_sum, tile_row.weighted})
      std::fill(sums, sums + padded_rows, 0.f);
    for (int64_t c = 0; c < cols; ++c) {
      const float *line = s + c * kTileStride, *teacher_line = t + c * kTileStride;
      const Vec largest = Vec::set1(col.largest[c]), teacher_largest = Vec::set1(col.teacher_largest[c]);
      Vec sum = Vec::set1(0.f), teacher_sum = sum, weighted = sum;
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        const Vec logits = Vec::load(line + r), row_largest = Vec::load(tile_row.largest + r);
        Vec inside = logits, teacher_inside = Vec::load(teacher_line + r);
        if (r + Vec::kLanes == padded_rows) {
          inside = inside + last_edge;
          teacher_inside = teacher_inside + last_edge;
        }
        const Vec e = exp(inside - (kOne ? middle : row_largest));
        const Vec mass = exp(teacher_inside - (kOne ? teacher_middle : Vec::load(tile_row.teacher_largest + r)));
        (Vec::load(tile_row.sum + r) + e).store(tile_row.sum + r);
        (Vec::load(tile_row.teacher_sum + r) + mass).store(tile_row.teacher_sum + r);
        fma(mass, logits - row_largest, Vec::load(tile_row.weighted + r)).store(tile_row.weighted + r);
        if constexpr (kColumns) {
          const Vec col_mass = kOne ? mass : exp(teacher_inside - teacher_largest);
          sum = sum + (kOne ? e : exp(inside - largest));
          teacher_sum = teacher_sum + col_mass;
          weighted = fma(col_mass, logits - largest, weighted);
        }
      }
      if constexpr (kColumns) {
        col.sum[c] = sum.sum();
        col.teacher_sum[c] = teacher_sum.sum();
        col.weighted[c] = weighted.sum();
        col_reference[c] = kOne ? center : col.largest[c];
        col_teacher_reference[c] = kOne ? teacher_center : col.teacher_largest[c];
      }
    }
    for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
      Sums sums = Sums::load(row, r, Vec::kLanes);
      const Sums of_tile = Sums::load(tile_row, r, Vec::kLanes);
      sums.join(of_tile, kOne ? middle : of_tile.largest, kOne ? teacher_middle : of_tile.teacher_largest);
      sums.store(row, r, Vec::kLanes);
    }
  }

  bool has_columns() const override { return kColumns; }

  void update_columns(int64_t col0, int64_t cols) override {
    for (int64_t c = 0; c < cols; c += Vec::kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(Vec::kLanes, cols - c));
      Sums sums = row0 == 0 ? Sums::none() : Sums::load(problem.col, col0 + c, n);
      sums.join(Sums::load(col, c, Vec::kLanes), Vec::load(col_reference + c), Vec::load(col_teacher_reference + c));
      sums.store(problem.col, col0 + c, n);
    }
  }

  void end_panel(int64_t) override {
    for (int64_t r = 0; r < rows; r += Vec::kLanes)
      Sums::load(row, r, Vec::kLanes)
          .store(problem.row, row0 + r, static_cast<int>(std::min<int64_t>(Vec::kLanes, rows - r)));
    std::memcpy(problem.positive + row0, positive, rows * sizeof(float));
  }
};

// Turns a tile of products into d loss / d logits.
template <bool kColumns>
struct DistillationGradient final : Epilogue {
  DistillationGradient(const DistillationBackward& problem, const Tiling& t, float* scratch)
      : problem(problem),
        teacher(problem.teacher, t, scratch),
        of_student(problem.logits, problem.row, problem.col),
        of_teacher(problem.teacher, problem.teacher_row, problem.teacher_col) {}

  const DistillationBackward& problem;
  Companion teacher;
  TileOfSoftmaxes<kColumns> of_student, of_teacher;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  double product_of_logits = 0.;  // <d loss / d logits, logits / scale> of the panel

  void begin_panel(int64_t first_row, int64_t count) override {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    product_of_logits = 0.;
    teacher.begin_panel(first_row, count);
    of_student.begin_panel(first_row, count);
    of_teacher.begin_panel(first_row, count);
  }

  bool recall(float* s, int64_t col0, int64_t cols) const override {
    return recall_tile(problem.logits, problem.products, row0, rows, col0, cols, s);
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    const float* t = teacher.products(col0, cols, problem.teacher_products);
    const bool one = of_student.begin_tile(col0, cols), teacher_one = of_teacher.begin_tile(col0, cols);
    for_each_target(nullptr, row0, rows, col0, cols, s, [&](int64_t r, float& product) {
      product_of_logits -= static_cast<double>(problem.positive_weight[row0 + r]) * product;
    });
    // On the diagonal softmaxes near 1 cancel: there each takes an exponential of its own, which is exact near 1.
    const bool on_diagonal = row0 < col0 + cols && col0 < row0 + rows;
    if (one && teacher_one && !on_diagonal) {
      of_student.find_factors(col0, cols);
      of_teacher.find_factors(col0, cols);
      differentiate_tile<true>(s, t, col0, cols);
    } else {
      differentiate_tile<false>(s, t, col0, cols);
    }
    for_each_target(nullptr, row0, rows, col0, cols, s,
                    [&](int64_t r, float& grad) { grad -= problem.positive_weight[row0 + r]; });
  }

  template <bool kOne>
  void differentiate_tile(float* s, const float* t, int64_t col0, int64_t cols) {
    using Column = typename TileOfSoftmaxes<kColumns>::template Column<kOne>;
    const Vec last_edge = edge_of(rows);
    const auto prepare = [&](int64_t c) {
      const float* teacher_line = t + c * kTileStride;
      return [&, student = Column(of_student, col0, c), target = Column(of_teacher, col0, c), teacher_line](Vec product,
                                                                                                            int64_t r) {
        return student.of(product, r, last_edge) - target.of(Vec::load(teacher_line + r), r, last_edge);
      };
    };
    differentiate(s, cols, padded_rows, prepare, product_of_logits);
  }

  void end_panel(int64_t panel) override {
    if (problem.grad_scale != nullptr) problem.grad_scale[panel] = product_of_logits;
  }
};

Tiling tiling(const Logits& x, const Logits& teacher, bool backward, int64_t threads) {
  return choose_tiling(x, backward, threads, &teacher);
}

void forward(const DistillationForward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flag(p.columns, [&](auto columns) {
    DistillationStatistics<columns()> epilogue(p, t, scratch + engine_floats(p.logits, t, false));
    forward_panels(p.logits, t, wave, scratch, epilogue);
  });
}

void backward(const DistillationBackward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flag(p.col.lse != nullptr, [&](auto columns) {
    DistillationGradient<columns()> epilogue(p, t, scratch + engine_floats(p.logits, t, true));
    backward_panels(p.logits, p.grads, t, wave, scratch, epilogue);
  });
}

}  // namespace

extern const DistillationKernels distillation_kernels;
const DistillationKernels distillation_kernels{tiling, forward, backward};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
