// The sigmoid loss as an epilogue of the tile engine. This file is compiled once for each instruction set
// (MMK_VARIANT).
#include "cpu_kernels.h"

#include "../common/engine.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

// How many columns of a tile share a pass over its rows: their losses meet in registers, so that a row's sum is loaded
// and stored once for 4 exponentials.
constexpr int64_t kTogether = 4;
// How many columns' losses are summed in float32, 15 roundings of at most 2^-24 each. Longer sums would lose the digits
// of many small losses beside a large one.
constexpr int64_t kShortSum = 16;

// With y = -label * logit: the loss of a pair is log(1 + e^y) = max(y, 0) + log1p(e), its gradient to the logit
// -label * sigmoid(y), sigmoid(y) = (y < 0 ? e : 1) / (1 + e). Both take one exponential, e = e^-|y|.
template <bool kLosses, bool kGradients>
struct SigmoidEpilogue final : Epilogue {
  explicit SigmoidEpilogue(const SigmoidPass& problem) : problem(problem) {
    std::fill(signs[0], signs[0] + kTogether * kMaxRows, 1.f);
  }

  const SigmoidPass& problem;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float weights[kMaxRows];
  float signs[kTogether][kMaxRows];  // -label: of the columns at hand, in the tiles that hold matches
  double losses[kMaxRows];
  DoubleSum scale_sum, bias_sum;

  void begin_panel(int64_t first_row, int64_t count) override {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    std::fill(losses, losses + padded_rows, 0.);
    scale_sum = bias_sum = DoubleSum();
    if constexpr (kGradients) {
      std::copy(problem.weights + row0, problem.weights + row0 + rows, weights);
      std::fill(weights + rows, weights + padded_rows, 0.f);
    }
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    // Lanes past the last row hold a product of zeros, which is NaN if a key is not finite.
    for (int64_t c = 0; c < cols && rows < padded_rows; ++c)
      std::fill(s + c * kTileStride + rows, s + c * kTileStride + padded_rows, 0.f);
    const int64_t first_match = row0 + problem.match_offset;  // of the panel's rows
    const bool matches = first_match < col0 + cols && col0 < first_match + rows;
    with_flag(matches, [&](auto has_matches) {
      for (int64_t begin = 0; begin < cols; begin += kShortSum) {
        const int64_t end = std::min(begin + kShortSum, cols);
        float sums[kMaxRows] = {};
        int64_t c = begin;
        for (; c + kTogether <= end; c += kTogether) columns<has_matches(), kTogether>(s, c, col0 - first_match, sums);
        for (; c < end; ++c) columns<has_matches(), 1>(s, c, col0 - first_match, sums);
        for (int64_t r = 0; kLosses && r < rows; ++r) losses[r] += sums[r];
      }
    });
  }

  // The match of column c lies in row c + shift.
  template <bool kMatches, int64_t kCount>
  void columns(float* s, int64_t first, int64_t shift, float* sums) {
    const auto mark = [&](float sign) {
      for (int64_t i = 0; i < kCount; ++i) {
        const int64_t match = first + i + shift;
        if (0 <= match && match < rows) signs[i][match] = sign;
      }
    };
    if constexpr (kMatches) mark(-1.f);
    const Vec scale = Vec::set1(problem.logits.scale), bias = Vec::set1(problem.bias), zero = Vec::set1(0.f),
              one = Vec::set1(1.f);
    for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
      Vec loss = zero, grad_sum = zero, product_sum = zero;
      for (int64_t i = 0; i < kCount; ++i) {
        float* at = s + (first + i) * kTileStride + r;
        const Vec product = Vec::load(at);
        Vec y = fma(product, scale, bias);
        if constexpr (kMatches) y = y * Vec::load(signs[i] + r);
        const Vec e = exp(minus_abs(y));
        if constexpr (kLosses) loss = loss + (max(zero, y) + log1p(e));
        if constexpr (kGradients) {
          Vec g = where_negative(y, e, one) / (one + e) * Vec::load(weights + r);
          if constexpr (kMatches) g = g * Vec::load(signs[i] + r);
          g.store(at);
          grad_sum = grad_sum + g;
          product_sum = fma(g, product, product_sum);
        }
      }
      if constexpr (kLosses) (Vec::load(sums + r) + loss).store(sums + r);
      if constexpr (kGradients) {
        bias_sum.add(grad_sum);
        scale_sum.add(product_sum);
      }
    }
    if constexpr (kMatches) mark(1.f);
  }

  void end_panel(int64_t panel) override {
    for (int64_t r = 0; kLosses && r < rows; ++r) problem.losses[row0 + r] = static_cast<float>(losses[r]);
    if constexpr (kGradients) {
      if (problem.grad_scale != nullptr) problem.grad_scale[panel] = scale_sum.total();
      if (problem.grad_bias != nullptr) problem.grad_bias[panel] = bias_sum.total();
    }
  }
};

void losses(const SigmoidPass& p, const Tiling& t, Wavefront& wave, float* scratch) {
  SigmoidEpilogue<true, false> epilogue(p);
  forward_panels(p.logits, t, wave, scratch, epilogue);
}

void gradients(const SigmoidPass& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_flag(p.losses != nullptr, [&](auto with_losses) {
    SigmoidEpilogue<with_losses(), true> epilogue(p);
    backward_panels(p.logits, p.grads, t, wave, scratch, epilogue);
  });
}

}  // namespace

extern const SigmoidKernels sigmoid_kernels;
const SigmoidKernels sigmoid_kernels{tiling_of, losses, gradients};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
