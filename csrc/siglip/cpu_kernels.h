// The sigmoid loss on the tile engine: plain data, so that its variants, one for each instruction set, need no torch
// header.
#pragma once

#include "../common/engine_types.h"

namespace mmkernels {

struct SigmoidPass {
  Logits logits;
  float bias;
  int64_t match_offset;  // key i + match_offset matches query i, if there is one
  float* losses;         // [n], the sum over the keys; null: not wanted
  // The gradients alone need the rest.
  const float* weights;  // [n], the gradient of each loss
  Gradients grads;
  double *grad_scale, *grad_bias;  // [panels], their parts; null: not wanted
};

struct SigmoidKernels {
  Tiling (*tiling)(const Logits&, bool backward, int64_t threads);
  // Each does the work of one thread: call it from as many as the tiling says, each with its own scratch.
  void (*losses)(const SigmoidPass&, const Tiling&, Wavefront&, float* scratch);
  void (*gradients)(const SigmoidPass&, const Tiling&, Wavefront&, float* scratch);
};

}  // namespace mmkernels
