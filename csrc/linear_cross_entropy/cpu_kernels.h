// Linear cross-entropy on the tile engine: plain data, so that its variants, one for each instruction set, need no
// torch header.
//
// The panels are of the weight (the engine's queries), the chunks of the hidden rows (its keys): what is read and
// updated again for every panel is then the smaller of the two, whose gradient in half precision takes the low halves.
#pragma once

#include "../common/engine_types.h"

namespace mmkernels {

struct LinearCrossEntropyForward {
  Logits logits;           // queries: weight [V, size]; keys: hidden rows [n, size]; scale 1
  const float* bias;       // [V] or null
  const int64_t* targets;  // [n]
  bool totals;             // gather the sums of the logits too (label smoothing)
  // Outputs, [n]: the largest logit, the sum of e^(logit - largest), the sum of the logits, the target's logit.
  float *largest, *sum, *total, *positive;
  float* products;  // [n, V], hidden weight^T for the backward pass; null: not kept
};

struct LinearCrossEntropyBackward {
  Logits logits;
  const float* bias;
  const int64_t* targets;
  // d loss / d logit (i, j) = weight[i] e^(logit - lse[i]) - shift[i] - target_weight[i] [j = target i]
  // An lse is the sum of two floats: at logits of 100 one alone would put 4e-6 of noise on every probability.
  const float *lse, *lse_rest, *weight, *target_weight, *shift;  // [n]; shift null: no smoothing
  const float* products;                                         // [n, V] of the forward pass, or null
  Gradients grads;
  float* grad_bias;  // [V]; null: not wanted
};

struct LinearCrossEntropyKernels {
  Tiling (*tiling)(const Logits&, bool backward, int64_t threads);
  // Each does the work of one thread: call it from as many as the tiling says, each with its own scratch.
  void (*forward)(const LinearCrossEntropyForward&, const Tiling&, Wavefront&, float* scratch);
  void (*backward)(const LinearCrossEntropyBackward&, const Tiling&, Wavefront&, float* scratch);
};

}  // namespace mmkernels
