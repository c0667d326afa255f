// Distillation on the tile engine: plain data, so that its variants, one for each instruction set, need no torch
// header.
#pragma once

#include "../common/engine_types.h"
#include "../common/softmax_types.h"

namespace mmkernels {

// What each row or column has.
struct DistillationSums {
  float *largest, *sum;                  // of the student: the largest logit s, the sum of e^(s - largest)
  float *teacher_largest, *teacher_sum;  // of the teacher: the same of its logits t
  float* weighted;                       // the sum of e^(t - teacher_largest) (s - largest)
};

struct DistillationForward {
  Logits logits, teacher;  // of the same numbers of rows
  bool columns;            // gather the sums of the columns too
  DistillationSums row, col;
  float* positive;                     // [n], the student's logit of query i and key i
  float *products, *teacher_products;  // [m, n], keys queries^T for the backward pass; null: not kept
};

struct DistillationBackward {
  Logits logits, teacher;
  // d loss / d logit (i, j) = row.weight[i] p_row(i, j) + col.weight[j] p_col(i, j) - positive_weight[i] [i = j]
  //                           - the same two terms of the teacher, p = e^(logit - lse)
  SoftmaxWeights row, teacher_row;           // [n]
  SoftmaxWeights col, teacher_col;           // [m]; null: rows alone
  const float* positive_weight;              // [n]
  const float *products, *teacher_products;  // [m, n] of the forward pass, or null
  Gradients grads;
  double* grad_scale;  // [panels], the parts of d loss / d scale; null: not wanted
};

struct DistillationKernels {
  Tiling (*tiling)(const Logits&, const Logits& teacher, bool backward, int64_t threads);
  // Each does the work of one thread: call it from as many as the tiling says, each with its own scratch.
  void (*forward)(const DistillationForward&, const Tiling&, Wavefront&, float* scratch);
  void (*backward)(const DistillationBackward&, const Tiling&, Wavefront&, float* scratch);
};

}  // namespace mmkernels
