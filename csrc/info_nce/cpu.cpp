// info_nce on CPU tensors: allocation, threads and the O(N) part; the tiles are in cpu_kernels.cpp.
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
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

MMK_VARIANTS(InfoNceKernels, info_nce_kernels)

namespace info_nce {

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

// Finds which queries and keys are each other's positives: those of equal groups.
struct Groups {
  std::vector<int64_t> queries;       // by group, and ascending within one
  std::vector<int64_t> first, after;  // [m], the queries of the key's group
  std::vector<int64_t> keys;          // [n], how many keys are of the query's group

  Groups(const optional<Tensor>& query_groups, const optional<Tensor>& key_groups, int64_t n, int64_t m,
         const optional<Tensor>& targets, bool symmetric) {
    TORCH_CHECK_VALUE(query_groups.has_value() == key_groups.has_value(),
                      "query_groups, key_groups: expected both or neither");
    if (!query_groups) return;
    // Keys past the end of key_groups are of no group.
    TORCH_CHECK_VALUE(query_groups->numel() == n && key_groups->numel() <= m &&
                          query_groups->scalar_type() == at::kLong && key_groups->scalar_type() == at::kLong,
                      "query_groups, key_groups: expected [N] and [M] of int64");
    const Tensor of_queries = query_groups->contiguous(), of_keys = key_groups->contiguous();
    const int64_t *query_group = of_queries.const_data_ptr<int64_t>(), *key_group = of_keys.const_data_ptr<int64_t>();
    queries.resize(n);
    std::iota(queries.begin(), queries.end(), 0);
    std::stable_sort(queries.begin(), queries.end(),
                     [&](int64_t i, int64_t j) { return query_group[i] < query_group[j]; });
    first.resize(m);
    after.resize(m);
    std::vector<int64_t> keys_of_first(n);
    for (int64_t j = 0; j < of_keys.numel(); ++j) {
      const auto begin = std::lower_bound(queries.begin(), queries.end(), key_group[j],
                                          [&](int64_t i, int64_t group) { return query_group[i] < group; });
      const auto end = std::upper_bound(begin, queries.end(), key_group[j],
                                        [&](int64_t group, int64_t i) { return group < query_group[i]; });
      first[j] = begin - queries.begin();
      after[j] = end - queries.begin();
      if (begin != end) ++keys_of_first[first[j]];
    }
    keys.resize(n);
    for (int64_t at = 0, begin = 0; at < n; ++at) {
      if (query_group[queries[at]] != query_group[queries[begin]]) begin = at;
      keys[queries[at]] = keys_of_first[begin];
    }
    for (int64_t i = 0; i < n; ++i) {
      TORCH_CHECK_VALUE(keys[i] > 0, "query_groups: expected groups of key_groups, query ", i, " is of group ",
                        query_group[i], ", and no key is; leave the query out or pass a key of its group");
      const int64_t j = targets ? targets->const_data_ptr<int64_t>()[i] : i;
      TORCH_CHECK_VALUE(!symmetric || first[j] < after[j], "key_groups: key ", j, " is matched by query ", i,
                        ", and its group is that of no query; pass symmetric=False or the group of a query");
    }
  }

