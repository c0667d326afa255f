// siglip on CPU tensors: allocation and threads; the tiles are in cpu_kernels.cpp.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "../common/dispatch.h"
#include "../common/engine_run.h"
#include "../common/tensors.h"
#include "cpu_kernels.h"

namespace mmkernels {

MMK_VARIANTS(SigmoidKernels, sigmoid_kernels)

namespace siglip {

using at::Tensor;

void check_inputs(const Tensor& queries, const Tensor& keys, const Tensor& scale, const Tensor& bias) {
  check_pairs(queries, keys);
  check_scalar("scale", scale);
  check_scalar("bias", bias);
}

SigmoidPass pass_over(const Tensor& queries, const Tensor& keys, const Tensor& scale, const Tensor& bias,
                      int64_t match_offset) {
  SigmoidPass p{};
  p.logits = {features_of(queries), features_of(keys), queries.size(1), scale.item<float>()};
  p.bias = bias.item<float>();
  p.match_offset = match_offset;
  return p;
}

Tensor losses(const Tensor& queries_in, const Tensor& keys_in, const Tensor& scale, const Tensor& bias,
              int64_t match_offset) {
  check_inputs(queries_in, keys_in, scale, bias);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const auto floats = queries.options().dtype(at::kFloat);
  const Tensor losses = at::empty({queries.size(0)}, floats);
  SigmoidPass p = pass_over(queries, keys, scale, bias, match_offset);
  p.losses = losses.mutable_data_ptr<float>();
  const SigmoidKernels& kernels = sigmoid_kernels_here();
  run(kernels.losses, p, kernels.tiling(p.logits, false, at::get_num_threads()), floats);
  return losses;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gradients(const Tensor& weights_in, const Tensor& queries_in,
                                                             const Tensor& keys_in, const Tensor& scale,
                                                             const Tensor& bias, bool with_losses, int64_t match_offset,
                                                             bool in_float32, std::array<bool, 4> output_mask) {
  check_inputs(queries_in, keys_in, scale, bias);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const int64_t n = queries.size(0), m = keys.size(0), size = queries.size(1);
  TORCH_CHECK_VALUE(weights_in.dim() == 1 && weights_in.size(0) == n, "weights: expected [N], got ",
                    weights_in.sizes());
  const auto floats = queries.options().dtype(at::kFloat);
  const Tensor weights = weights_in.to(at::kFloat).contiguous();

  const auto make = [](bool wanted, std::vector<int64_t> shape, const at::TensorOptions& options) {
    if (!wanted) shape = {0};
    return empty_result(shape, options);
  };
  const Tensor losses = make(with_losses, {n}, floats);
  const auto of_features = in_float32 ? floats : queries.options();
  const Tensor grad_queries = make(output_mask[0], {n, size}, of_features);
  const Tensor grad_keys = make(output_mask[1], {m, size}, of_features);

  SigmoidPass p = pass_over(queries, keys, scale, bias, match_offset);
  p.weights = weights.const_data_ptr<float>();
  if (with_losses) p.losses = losses.mutable_data_ptr<float>();
  const SigmoidKernels& kernels = sigmoid_kernels_here();
  const Tiling tiling = kernels.tiling(p.logits, true, at::get_num_threads());
  std::vector<double> scale_parts(tiling.panels), bias_parts(tiling.panels);
  p.grads.in_float32 = in_float32;
  const Tensor low_keys = point_to(p.grads, output_mask[0], grad_queries, output_mask[1], grad_keys);
  if (output_mask[2]) p.grad_scale = scale_parts.data();
  if (output_mask[3]) p.grad_bias = bias_parts.data();
  run(kernels.gradients, p, tiling, floats);

  return {losses, grad_queries, grad_keys, sum_of_panels(scale_parts, output_mask[2], floats),
          sum_of_panels(bias_parts, output_mask[3], floats)};
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("siglip_cpu_losses", &losses);
  library.impl("siglip_cpu_gradients", &gradients);
}

}  // namespace siglip
}  // namespace mmkernels
