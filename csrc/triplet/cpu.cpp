// triplet on CPU tensors: allocation, threads and the O(N) part; the tiles are in cpu_kernels.cpp.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/dispatch.h"
#include "../common/engine_run.h"
#include "../common/tensors.h"
#include "cpu_kernels.h"

namespace mmkernels {

MMK_VARIANTS(TripletKernels, triplet_kernels)

namespace triplet {

using at::Tensor;
using std::optional;

// The fewest rows that are worth a thread: two panels of AVX-512 (32 rows), and whole panels of the other sets (16, 8).
constexpr int64_t kRowsOfThread = 64;

void check_inputs(const Tensor& queries, const Tensor& keys) {
  check_pairs(queries, keys);
  TORCH_CHECK_VALUE(queries.size(0) <= keys.size(0) && keys.size(0) <= std::numeric_limits<int32_t>::max(),
                    "queries, keys: expected N <= M < 2^31, got ", queries.size(0), " and ", keys.size(0));
}

// Each direction counts for this share of a row's loss.
float share_of(bool symmetric) {
  return symmetric ? 0.5f : 1.f;
}

// Returns the similarities of the matching rows, [n].
Tensor positives_of(const Logits& x, const at::TensorOptions& floats) {
  const Tensor positives = at::empty({x.queries.rows}, floats);
  float* out = positives.mutable_data_ptr<float>();
  std::vector<int64_t> own(x.queries.rows);
  std::iota(own.begin(), own.end(), 0);
  at::parallel_for(0, (x.queries.rows + kRowsOfThread - 1) / kRowsOfThread, 1, [&](int64_t begin, int64_t end) {
    begin *= kRowsOfThread;
    end = std::min(end * kRowsOfThread, x.queries.rows);
    triplet_kernels_here().positives(x, own.data(), begin, end - begin, out);
  });
  return positives;
}

// Sums over all negatives: the losses, and the gradients if p has what they need.
Tensor sum_hinges(TripletHinges& p, bool gradients, const at::TensorOptions& floats) {
  const int64_t n = p.logits.queries.rows;
  const Tensor sums = at::empty({2, n}, floats.dtype(at::kDouble)), positives = positives_of(p.logits, floats);
  p.positives = positives.const_data_ptr<float>();
  p.row_sum = sums.mutable_data_ptr<double>();
  p.col_sum = p.row_sum + n;
  const TripletKernels& kernels = triplet_kernels_here();
  run(gradients ? kernels.hinge_gradients : kernels.hinges, p,
      kernels.tiling(p.logits, gradients, at::get_num_threads()), floats);
  const Tensor losses = at::empty({n}, floats);
  float* loss = losses.mutable_data_ptr<float>();
  for (int64_t i = 0; i < n; ++i)
    loss[i] = static_cast<float>(share_of(p.columns) * (p.row_sum[i] + (p.columns ? p.col_sum[i] : 0.)));
  return losses;
}

// Finds the worst negatives of rows and columns: the losses, and where they are, -1 where no hinge is above 0.
std::tuple<Tensor, Tensor> find_worst(TripletWorst& p, const at::TensorOptions& floats) {
  const int64_t n = p.logits.queries.rows, m = p.logits.keys.rows, directions = p.columns ? 2 : 1;
  const Tensor best = at::empty({directions, n}, floats), positives = positives_of(p.logits, floats);
  const Tensor index = at::empty({directions, n}, floats.dtype(at::kInt));
  p.positives = positives.const_data_ptr<float>();
  p.row_best = best.mutable_data_ptr<float>();
  p.row_index = index.mutable_data_ptr<int32_t>();
  p.col_best = p.columns ? p.row_best + n : nullptr;
  p.col_index = p.columns ? p.row_index + n : nullptr;
  const TripletKernels& kernels = triplet_kernels_here();
  run(kernels.worst, p, kernels.tiling(p.logits, false, at::get_num_threads()), floats);

  const Tensor losses = at::empty({n}, floats);
  float* loss = losses.mutable_data_ptr<float>();
  // The hinge of the worst of `negatives`, rounded as the tiles round it. A worst negative at minus infinity is one
  // like others, and its hinge NaN where the positive lies there, too; as a semi-hard one it counts beside NaN alone.
  const auto hinge = [&](float value, int32_t& at, float positive, int64_t negatives) {
    const bool none =
        negatives == 0 || (p.semi_hard && value == -std::numeric_limits<float>::infinity() && positive == positive);
    if (value == std::numeric_limits<float>::infinity()) value = std::numeric_limits<float>::quiet_NaN();
    const float above = (value - positive) + p.margin;
    const bool counts = !none && !(above <= 0.f);
    if (!counts) at = -1;
    return counts ? above : 0.f;
  };
  for (int64_t i = 0; i < n; ++i) {
    loss[i] = hinge(p.row_best[i], p.row_index[i], p.positives[i], m - 1);
    if (p.columns) loss[i] = (loss[i] + hinge(p.col_best[i], p.col_index[i], p.positives[i], n - 1)) * share_of(true);
  }
  return {losses, index};
}

std::tuple<Tensor, Tensor> forward(const Tensor& queries_in, const Tensor& keys_in, double margin,
                                   c10::string_view mining, bool symmetric) {
  check_inputs(queries_in, keys_in);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const auto floats = queries.options().dtype(at::kFloat);
  const Logits similarities{features_of(queries), features_of(keys), queries.size(1), 1.f};
  if (mining == "all") {
    TripletHinges p{};
    p.logits = similarities;
    p.margin = static_cast<float>(margin);
    p.columns = symmetric;
    return {sum_hinges(p, false, floats), at::empty({symmetric ? 2 : 1, 0}, floats.dtype(at::kInt))};
  }
  TripletWorst p{};
  p.logits = similarities;
  p.margin = static_cast<float>(margin);
  p.columns = symmetric;
  p.semi_hard = mining == "semi_hard";
  return find_worst(p, floats);
}

std::tuple<Tensor, Tensor, Tensor> hinge_gradients(const Tensor& queries_in, const Tensor& keys_in,
                                                   const optional<Tensor>& weights_in, double margin, bool symmetric,
                                                   std::array<bool, 2> output_mask) {
  check_inputs(queries_in, keys_in);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const int64_t n = queries.size(0), m = keys.size(0), size = queries.size(1);
  const auto floats = queries.options().dtype(at::kFloat);
  const Tensor weights = weights_in ? weights_in->to(at::kFloat).contiguous() : at::ones({n}, floats);
  const Tensor counts = at::empty({2, n}, floats);
  const Tensor grad_queries = empty_result(output_mask[0] ? at::IntArrayRef{n, size} : at::IntArrayRef{0}, floats);
  const Tensor grad_keys = empty_result(output_mask[1] ? at::IntArrayRef{m, size} : at::IntArrayRef{0}, floats);

  TripletHinges p{};
  p.logits = {features_of(queries), features_of(keys), size, share_of(symmetric)};
  p.margin = static_cast<float>(margin);
  p.columns = symmetric;
  p.weights = weights.const_data_ptr<float>();
  p.row_count = counts.mutable_data_ptr<float>();
  p.col_count = p.row_count + n;
  p.grads.in_float32 = true;
  if (output_mask[0]) p.grads.queries = grad_queries.mutable_data_ptr<float>();
  if (output_mask[1]) p.grads.keys = grad_keys.mutable_data_ptr<float>();
  const Tensor losses = sum_hinges(p, true, floats);

  // For every hinge above 0 the positive of its row or column takes the opposite of what the negative takes.
  float* of_positive = p.row_count;
  for (int64_t i = 0; i < n; ++i)
    of_positive[i] = share_of(symmetric) * p.weights[i] * (p.row_count[i] + (symmetric ? p.col_count[i] : 0.f));
  const auto subtract = [&](const Tensor& x, void* grads) {
    if (grads == nullptr) return;
    at::parallel_for(0, n, kRowsOfThread, [&](int64_t begin, int64_t end) {
      triplet_kernels_here().subtract_rows(features_of(x), of_positive, begin, end, size, static_cast<float*>(grads));
    });
  };
  subtract(keys, p.grads.queries);
  subtract(queries, p.grads.keys);
  return {losses, grad_queries, grad_keys};
}

// Collects d loss / d similarities, a sparse matrix: only the worst negatives and their positives have entries.
struct SparseGradient {
  std::vector<int32_t> rows, columns;
  std::vector<float> values;