  Positives positives() const { return {queries.empty() ? nullptr : queries.data(), first.data(), after.data()}; }
  double keys_of(int64_t query) const { return keys.empty() ? 1. : static_cast<double>(keys[query]); }
  double queries_of(int64_t key) const { return static_cast<double>(after[key] - first[key]); }
};

void check_inputs(const Tensor& queries, const Tensor& keys, const Tensor& scale) {
  check_pairs(queries, keys);
  check_scalar("scale", scale);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& queries_in, const Tensor& keys_in, const Tensor& scale,
                                                   const optional<Tensor>& targets_in,
                                                   const optional<Tensor>& query_groups,
                                                   const optional<Tensor>& key_groups, bool symmetric,
                                                   double label_smoothing, bool keep_products) {
  check_inputs(queries_in, keys_in, scale);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const int64_t n = queries.size(0), m = keys.size(0);
  const optional<Tensor> targets = checked_targets(targets_in, m);
  const Groups groups(query_groups, key_groups, n, m, targets, symmetric);
  const bool several = query_groups.has_value();
  const auto floats = queries.options().dtype(at::kFloat), doubles = queries.options().dtype(at::kDouble);

  const Tensor rows = at::empty({3, n}, floats), cols = at::empty({3, symmetric ? m : 0}, floats);
  const Tensor row_positives = at::empty({n}, doubles),
               col_positives = at::empty({symmetric && several ? m : 0}, doubles);
  const Tensor products = empty_result({keep_products ? m : 0, n}, floats);
  float *row = rows.mutable_data_ptr<float>(), *col = cols.mutable_data_ptr<float>();
  InfoNceForward p{};
  p.logits = {features_of(queries), features_of(keys), queries.size(1), scale.item<float>()};
  p.targets = targets ? targets->const_data_ptr<int64_t>() : nullptr;
  p.positives = groups.positives();
  p.columns = symmetric;
  p.totals = label_smoothing != 0;
  p.row_max = row;
  p.row_sum = row + n;
  p.row_total = row + 2 * n;
  p.row_positive = row_positives.mutable_data_ptr<double>();
  p.col_positive = col_positives.mutable_data_ptr<double>();
  p.col_max = col;
  p.col_sum = col + m;
  p.col_total = col + 2 * m;
  if (keep_products) p.products = products.mutable_data_ptr<float>();
  run(info_nce_kernels_here().info_nce_forward, p,
      info_nce_kernels_here().tiling(p.logits, false, at::get_num_threads()), floats);

  const Tensor losses = at::empty({n}, floats), row_lse = at::empty({2, n}, floats),
               col_lse = at::empty({2, symmetric ? m : 0}, floats);
  float *loss = losses.mutable_data_ptr<float>(), *lse_of_row = row_lse.mutable_data_ptr<float>();
  float* lse_of_col = col_lse.mutable_data_ptr<float>();
  // An lse is the sum of two floats: see SoftmaxWeights.
  const auto split = [](double lse, float& value, float& rest) {
    value = static_cast<float>(lse);
    rest = static_cast<float>(lse - value);
  };
  const double smooth = label_smoothing, sharp = 1 - smooth;
  // (max - target) + log(sum): a loss near zero keeps its digits, which lse - target would lose.
  at::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double positive = sharp * (p.row_positive[i] / groups.keys_of(i));
      const double log_sum = std::log(static_cast<double>(p.row_sum[i]));
      const double row_mean = p.totals ? p.row_total[i] / static_cast<double>(m) : 0.;
      double value = (p.row_max[i] - (positive + smooth * row_mean)) + log_sum;
      split(p.row_max[i] + log_sum, lse_of_row[i], lse_of_row[n + i]);
      if (symmetric) {
        const int64_t t = p.targets ? p.targets[i] : i;
        if (several) positive = sharp * (p.col_positive[t] / groups.queries_of(t));
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
  return {losses, row_lse, col_lse, products};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_losses, const Tensor& queries_in, const Tensor& keys_in,
                                            const Tensor& scale, const optional<Tensor>& targets_in,
                                            const optional<Tensor>& query_groups, const optional<Tensor>& key_groups,
                                            const Tensor& row_lse_in, const Tensor& col_lse_in, const Tensor& products,
                                            bool symmetric, double label_smoothing, int64_t num_grad_keys,
                                            std::array<bool, 3> output_mask) {
  check_inputs(queries_in, keys_in, scale);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const int64_t n = queries.size(0), m = keys.size(0), size = queries.size(1);
  const optional<Tensor> targets = checked_targets(targets_in, m);
  const Groups groups(query_groups, key_groups, n, m, targets, symmetric);
  const bool several = query_groups.has_value();
  const auto floats = queries.options().dtype(at::kFloat);
  const Tensor row_lse = row_lse_in.contiguous(), col_lse = col_lse_in.contiguous();
  const Tensor grads = grad_losses.to(at::kFloat).contiguous();

  const Tensor grad_queries =
      at::empty(output_mask[0] ? at::IntArrayRef{n, size} : at::IntArrayRef{0}, queries.options());
  const Tensor grad_keys =
      at::empty(output_mask[1] ? at::IntArrayRef{num_grad_keys, size} : at::IntArrayRef{0}, keys.options());
  if (!output_mask[0] && !output_mask[1] && !output_mask[2]) return {grad_queries, grad_keys, at::empty({0}, floats)};

  // Weights of the two softmaxes, and what smoothing and the positives take off: see InfoNceBackward.
  const Tensor row_terms = at::empty({3, n}, floats), col_terms = at::zeros({3, symmetric ? m : 0}, floats);
  const float* g = grads.const_data_ptr<float>();
  float *row_weight = row_terms.mutable_data_ptr<float>(), *col_weight = col_terms.mutable_data_ptr<float>();
  InfoNceBackward p{};
  p.logits = {features_of(queries), features_of(keys), size, scale.item<float>()};
  p.targets = targets ? targets->const_data_ptr<int64_t>() : nullptr;
  p.positives = groups.positives();
  for (int64_t i = 0; i < n; ++i) {
    row_weight[i] = symmetric ? g[i] / 2 : g[i];
    row_weight[n + i] = static_cast<float>(row_weight[i] * label_smoothing / m);
    // A single positive is that of its row and of its column, and takes the weights of both.
    const double of_positive = several ? row_weight[i] / groups.keys_of(i) : g[i];
    row_weight[2 * n + i] = static_cast<float>(of_positive * (1 - label_smoothing));
    if (symmetric) col_weight[p.targets ? p.targets[i] : i] += row_weight[i];
  }
  for (int64_t j = 0; symmetric && j < m; ++j) {
    col_weight[m + j] = static_cast<float>(col_weight[j] * label_smoothing / n);
    if (several && groups.first[j] < groups.after[j])
      col_weight[2 * m + j] = static_cast<float>(col_weight[j] / groups.queries_of(j) * (1 - label_smoothing));
  }
  const float* lse_of_row = row_lse.const_data_ptr<float>();
  p.row = {lse_of_row, lse_of_row + n, row_weight};
  p.row_shift = label_smoothing != 0 ? row_weight + n : nullptr;
  p.positive_weight = row_weight + 2 * n;
  if (symmetric) {
    const float* lse_of_col = col_lse.const_data_ptr<float>();
    p.col = {lse_of_col, lse_of_col + m, col_weight};
  }
  p.col_shift = col_weight + m;
  p.col_positive_weight = col_weight + 2 * m;
  TORCH_CHECK_VALUE(products.numel() == 0 || (products.numel() == m * n && products.is_contiguous()),
                    "products: expected [M, N] or none, got ", products.sizes());
  if (products.numel() > 0) p.products = products.const_data_ptr<float>();

  const Tiling tiling = info_nce_kernels_here().tiling(p.logits, true, at::get_num_threads());
  std::vector<double> scale_parts(tiling.panels, 0.);
  p.grads.keys_left_out = m - num_grad_keys;
  const Tensor low_keys = point_to(p.grads, output_mask[0], grad_queries, output_mask[1], grad_keys);
  if (output_mask[2]) p.grad_scale = scale_parts.data();
  run(info_nce_kernels_here().info_nce_backward, p, tiling, floats);

  return {grad_queries, grad_keys, sum_of_panels(scale_parts, output_mask[2], floats)};
}

// The gradients of one block of the logits of several processes: see _BLOCK_BACKWARD in ops.py.
std::tuple<Tensor, Tensor, Tensor> block_backward(const Tensor& queries_in, const Tensor& keys_in, const Tensor& scale,
                                                  const Tensor& targets_in, const Tensor& row_lse_in,
                                                  const Tensor& col_lse_in, const Tensor& row_weights_in,
                                                  const Tensor& col_weights_in, double label_smoothing,
                                                  std::array<bool, 3> output_mask) {
  check_inputs(queries_in, keys_in, scale);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const int64_t n = queries.size(0), m = keys.size(0), size = queries.size(1);
  const bool symmetric = col_lse_in.numel() > 0;
  const auto floats = queries.options().dtype(at::kFloat);
  const auto checked = [&](const char* name, const Tensor& x, int64_t count, at::ScalarType dtype) {
    TORCH_CHECK_VALUE(x.numel() == count && x.scalar_type() == dtype, name, ": expected ", count, " of ", dtype,
                      ", got ", x.numel(), " of ", x.scalar_type());
    return x.contiguous();
  };
  const Tensor targets = checked("targets", targets_in, n, at::kLong),
               row_lse = checked("row_lse", row_lse_in, 2 * n, at::kFloat),
               col_lse = checked("col_lse", col_lse_in, symmetric ? 2 * m : 0, at::kFloat),
               row_weights = checked("row_weights", row_weights_in, n, at::kFloat),
               col_weights = checked("col_weights", col_weights_in, symmetric ? m : 0, at::kFloat);
  const Tensor grad_queries = at::empty(output_mask[0] ? at::IntArrayRef{n, size} : at::IntArrayRef{0}, floats);
  const Tensor grad_keys = at::empty(output_mask[1] ? at::IntArrayRef{m, size} : at::IntArrayRef{0}, floats);
  if (!output_mask[0] && !output_mask[1] && !output_mask[2]) return {grad_queries, grad_keys, at::empty({0}, floats)};

  InfoNceBackward p{};
  p.logits = {features_of(queries), features_of(keys), size, scale.item<float>()};
  p.targets = targets.const_data_ptr<int64_t>();  // -1 is in no tile
  const float *lse_of_row = row_lse.const_data_ptr<float>(), *lse_of_col = col_lse.const_data_ptr<float>();
  p.row = {lse_of_row, lse_of_row + n, row_weights.const_data_ptr<float>()};
  if (symmetric) p.col = {lse_of_col, lse_of_col + m, col_weights.const_data_ptr<float>()};
  const Tensor positive_weights = at::mul(row_weights, (symmetric ? 2 : 1) * (1 - label_smoothing));
  p.positive_weight = positive_weights.const_data_ptr<float>();

  const Tiling tiling = info_nce_kernels_here().tiling(p.logits, true, at::get_num_threads());
  std::vector<double> scale_parts(tiling.panels, 0.);
  p.grads.in_float32 = true;
  point_to(p.grads, output_mask[0], grad_queries, output_mask[1], grad_keys);
  if (output_mask[2]) p.grad_scale = scale_parts.data();
  run(info_nce_kernels_here().info_nce_backward, p, tiling, floats);
  return {grad_queries, grad_keys, sum_of_panels(scale_parts, output_mask[2], floats)};
}

std::string variant() {
  return info_nce_kernels_here().name;
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("info_nce_cpu_forward", &forward);
  library.impl("info_nce_cpu_backward", &backward);
  library.impl("info_nce_cpu_block_backward", &block_backward);
}

TORCH_LIBRARY_IMPL(mmkernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_variant", &variant);
}

}  // namespace info_nce
}  // namespace mmkernels
