// Distillation on CPU tensors: allocation, threads and the O(N) part; the tiles are in cpu_kernels.cpp.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/dispatch.h"
#include "../common/engine_run.h"
#include "../common/tensors.h"
#include "cpu_kernels.h"

namespace mmkernels {

MMK_VARIANTS(DistillationKernels, distillation_kernels)

namespace distillation {

using at::Tensor;

// Student and teacher as the kernels take them.
struct Pair {
  Tensor queries, keys, teacher_queries, teacher_keys;
  Logits logits, teacher;
  int64_t n, m, size;

  Pair(const Tensor& queries_in, const Tensor& keys_in, const Tensor& scale, const Tensor& teacher_queries_in,
       const Tensor& teacher_keys_in, const Tensor& teacher_scale, bool symmetric) {
    check_pairs(queries_in, keys_in);
    check_scalar("scale", scale);
    check_pairs(teacher_queries_in, teacher_keys_in, "teacher_queries, teacher_keys");
    check_scalar("teacher_scale", teacher_scale);
    n = queries_in.size(0), m = keys_in.size(0), size = queries_in.size(1);
    TORCH_CHECK_VALUE(teacher_queries_in.size(0) == n && teacher_keys_in.size(0) == m,
                      "teacher: expected as many queries and keys as the student has, ", n, " and ", m, ", got ",
                      teacher_queries_in.size(0), " and ", teacher_keys_in.size(0));
    TORCH_CHECK_TYPE(teacher_queries_in.scalar_type() == queries_in.scalar_type(),
                     "teacher: expected the dtype of the student, ", queries_in.scalar_type(), ", got ",
                     teacher_queries_in.scalar_type());
    TORCH_CHECK_VALUE(!symmetric || n == m, "keys: expected one for each query, ", n, ", got ", m);
    queries = with_contiguous_rows(queries_in);
    keys = with_contiguous_rows(keys_in);
    teacher_queries = with_contiguous_rows(teacher_queries_in);
    teacher_keys = with_contiguous_rows(teacher_keys_in);
    logits = {features_of(queries), features_of(keys), size, scale.item<float>()};
    teacher = {features_of(teacher_queries), features_of(teacher_keys), teacher_queries.size(1),
               teacher_scale.item<float>()};
  }
};

DistillationSums sums_in(const Tensor& storage) {
  float* data = storage.mutable_data_ptr<float>();
  const int64_t count = storage.size(1);
  return {data, data + count, data + 2 * count, data + 3 * count, data + 4 * count};
}

// Returns the log-sum-exps of a largest logit and the sum relative to it, each as two floats, [2, count]: see
// SoftmaxWeights.
Tensor log_sum_exps(const float* largest, const float* sum, int64_t count, const at::TensorOptions& floats) {
  const Tensor lse = at::empty({2, count}, floats);
  float* out = lse.mutable_data_ptr<float>();
  for (int64_t i = 0; i < count; ++i) {
    const double whole = largest[i] + std::log(static_cast<double>(sum[i]));
    out[i] = static_cast<float>(whole);
    out[count + i] = static_cast<float>(whole - out[i]);
  }
  return lse;
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results forward(const Tensor& queries, const Tensor& keys, const Tensor& scale, const Tensor& teacher_queries,
                const Tensor& teacher_keys, const Tensor& teacher_scale, bool symmetric, bool keep_products) {
  const Pair pair(queries, keys, scale, teacher_queries, teacher_keys, teacher_scale, symmetric);
  const int64_t n = pair.n, m = symmetric ? pair.m : 0;
  const auto floats = queries.options().dtype(at::kFloat);
  const Tensor rows = at::empty({5, n}, floats), cols = at::empty({5, m}, floats), positives = at::empty({n}, floats);
  const Tensor products = empty_result({keep_products ? 2 : 0, pair.m, n}, floats);
  DistillationForward p{pair.logits,   pair.teacher,  symmetric,
                        sums_in(rows), sums_in(cols), positives.mutable_data_ptr<float>()};
  if (keep_products) {
    p.products = products.mutable_data_ptr<float>();
    p.teacher_products = p.products + pair.m * n;
  }
  const DistillationKernels& kernels = distillation_kernels_here();
  run(kernels.forward, p, kernels.tiling(p.logits, p.teacher, false, at::get_num_threads()), floats);

  const Tensor distilled = at::empty({n}, floats), matched = at::empty({n}, floats);
  float *distilled_loss = distilled.mutable_data_ptr<float>(), *matched_loss = matched.mutable_data_ptr<float>();
  for (int64_t i = 0; i < n; ++i) {
    double of_teacher = 0., of_match = 0.;
    const auto add = [&](const DistillationSums& of) {
      const double log_sum = std::log(static_cast<double>(of.sum[i]));
      of_teacher += log_sum - static_cast<double>(of.weighted[i]) / of.teacher_sum[i];
      // So a loss near zero keeps its digits, which lse - positive would lose.
      of_match += (static_cast<double>(of.largest[i]) - p.positive[i]) + log_sum;
    };
    add(p.row);
    if (symmetric) add(p.col);
    distilled_loss[i] = static_cast<float>(symmetric ? of_teacher / 2 : of_teacher);
    matched_loss[i] = static_cast<float>(symmetric ? of_match / 2 : of_match);
  }
  return {distilled,
          matched,
          log_sum_exps(p.row.largest, p.row.sum, n, floats),
          log_sum_exps(p.col.largest, p.col.sum, m, floats),
          log_sum_exps(p.row.teacher_largest, p.row.teacher_sum, n, floats),
          log_sum_exps(p.col.teacher_largest, p.col.teacher_sum, m, floats),
          products};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_distilled, const Tensor& grad_matched,
                                            const Tensor& queries, const Tensor& keys, const Tensor& scale,
                                            const Tensor& teacher_queries, const Tensor& teacher_keys,
                                            const Tensor& teacher_scale, const Tensor& row_lse_in,
                                            const Tensor& col_lse_in, const Tensor& teacher_row_lse_in,
                                            const Tensor& teacher_col_lse_in, const Tensor& products, bool symmetric,
                                            std::array<bool, 3> output_mask) {
  const Pair pair(queries, keys, scale, teacher_queries, teacher_keys, teacher_scale, symmetric);
  const int64_t n = pair.n, m = pair.m, size = pair.size;
  const auto floats = queries.options().dtype(at::kFloat);
  const Tensor grad_queries =
      at::empty(output_mask[0] ? at::IntArrayRef{n, size} : at::IntArrayRef{0}, queries.options());
  const Tensor grad_keys = at::empty(output_mask[1] ? at::IntArrayRef{m, size} : at::IntArrayRef{0}, keys.options());
  if (!output_mask[0] && !output_mask[1] && !output_mask[2]) return {grad_queries, grad_keys, at::empty({0}, floats)};

  // Row i and column i take the same weights.
  const Tensor weights = at::empty({3, n}, floats);
  float* weight = weights.mutable_data_ptr<float>();
  const Tensor of_teacher = grad_distilled.to(at::kFloat).contiguous(),
               of_match = grad_matched.to(at::kFloat).contiguous();
  const float *distilled = of_teacher.const_data_ptr<float>(), *matched = of_match.const_data_ptr<float>();
  const float share = symmetric ? 0.5f : 1.f;
  for (int64_t i = 0; i < n; ++i) {
    weight[i] = share * (distilled[i] + matched[i]);
    weight[n + i] = share * distilled[i];
    weight[2 * n + i] = matched[i];
  }
  const Tensor row_lse = row_lse_in.contiguous(), col_lse = col_lse_in.contiguous(),
               teacher_row_lse = teacher_row_lse_in.contiguous(), teacher_col_lse = teacher_col_lse_in.contiguous();
  const auto softmax = [](const Tensor& lse, const float* weight) {
    const float* value = lse.const_data_ptr<float>();
    return SoftmaxWeights{value, value + lse.size(1), weight};
  };
  DistillationBackward p{};
  p.logits = pair.logits;
  p.teacher = pair.teacher;
  p.row = softmax(row_lse, weight);
  p.teacher_row = softmax(teacher_row_lse, weight + n);
  if (symmetric) {
    p.col = softmax(col_lse, weight);
    p.teacher_col = softmax(teacher_col_lse, weight + n);
  }
  p.positive_weight = weight + 2 * n;
  TORCH_CHECK_VALUE(products.numel() == 0 || (products.numel() == 2 * m * n && products.is_contiguous()),
                    "products: expected [2, M, N] or none, got ", products.sizes());
  if (products.numel() > 0) {
    p.products = products.const_data_ptr<float>();
    p.teacher_products = p.products + m * n;
  }

  const DistillationKernels& kernels = distillation_kernels_here();
  const Tiling tiling = kernels.tiling(p.logits, p.teacher, true, at::get_num_threads());
  std::vector<double> scale_parts(tiling.panels, 0.);
  const Tensor low_keys = point_to(p.grads, output_mask[0], grad_queries, output_mask[1], grad_keys);
  if (output_mask[2]) p.grad_scale = scale_parts.data();
  run(kernels.backward, p, tiling, floats);

  return {grad_queries, grad_keys, sum_of_panels(scale_parts, output_mask[2], floats)};
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("distillation_cpu_forward", &forward);
  library.impl("distillation_cpu_backward", &backward);
}

}  // namespace distillation
}  // namespace mmkernels