  void add(int64_t row, int64_t column, float value) {
    rows.push_back(static_cast<int32_t>(row));
    columns.push_back(static_cast<int32_t>(column));
    values.push_back(value);
  }
};

// Multiplies the matrix, or with rows and columns exchanged its transpose, by x. It sorts the entries by row; those of
// a row keep the order in which they were added.
Tensor multiply(const std::vector<int32_t>& rows, const std::vector<int32_t>& columns, const std::vector<float>& values,
                int64_t num_rows, const Tensor& x) {
  std::vector<int64_t> starts(num_rows + 1, 0);
  for (const int32_t row : rows) ++starts[row + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  std::vector<int32_t> sorted_columns(rows.size());
  std::vector<float> sorted_values(rows.size());
  for (size_t e = 0; e < rows.size(); ++e) {
    const int64_t at = next[rows[e]]++;
    sorted_columns[at] = columns[e];
    sorted_values[at] = values[e];
  }
  const Tensor out = empty_result({num_rows, x.size(1)}, x.options());
  const SparseRows matrix{starts.data(), sorted_columns.data(), sorted_values.data()};
  at::parallel_for(0, num_rows, kRowsOfThread, [&](int64_t begin, int64_t end) {
    triplet_kernels_here().multiply_sparse(matrix, features_of(x), begin, end, x.size(1), out.mutable_data_ptr());
  });
  return out;
}

std::tuple<Tensor, Tensor> worst_gradients(const Tensor& grad_losses, const Tensor& losses_in, const Tensor& queries_in,
                                           const Tensor& keys_in, const Tensor& worst_in,
                                           std::array<bool, 2> output_mask) {
  check_inputs(queries_in, keys_in);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const Tensor grads = grad_losses.to(at::kFloat).contiguous(), losses = losses_in.contiguous();
  const Tensor worst = worst_in.contiguous();
  const int64_t n = queries.size(0);
  const bool symmetric = worst.size(0) == 2;
  const float *grad = grads.const_data_ptr<float>(), *loss = losses.const_data_ptr<float>();
  const int32_t* worst_of_row = worst.const_data_ptr<int32_t>();
  SparseGradient g;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t column = worst_of_row[i], row = symmetric ? worst_of_row[n + i] : -1;
    // 0 times a loss that is NaN carries it to the gradients.
    const float weight = share_of(symmetric) * grad[i] + 0.f * loss[i];
    if (column >= 0) g.add(i, column, weight);
    if (row >= 0) g.add(row, i, weight);
    if (column >= 0 || row >= 0) g.add(i, i, -weight * ((column >= 0) + (row >= 0)));
  }
  Tensor grad_queries = at::empty({0}, queries.options()), grad_keys = at::empty({0}, keys.options());
  if (output_mask[0]) grad_queries = multiply(g.rows, g.columns, g.values, n, keys);
  if (output_mask[1]) grad_keys = multiply(g.columns, g.rows, g.values, keys.size(0), queries);
  return {grad_queries, grad_keys};
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("triplet_cpu_forward", &forward);
  library.impl("triplet_cpu_hinge_gradients", &hinge_gradients);
  library.impl("triplet_cpu_worst_gradients", &worst_gradients);
}

}  // namespace triplet
}  // namespace mmkernels
