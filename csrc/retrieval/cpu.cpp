// retrieval_ranks and retrieval_topk on CPU tensors: allocation, the parts of the keys, and what is linear in the
// results; the tiles are in cpu_kernels.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/dispatch.h"
#include "../common/engine_types.h"
#include "../common/tensors.h"
#include "cpu_kernels.h"

namespace mmkernels {

MMK_VARIANTS(RetrievalKernels, retrieval_kernels)

namespace retrieval {

using at::Tensor;
using std::optional;

void check_inputs(const Tensor& queries, const Tensor& keys) {
  TORCH_CHECK_VALUE(queries.dim() == 2 && keys.dim() == 2 && queries.size(1) == keys.size(1) && queries.size(1) > 0 &&
                        queries.size(0) > 0 && keys.size(0) > 0,
                    "queries, keys: expected [N, D] and [M, D] with N, M, D >= 1, got ", queries.sizes(), " and ",
                    keys.sizes());
  TORCH_CHECK_TYPE(queries.scalar_type() == keys.scalar_type() &&
                       (queries.scalar_type() == at::kFloat || queries.scalar_type() == at::kBFloat16 ||
                        queries.scalar_type() == at::kHalf),
                   "queries, keys: expected float32, bfloat16 or float16, one for both, got ", queries.scalar_type(),
                   " and ", keys.scalar_type());
  TORCH_CHECK_VALUE(keys.size(0) <= std::numeric_limits<int32_t>::max(), "keys: expected M below 2^31, got ",
                    keys.size(0));
}

// The keys in equal parts of whole chunks: more than one where the queries make fewer panels than there are threads.
struct Parts {
  Logits scores;
  Tiling tiling;
  int64_t count, keys_each;

  Parts(const Logits& x, const Tiling& t, int64_t result_bytes) : scores(x), tiling(t) {
    // Scratch stays within the size of the inputs or of the results, or 64 MiB.
    const int64_t inputs = (x.queries.rows + x.keys.rows) * x.size * bytes_of(x.queries.dtype);
    const int64_t allowed = std::max({inputs, result_bytes, int64_t{64} << 20}) / (t.scratch_floats * 4);
    const int64_t threads = std::clamp<int64_t>(at::get_num_threads(), 1, std::max<int64_t>(1, allowed));
    tiling.threads = std::min(t.threads, threads);
    const int64_t chunks_each = (t.chunks - 1) / std::min(threads / tiling.threads, t.chunks) + 1;
    count = (t.chunks + chunks_each - 1) / chunks_each;
    keys_each = chunks_each * t.cols;
    tiling.chunks = chunks_each;
  }

  // Runs a pass on every part. problem_of(scores of the part, its first key, its number) makes the pass's problem.
  template <class Pass, class ProblemOf>
  void run(Pass pass, const at::TensorOptions& floats, const ProblemOf& problem_of) const {
    const Tensor scratch = at::empty({count * tiling.threads * tiling.scratch_floats}, floats);
    float* shares = scratch.mutable_data_ptr<float>();
    std::vector<Wavefront> waves(count);
    at::parallel_for(0, count * tiling.threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % count, first = part * keys_each;
        Logits mine = scores;
        mine.keys.data = scores.keys.row(first);
        mine.keys.rows = std::min(keys_each, scores.keys.rows - first);
        Tiling t = tiling;
        t.chunks = (mine.keys.rows + t.cols - 1) / t.cols;
        pass(problem_of(mine, first, part), t, waves[part], shares + i * tiling.scratch_floats);
      }
    });
  }
};

