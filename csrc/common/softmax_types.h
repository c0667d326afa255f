// The softmaxes that gradients need, as plain data for code compiled for any instruction set.
#pragma once

namespace mmkernels {

// Each row or column has a softmax, e^(logit - lse), and a weight that it counts for in the gradient. An lse is the sum
// of two floats: at logits of 100 one float alone is off by up to 2^-18 = 4e-6, and so would be every probability.
struct SoftmaxWeights {
  const float *lse, *lse_rest, *weight;
};

}  // namespace mmkernels
