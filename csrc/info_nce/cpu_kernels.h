// InfoNCE on the tile engine: plain data, so that its variants, one for each instruction set, need no torch header.
#pragma once

#include "../common/engine_types.h"
#include "../common/softmax_types.h"

namespace mmkernels {

// The positives of each key where it may have several: the queries of its group.
struct Positives {
  const int64_t* queries;        // by group, and ascending within one; null: one positive a query, its target
  const int64_t *first, *after;  // [m], the key's part of them
};

struct InfoNceForward {
  Logits logits;
  const int64_t* targets;  // [n], or null for the diagonal
  Positives positives;
  bool columns;  // gather the statistics of the columns too
  bool totals;   // gather the sums of the logits too (label smoothing)
  // Outputs for each row or column: the largest logit, the sum of e^(logit - largest), the sum of the logits.
  float *row_max, *row_sum, *row_total;  // [n]
  float *col_max, *col_sum, *col_total;  // [m]
  // The sum of the positives' logits; a column has one where it may have several.
  double *row_positive, *col_positive;
  float* products;  // [m, n], keys queries^T for the backward pass; null: not kept
};

struct InfoNceBackward {
  Logits logits;
  const int64_t* targets;
  Positives positives;
  // d loss / d logit (i, j) = row.weight[i] p_row(i, j) + col.weight[j] p_col(i, j) - row_shift[i] - col_shift[j]
  //                           - positive_weight[i] [j = target i], p = e^(logit - lse)
  // With several positives the last term is (positive_weight[i] + col_positive_weight[j]) [j is a positive of i].
  SoftmaxWeights row;                            // [n]
  const float *row_shift, *positive_weight;      // [n]
  SoftmaxWeights col;                            // [m]; null: rows alone
  const float *col_shift, *col_positive_weight;  // [m]
  const float* products;                         // [m, n] of the forward pass, or null
  Gradients grads;
  double* grad_scale;  // [panels], the parts of d loss / d scale; null: not wanted
};

struct InfoNceKernels {
  const char* name;
  Tiling (*tiling)(const Logits&, bool backward, int64_t threads);
  // Each does the work of one thread: call it from as many as the tiling says, each with its own scratch.
  void (*info_nce_forward)(const InfoNceForward&, const Tiling&, Wavefront&, float* scratch);
  void (*info_nce_backward)(const InfoNceBackward&, const Tiling&, Wavefront&, float* scratch);
};

}  // namespace mmkernels
