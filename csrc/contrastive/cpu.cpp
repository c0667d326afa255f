// The contrastive ops on CPU tensors: allocation, threads and the O(N) part; the tiles are in cpu_kernels.cpp.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/dispatch.h"
#include "../common/engine_run.h"
#include "../common/tensors.h"
#include "cpu_kernels.h"

namespace mmkernels {

MMK_VARIANTS(ContrastiveKernels, contrastive_kernels)

namespace {

using at::Tensor;
using std::optional;

optional<Tensor> checked_targets(const optional<Tensor>& targets, int64_t num_keys) {
  if (!targets) return targets;
  const Tensor indices = targets->contiguous();
  const int64_t* t = indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < indices.numel(); ++i) {
    TORCH_CHECK_VALUE(0 <= t[i] && t[i] < num_keys, "targets: expected indices of the ", num_keys, " keys, 0 to ",
                      num_keys - 1, ", got ", t[i]);
  }
  return indices;
}

void check_inputs(const Tensor& queries, const Tensor& keys, const Tensor& scale) {
  check_pairs(queries, keys);
  check_scalar("scale", scale);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& queries_in, const Tensor& keys_in, const Tensor& scale,
                                           const optional<Tensor>& targets_in, bool symmetric, double label_smoothing) {
  check_inputs(queries_in, keys_in, scale);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const int64_t n = queries.size(0), m = keys.size(0);
  const optional<Tensor> targets = checked_targets(targets_in, m);
  const auto floats = queries.options().dtype(at::kFloat);

  const Tensor rows = at::empty({4, n}, floats), cols = at::empty({3, symmetric ? m : 0}, floats);
  float *row = rows.mutable_data_ptr<float>(), *col = cols.mutable_data_ptr<float>();
  InfoNceForward p{};
  p.logits = {features_of(queries), features_of(keys), queries.size(1), scale.item<float>()};
  p.targets = targets ? targets->const_data_ptr<int64_t>() : nullptr;
  p.columns = symmetric;
  p.totals = label_smoothing != 0;
  p.row_max = row;
  p.row_sum = row + n;
  p.row_total = row + 2 * n;
  p.row_positive = row + 3 * n;
  p.col_max = col;
  p.col_sum = col + m;
  p.col_total = col + 2 * m;
  run(contrastive_kernels_here().info_nce_forward, p,
      contrastive_kernels_here().tiling(p.logits, false, at::get_num_threads()), floats);

  const Tensor losses = at::empty({n}, floats), row_lse = at::empty({2, n}, floats),
               col_lse = at::empty({2, symmetric ? m : 0}, floats);
  float *loss = losses.mutable_data_ptr<float>(), *lse_of_row = row_lse.mutable_data_ptr<float>();
  float* lse_of_col = col_lse.mutable_data_ptr<float>();
  // As the sum of two floats: see InfoNceBackward.
  const auto split = [](double lse, float& value, float& rest) {
    value = static_cast<float>(lse);
    rest = static_cast<float>(lse - value);
  };
  const double smooth = label_smoothing, sharp = 1 - smooth;
  // (max - target) + log(sum): a loss near zero keeps its digits, which lse - target would lose.
  at::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double positive = sharp * p.row_positive[i], log_sum = std::log(static_cast<double>(p.row_sum[i]));
      const double row_mean = p.totals ? p.row_total[i] / static_cast<double>(m) : 0.;
      double value = (p.row_max[i] - (positive + smooth * row_mean)) + log_sum;
      split(p.row_max[i] + log_sum, lse_of_row[i], lse_of_row[n + i]);
      if (symmetric) {
        const int64_t t = p.targets ? p.targets[i] : i;
        const double col_mean = p.totals ? p.col_total[t] / static_cast<double>(n) : 0.;
        value += (p.col_max[t] - (positive + smooth * col_mean)) + std::log(static_cast<double>(p.col_sum[t]));
        value /= 2;
      }
      loss[i] = static_cast<float>(value);
    }
  });
  at::parallel_for(0, symmetric ? m : 0, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      split(p.col_max[j] + std::log(static_cast<double>(p.col_sum[j])), lse_of_col[j], lse_of_col[m + j]);
  });
  return {losses, row_lse, col_lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_losses, const Tensor& queries_in, const Tensor& keys_in,
                                            const Tensor& scale, const optional<Tensor>& targets_in,
                                            const Tensor& row_lse_in, const Tensor& col_lse_in, bool symmetric,
                                            double label_smoothing, std::array<bool, 3> output_mask) {
  check_inputs(queries_in, keys_in, scale);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const int64_t n = queries.size(0), m = keys.size(0), size = queries.size(1);
  const optional<Tensor> targets = checked_targets(targets_in, m);
  const auto floats = queries.options().dtype(at::kFloat);
  const Tensor row_lse = row_lse_in.contiguous(), col_lse = col_lse_in.contiguous();
  const Tensor grads = grad_losses.to(at::kFloat).contiguous();

  const Tensor grad_queries =
      at::empty(output_mask[0] ? at::IntArrayRef{n, size} : at::IntArrayRef{0}, queries.options());
  const Tensor grad_keys = at::empty(output_mask[1] ? at::IntArrayRef{m, size} : at::IntArrayRef{0}, keys.options());
  if (!output_mask[0] && !output_mask[1] && !output_mask[2]) return {grad_queries, grad_keys, at::empty({0}, floats)};

  // Weights of the two softmaxes, and what smoothing and the positives take off: see InfoNceBackward.
  const Tensor row_terms = at::empty({3, n}, floats), col_terms = at::zeros({2, symmetric ? m : 0}, floats);
  const float* g = grads.const_data_ptr<float>();
  float *row_weight = row_terms.mutable_data_ptr<float>(), *col_weight = col_terms.mutable_data_ptr<float>();
  InfoNceBackward p{};
  p.logits = {features_of(queries), features_of(keys), size, scale.item<float>()};
  p.targets = targets ? targets->const_data_ptr<int64_t>() : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    row_weight[i] = symmetric ? g[i] / 2 : g[i];
    row_weight[n + i] = static_cast<float>(row_weight[i] * label_smoothing / m);
    row_weight[2 * n + i] = static_cast<float>(g[i] * (1 - label_smoothing));
    if (symmetric) col_weight[p.targets ? p.targets[i] : i] += row_weight[i];
  }
  for (int64_t j = 0; symmetric && j < m; ++j)
    col_weight[m + j] = static_cast<float>(col_weight[j] * label_smoothing / n);
  p.row_lse = row_lse.const_data_ptr<float>();
  p.row_lse_rest = p.row_lse + n;
  p.row_weight = row_weight;
  p.row_shift = label_smoothing != 0 ? row_weight + n : nullptr;
  p.positive_weight = row_weight + 2 * n;
  p.col_lse = symmetric ? col_lse.const_data_ptr<float>() : nullptr;
  p.col_lse_rest = p.col_lse ? p.col_lse + m : nullptr;
  p.col_weight = col_weight;
  p.col_shift = col_weight + m;

  const Tiling tiling = contrastive_kernels_here().tiling(p.logits, true, at::get_num_threads());
  std::vector<double> scale_parts(tiling.panels, 0.);
  Tensor low_keys;
  if (output_mask[0]) p.grads.queries = grad_queries.mutable_data_ptr();
  if (output_mask[1]) {
    p.grads.keys = grad_keys.mutable_data_ptr();
    if (keys.scalar_type() != at::kFloat) {
      low_keys = at::empty({m, size}, keys.options().dtype(at::kShort));
      p.grads.low_keys = reinterpret_cast<uint16_t*>(low_keys.mutable_data_ptr<int16_t>());
    }
  }
  if (output_mask[2]) p.grad_scale = scale_parts.data();
  run(contrastive_kernels_here().info_nce_backward, p, tiling, floats);

  const Tensor grad_scale = at::empty(output_mask[2] ? at::IntArrayRef{} : at::IntArrayRef{0}, floats);
  if (output_mask[2])
    *grad_scale.mutable_data_ptr<float>() =
        static_cast<float>(std::accumulate(scale_parts.begin(), scale_parts.end(), 0.));
  return {grad_queries, grad_keys, grad_scale};
}

std::string variant() {
  return contrastive_kernels_here().name;
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("info_nce_cpu_forward", &forward);
  library.impl("info_nce_cpu_backward", &backward);
}

TORCH_LIBRARY_IMPL(mmkernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_variant", &variant);
}

}  // namespace
}  // namespace mmkernels
