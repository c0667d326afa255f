// Softmaxes in gradients: plain data, for code compiled for any instruction set.
#pragma once

namespace mmkernels {

// Of each row or column: what its softmax e^(logit - lse) counts for in the gradient. An lse is the sum of two floats:
// at logits of 100 one alone would put 4e-6 of noise on every probability.
struct SoftmaxWeights {
  const float *lse, *lse_rest, *weight;
};

}  // namespace mmkernels
