// Runs the tile engine from the torch side: threads and scratch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "engine_types.h"

namespace mmkernels {

// Runs one pass of the engine on all the threads that it can keep busy.
template <class Pass, class Problem>
void run(Pass pass, const Problem& problem, const Tiling& tiling, const at::TensorOptions& floats) {
  const at::Tensor scratch = at::empty({tiling.threads * tiling.scratch_floats}, floats);
  float* parts = scratch.mutable_data_ptr<float>();
  std::vector<std::atomic<int32_t>> done(tiling.chunks);
  Wavefront wave;
  wave.done = done.data();
  at::parallel_for(0, tiling.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pass(problem, tiling, wave, parts + i * tiling.scratch_floats);
  });
}

}  // namespace mmkernels
