// Linear cross-entropy as an epilogue of the tile engine. This file is compiled once for each instruction set
// (MMK_VARIANT).
#include "cpu_kernels.h"

#include "../common/engine.h"
#include "../common/softmax.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

// It is below every logit that counts, and finite, so that a row of logits of minus infinity has sums of 0, not NaN.
constexpr float kLowest = -3e38f;

// The bias of a panel of classes, minus infinity past the last class.
struct PanelBias {
  float values[kMaxRows];
  int64_t class0 = 0, classes = 0, padded_classes = 0;

  void begin(const float* bias, int64_t first, int64_t count) {
    class0 = first;
    classes = count;
    padded_classes = round_up(count, Vec::kLanes);
    for (int64_t r = 0; r < padded_classes; ++r)
      values[r] = r >= count ? kNegativeInfinity : bias != nullptr ? bias[first + r] : 0.f;
  }

  // Returns the place of a target in the panel, or -1.
  int64_t class_of(int64_t target) const {
    return class0 <= target && target < class0 + classes ? target - class0 : -1;
  }
};

// loss = lse - positive, lse = largest + log(sum): statistics of the columns of the tiles, which are the hidden rows.
template <bool kTotals>
struct ClassStatistics final : Epilogue {
  explicit ClassStatistics(const LinearCrossEntropyForward& problem) : problem(problem) {}

  const LinearCrossEntropyForward& problem;
  PanelBias bias;
  ColumnStatistics col;

  void begin_panel(int64_t first, int64_t count) override { bias.begin(problem.bias, first, count); }

  void tile(float* s, int64_t col0, int64_t cols) override {
    keep_tile(problem.logits, s, bias.class0, bias.classes, col0, cols, problem.products);
    for (int64_t c = 0; c < cols; ++c) {
      float* row = s + c * kTileStride;
      Vec largest = Vec::set1(kLowest);
      for (int64_t r = 0; r < bias.padded_classes; r += Vec::kLanes) {
        const Vec logits = Vec::load(row + r) + Vec::load(bias.values + r);
        logits.store(row + r);
        largest = max(largest, logits);
      }
      col.largest[c] = col.reference[c] = largest.largest();
      const Vec reference = Vec::set1(col.reference[c]);
      Vec sum = Vec::set1(0.f);
      for (int64_t r = 0; r < bias.padded_classes; r += Vec::kLanes) sum = sum + exp(Vec::load(row + r) - reference);
      col.sum[c] = sum.sum();
      if constexpr (kTotals) {
        Vec total = Vec::set1(0.f);
        for (int64_t r = 0; r < bias.padded_classes; r += Vec::kLanes) {
          const int n = static_cast<int>(std::min<int64_t>(Vec::kLanes, bias.classes - r));
          total = total + Vec::load(row + r, n);
        }
        col.total[c] = total.sum();
      }
      const int64_t target = bias.class_of(problem.targets[col0 + c]);
      if (target >= 0) problem.positive[col0 + c] = row[target];
    }
  }

  bool has_columns() const override { return true; }

  void update_columns(int64_t col0, int64_t cols) override {
    col.join_to<kTotals>(col0, cols, bias.class0 == 0, problem.largest, problem.sum, problem.total);
  }

  void end_panel(int64_t) override {}
};

// Turns a tile of products into d loss / d logits, and sums it over the hidden rows for the bias.
template <bool kShift, bool kBiasGradient>
struct ClassGradient final : Epilogue {
  explicit ClassGradient(const LinearCrossEntropyBackward& problem) : problem(problem) {}

  const LinearCrossEntropyBackward& problem;
  PanelBias bias;
  float bias_grad[kMaxRows];

  void begin_panel(int64_t first, int64_t count) override {
    bias.begin(problem.bias, first, count);
    std::fill(bias_grad, bias_grad + kMaxRows, 0.f);
  }

  bool recall(float* s, int64_t col0, int64_t cols) const override {
    return recall_tile(problem.logits, problem.products, bias.class0, bias.classes, col0, cols, s);
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    // A tile has sums of its own first, because a long sum in float32 would lose digits.
    float sums[kMaxRows] = {};
    for (int64_t c = 0; c < cols; ++c) {
      float* row = s + c * kTileStride;
      const Vec lse = Vec::set1(problem.lse[col0 + c]), rest = Vec::set1(problem.lse_rest[col0 + c]);
      const Vec weight = Vec::set1(problem.weight[col0 + c]), shift = Vec::set1(kShift ? problem.shift[col0 + c] : 0.f);
      for (int64_t r = 0; r < bias.padded_classes; r += Vec::kLanes) {
        const Vec logits = Vec::load(row + r) + Vec::load(bias.values + r);
        Vec g = exp((logits - lse) - rest) * weight;
        if constexpr (kShift) g = g - shift;
        g.store(row + r);
        if constexpr (kBiasGradient) (Vec::load(sums + r) + g).store(sums + r);
      }
      const int64_t target = bias.class_of(problem.targets[col0 + c]);
      if (target < 0) continue;
      row[target] -= problem.target_weight[col0 + c];
      sums[target] -= problem.target_weight[col0 + c];  // at once: the sums stay as small as what is left of them
    }
    if constexpr (kBiasGradient) {
      for (int64_t r = 0; r < bias.padded_classes; r += Vec::kLanes)
        (Vec::load(bias_grad + r) + Vec::load(sums + r)).store(bias_grad + r);
    }
  }

  void end_panel(int64_t) override {
    if constexpr (kBiasGradient) std::memcpy(problem.grad_bias + bias.class0, bias_grad, bias.classes * sizeof(float));
  }
};

void forward(const LinearCrossEntropyForward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flag(p.totals, [&](auto totals) {
    ClassStatistics<totals()> epilogue(p);
    forward_panels(p.logits, t, wave, scratch, epilogue);
  });
}

void backward(const LinearCrossEntropyBackward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flags(p.shift != nullptr, p.grad_bias != nullptr, [&](auto shift, auto bias_gradient) {
    ClassGradient<shift(), bias_gradient()> epilogue(p);
    backward_panels(p.logits, p.grads, t, wave, scratch, epilogue);
  });
}

}  // namespace

extern const LinearCrossEntropyKernels linear_cross_entropy_kernels;
const LinearCrossEntropyKernels linear_cross_entropy_kernels{tiling_of, forward, backward};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
