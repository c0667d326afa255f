// linear_cross_entropy on CPU tensors: allocation, the rows that count, and the O(N) part; the tiles are in
// cpu_kernels.cpp.
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/dispatch.h"
#include "../common/engine_run.h"
#include "../common/tensors.h"
#include "cpu_kernels.h"

namespace mmkernels {

MMK_VARIANTS(LinearCrossEntropyKernels, linear_cross_entropy_kernels)

namespace linear_cross_entropy {

using at::Tensor;
using std::optional;

// The rows whose target is not the ignored index: the others take no part in anything.
struct CountedRows {
  int64_t all;
  std::vector<int64_t> rows, targets;
  Tensor hidden;  // those rows alone

  CountedRows(const Tensor& hidden_in, const Tensor& targets_in, int64_t ignore_index, int64_t classes)
      : all(hidden_in.size(0)) {
    const Tensor indices = targets_in.contiguous();
    const int64_t* t = indices.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < all; ++i) {
      if (t[i] == ignore_index) continue;
      TORCH_CHECK_VALUE(0 <= t[i] && t[i] < classes, "targets: expected indices of the ", classes,
                        " rows of weight, 0 to ", classes - 1, ", or ignore_index=", ignore_index, ", got ", t[i]);
      rows.push_back(i);
      targets.push_back(t[i]);
    }
    hidden = hidden_in;
    if (count() < all) {
      const Tensor index = at::empty({count()}, targets_in.options());
      std::copy(rows.begin(), rows.end(), index.mutable_data_ptr<int64_t>());
      hidden = hidden_in.index_select(0, index);
    }
    hidden = with_contiguous_rows(hidden);
  }

  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

void check_inputs(const Tensor& hidden, const Tensor& weight, const optional<Tensor>& bias, const Tensor& targets) {
  TORCH_CHECK_VALUE(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                    "hidden, weight: expected [N, D] and [V, D], got ", hidden.sizes(), " and ", weight.sizes());
  TORCH_CHECK_TYPE(hidden.scalar_type() == weight.scalar_type() &&
                       (hidden.scalar_type() == at::kFloat || hidden.scalar_type() == at::kBFloat16 ||
                        hidden.scalar_type() == at::kHalf),
                   "hidden, weight: expected one dtype of float32, bfloat16, float16, got ", hidden.scalar_type(),
                   " and ", weight.scalar_type());
  TORCH_CHECK_VALUE(targets.dim() == 1 && targets.size(0) == hidden.size(0) && targets.scalar_type() == at::kLong,
                    "targets: expected [N] of int64, got ", targets.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == at::kFloat),
                    "bias: expected [V] of float32");
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight_in,
                                           const optional<Tensor>& bias_in, const Tensor& targets, int64_t ignore_index,
                                           double label_smoothing, bool keep_products) {
  check_inputs(hidden, weight_in, bias_in, targets);
  const Tensor weight = with_contiguous_rows(weight_in);
  const Tensor bias = bias_in ? bias_in->contiguous() : Tensor();
  const int64_t classes = weight.size(0);
  const CountedRows counted(hidden, targets, ignore_index, classes);
  const int64_t n = counted.count();
  const auto floats = weight.options().dtype(at::kFloat);

  const Tensor losses = at::zeros({counted.all}, floats), lse = at::zeros({2, counted.all}, floats);
  const Tensor products = empty_result({keep_products ? counted.all : 0, classes}, floats);
  if (keep_products) products.narrow(0, n, counted.all - n).zero_();  // the rows that count come first
  if (n == 0) return {losses, lse, products};
  const Tensor statistics = at::empty({4, n}, floats);
  LinearCrossEntropyForward p{};
  p.logits = {features_of(weight), features_of(counted.hidden), weight.size(1), 1.f};
  p.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  p.targets = counted.targets.data();
  p.totals = label_smoothing != 0;
  p.largest = statistics.mutable_data_ptr<float>();
  p.sum = p.largest + n;
  p.total = p.largest + 2 * n;
  p.positive = p.largest + 3 * n;
  if (keep_products) p.products = products.mutable_data_ptr<float>();
  const LinearCrossEntropyKernels& kernels = linear_cross_entropy_kernels_here();
  run(kernels.forward, p, kernels.tiling(p.logits, false, at::get_num_threads()), floats);

  float *loss = losses.mutable_data_ptr<float>(), *lse_of_row = lse.mutable_data_ptr<float>();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = counted.rows[i];
    const double log_sum = std::log(static_cast<double>(p.sum[i])), whole = p.largest[i] + log_sum;
    // Terms of weight 0 are left out: 0 times an infinite logit would be NaN.
    double positive = label_smoothing != 1 ? (1 - label_smoothing) * p.positive[i] : 0.;
    if (p.totals) positive += label_smoothing * p.total[i] / static_cast<double>(classes);
    // (largest - target) + log(sum): a loss near zero keeps its digits, which lse - target would lose.
    loss[row] = static_cast<float>((p.largest[i] - positive) + log_sum);
    // An lse is the sum of two floats: see LinearCrossEntropyBackward.
    lse_of_row[row] = static_cast<float>(whole);
    lse_of_row[counted.all + row] = static_cast<float>(whole - lse_of_row[row]);
  }
  return {losses, lse, products};
}