Tensor ranks(const Tensor& queries_in, const Tensor& keys_in, const optional<Tensor>& targets_in) {
  check_inputs(queries_in, keys_in);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const int64_t n = queries.size(0), m = keys.size(0);
  Tensor targets;
  if (targets_in) {
    TORCH_CHECK_VALUE(targets_in->dim() == 1 && targets_in->size(0) == n, "targets: expected [", n, "], got ",
                      targets_in->sizes());
    TORCH_CHECK_TYPE(targets_in->scalar_type() == at::kLong, "targets: expected int64, got ",
                     targets_in->scalar_type());
    targets = targets_in->contiguous();
    const int64_t* t = targets.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i)
      TORCH_CHECK_VALUE(0 <= t[i] && t[i] < m, "targets: expected indices of the ", m, " keys, 0 to ", m - 1, ", got ",
                        t[i]);
  } else {
    TORCH_CHECK_VALUE(n <= m, "targets: expected indices of the keys, as ", n, " queries and ", m,
                      " keys do not match one to one");
  }

  const Logits scores{features_of(queries), features_of(keys), queries.size(1), 1.f};
  const RetrievalKernels& kernels = retrieval_kernels_here();
  const Parts parts(scores, kernels.ranks_tiling(scores, at::get_num_threads()), n * 8);
  const Tensor counts = at::empty({parts.count, n}, queries.options().dtype(at::kInt));
  int32_t* count = counts.mutable_data_ptr<int32_t>();
  parts.run(kernels.ranks, queries.options().dtype(at::kFloat), [&](const Logits& mine, int64_t first, int64_t part) {
    return RetrievalRanks{mine, first, scores.keys, targets.defined() ? targets.const_data_ptr<int64_t>() : nullptr,
                          count + part * n};
  });

  const Tensor result = at::empty({n}, queries.options().dtype(at::kLong));
  int64_t* rank = result.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    rank[i] = count[i] < 0 ? m : 0;
    for (int64_t part = 0; part < parts.count && count[i] >= 0; ++part) rank[i] += count[part * n + i];
  }
  return result;
}

// Puts the k best of all parts' best into those of the first part.
void merge(uint64_t* best, int64_t part_stride, int64_t parts, int64_t k, std::vector<uint64_t>& all) {
  all.resize(parts * k);
  for (int64_t part = 0; part < parts; ++part)
    std::copy(best + part * part_stride, best + part * part_stride + k, all.begin() + part * k);
  std::partial_sort(all.begin(), all.begin() + k, all.end(), std::greater<>());
  std::copy(all.begin(), all.begin() + k, best);
}

std::tuple<Tensor, Tensor> topk(const Tensor& queries_in, const Tensor& keys_in, int64_t k) {
  check_inputs(queries_in, keys_in);
  const Tensor queries = with_contiguous_rows(queries_in), keys = with_contiguous_rows(keys_in);
  const int64_t n = queries.size(0), m = keys.size(0);
  TORCH_CHECK_VALUE(1 <= k && k <= m, "k: expected 1 to ", m, ", the number of keys, got ", k);

  const Logits scores{features_of(queries), features_of(keys), queries.size(1), 1.f};
  const RetrievalKernels& kernels = retrieval_kernels_here();
  // A list is cut to k entries when it has twice as many: a cut takes time in proportion to the list.
  const int64_t capacity = std::min(m, k + std::max<int64_t>(k, 24));
  const Parts parts(scores, kernels.topk_tiling(scores, capacity, at::get_num_threads()), n * k * 12);
  const Tensor found = empty_result({n, k}, queries.options().dtype(at::kFloat));
  const Tensor where = empty_result({n, k}, queries.options().dtype(at::kLong));
  // The entries of a single part lie where the indices will; several parts take a tensor of their own.
  const Tensor others = at::empty({(parts.count > 1 ? parts.count : 0) * n * k}, where.options());
  int64_t* index = where.mutable_data_ptr<int64_t>();
  uint64_t* best = reinterpret_cast<uint64_t*>(parts.count > 1 ? others.mutable_data_ptr<int64_t>() : index);
  parts.run(kernels.topk, found.options(), [&](const Logits& mine, int64_t first, int64_t part) {
    return RetrievalTopk{mine, first, k, capacity, best + part * n * k};
  });

  float* score = found.mutable_data_ptr<float>();
  at::parallel_for(0, n, std::max<int64_t>(1, 16384 / k), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> all;
    for (int64_t i = begin; i < end; ++i) {
      if (parts.count > 1) merge(best + i * k, n * k, parts.count, k, all);
      for (int64_t j = i * k; j < (i + 1) * k; ++j) {
        const uint64_t entry = best[j];
        score[j] = score_of(entry);
        index[j] = score[j] == score[j] ? key_of(entry) : -1;
      }
    }
  });
  return {found, where};
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("retrieval_ranks_cpu", &ranks);
  library.impl("retrieval_topk_cpu", &topk);
}

}  // namespace retrieval
}  // namespace mmkernels
