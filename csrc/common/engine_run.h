// Runs the tile engine from the torch side: threads and scratch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <numeric>
#include <vector>

#include "engine_types.h"

namespace mmkernels {

// Runs one pass of the engine on all the threads that it can keep busy.
template <class Pass, class Problem>
void run(Pass pass, const Problem& problem, const Tiling& tiling, const at::TensorOptions& floats) {
  const at::Tensor scratch = at::empty({tiling.threads * tiling.scratch_floats}, floats);
  float* parts = scratch.mutable_data_ptr<float>();
  const at::Tensor packed_keys = at::empty({tiling.packed_floats}, floats);
  std::vector<std::atomic<int32_t>> done(tiling.chunks), packed(tiling.chunks);
  Wavefront wave;
  wave.done = done.data();
  wave.packed = packed.data();
  if (tiling.packed_floats > 0) wave.packed_keys = packed_keys.mutable_data_ptr<float>();
  at::parallel_for(0, tiling.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pass(problem, tiling, wave, parts + i * tiling.scratch_floats);
  });
}

// Points `grads` to the gradients that are wanted. Returns the low halves of those of the keys, which half precision
// needs until the pass is over.
inline at::Tensor point_to(Gradients& grads, bool wants_queries, const at::Tensor& queries, bool wants_keys,
                           const at::Tensor& keys) {
  at::Tensor low_keys;
  if (wants_queries) grads.queries = queries.mutable_data_ptr();
  if (wants_keys) {
    grads.keys = keys.mutable_data_ptr();
    if (keys.scalar_type() != at::kFloat) {
      low_keys = at::empty(keys.sizes(), keys.options().dtype(at::kShort));
      grads.low_keys = reinterpret_cast<uint16_t*>(low_keys.mutable_data_ptr<int16_t>());
    }
  }
  return low_keys;
}

// Returns the sum of what the panels gave, or an empty tensor if it is not wanted.
inline at::Tensor sum_of_panels(const std::vector<double>& parts, bool wanted, const at::TensorOptions& floats) {
  const at::Tensor sum = at::empty(wanted ? at::IntArrayRef{} : at::IntArrayRef{0}, floats);
  if (wanted) *sum.mutable_data_ptr<float>() = static_cast<float>(std::accumulate(parts.begin(), parts.end(), 0.));
  return sum;
}

}  // namespace mmkernels