// Moves rows [0, rows.size()) of x to where they belong, and puts zeros into all others.
void spread_rows(const Tensor& x, const std::vector<int64_t>& rows) {
  char* data = static_cast<char*>(x.mutable_data_ptr());
  const int64_t row_bytes = x.size(1) * x.element_size();
  // The last row moves first: each moves to a place at or behind its own, and the row that was there has left it.
  int64_t next = static_cast<int64_t>(rows.size()) - 1;
  for (int64_t row = x.size(0) - 1; row >= 0; --row) {
    if (next >= 0 && rows[next] == row) {
      if (next != row) std::memcpy(data + row * row_bytes, data + next * row_bytes, row_bytes);
      --next;
    } else {
      std::memset(data + row * row_bytes, 0, row_bytes);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_losses, const Tensor& hidden, const Tensor& weight_in,
                                            const optional<Tensor>& bias_in, const Tensor& targets,
                                            const Tensor& lse_in, const Tensor& products, int64_t ignore_index,
                                            double label_smoothing, std::array<bool, 3> output_mask) {
  check_inputs(hidden, weight_in, bias_in, targets);
  const Tensor weight = with_contiguous_rows(weight_in);
  const Tensor bias = bias_in ? bias_in->contiguous() : Tensor();
  const int64_t classes = weight.size(0), size = weight.size(1);
  const CountedRows counted(hidden, targets, ignore_index, classes);
  const int64_t n = counted.count();
  const auto floats = weight.options().dtype(at::kFloat);

  const auto make = [&](bool wanted, std::vector<int64_t> shape, const at::TensorOptions& options) {
    if (!wanted) shape = {0};
    return n == 0 ? at::zeros(shape, options) : empty_result(shape, options);
  };
  const Tensor grad_hidden = make(output_mask[0], {counted.all, size}, hidden.options());
  const Tensor grad_weight = make(output_mask[1], {classes, size}, weight.options());
  const Tensor grad_bias = make(output_mask[2], {classes}, floats);
  if (n == 0 || !(output_mask[0] || output_mask[1] || output_mask[2])) return {grad_hidden, grad_weight, grad_bias};

  const Tensor grads = grad_losses.to(at::kFloat).contiguous(), lse = lse_in.contiguous();
  const float *grad = grads.const_data_ptr<float>(), *lse_of_row = lse.const_data_ptr<float>();
  const Tensor terms = at::empty({5, n}, floats);
  float* term = terms.mutable_data_ptr<float>();
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = counted.rows[i];
    term[i] = lse_of_row[row];
    term[n + i] = lse_of_row[counted.all + row];
    term[2 * n + i] = grad[row];
    term[3 * n + i] = static_cast<float>(grad[row] * (1 - label_smoothing));
    term[4 * n + i] = static_cast<float>(grad[row] * label_smoothing / classes);
  }
  LinearCrossEntropyBackward p{};
  p.logits = {features_of(weight), features_of(counted.hidden), size, 1.f};
  p.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  p.targets = counted.targets.data();
  p.lse = term;
  p.lse_rest = term + n;
  p.weight = term + 2 * n;
  p.target_weight = term + 3 * n;
  p.shift = label_smoothing != 0 ? term + 4 * n : nullptr;
  if (products.size(0) > 0) p.products = products.const_data_ptr<float>();

  Tensor low_hidden;
  if (output_mask[0]) {
    p.grads.keys = grad_hidden.mutable_data_ptr();
    if (hidden.scalar_type() != at::kFloat) {
      low_hidden = at::empty({n, size}, hidden.options().dtype(at::kShort));
      p.grads.low_keys = reinterpret_cast<uint16_t*>(low_hidden.mutable_data_ptr<int16_t>());
    }
  }
  if (output_mask[1]) p.grads.queries = grad_weight.mutable_data_ptr();
  if (output_mask[2]) p.grad_bias = grad_bias.mutable_data_ptr<float>();
  const LinearCrossEntropyKernels& kernels = linear_cross_entropy_kernels_here();
  run(kernels.backward, p, kernels.tiling(p.logits, true, at::get_num_threads()), floats);
  if (output_mask[0] && n < counted.all) spread_rows(grad_hidden, counted.rows);
  return {grad_hidden, grad_weight, grad_bias};
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("linear_cross_entropy_cpu_forward", &forward);
  library.impl("linear_cross_entropy_cpu_backward", &backward);
}

}  // namespace linear_cross_entropy
}  // namespace mmkernels
