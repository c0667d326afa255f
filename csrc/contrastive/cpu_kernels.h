// InfoNCE on the tile engine: plain data, so that its variants, one for each instruction set, need no torch header.
#pragma once

#include "../common/engine_types.h"

namespace mmkernels {

struct InfoNceForward {
  Logits logits;
  const int64_t* targets;  // [n], or null for the diagonal
  bool columns;            // gather the statistics of the columns too
  bool totals;             // gather the sums of the logits too (label smoothing)
  // Outputs: of each row or column the largest logit, the sum of e^(logit - largest), the sum of the logits.
  float *row_max, *row_sum, *row_total, *row_positive;  // [n]
  float *col_max, *col_sum, *col_total;                 // [m]
};

struct InfoNceBackward {
  Logits logits;
  const int64_t* targets;
  // d loss / d logit (i, j) = row_weight[i] p_row(i, j) + col_weight[j] p_col(i, j) - row_shift[i] - col_shift[j]
  //                           - positive_weight[i] [j = target i], p = e^(logit - lse)
  // An lse is the sum of two floats: at logits of 100 one alone would put 4e-6 of noise on every probability.
  const float *row_lse, *row_lse_rest, *row_weight, *row_shift, *positive_weight;  // [n]
  const float *col_lse, *col_lse_rest, *col_weight, *col_shift;                    // [m]; null: rows alone
  Gradients grads;
  double* grad_scale;  // [panels], the parts of d loss / d scale; null: not wanted
};

struct ContrastiveKernels {
  const char* name;
  Tiling (*tiling)(const Logits&, bool backward, int64_t threads);
  // The work of one thread: call it from as many as the tiling says, each with its own scratch.
  void (*info_nce_forward)(const InfoNceForward&, const Tiling&, Wavefront&, float* scratch);
  void (*info_nce_backward)(const InfoNceBackward&, const Tiling&, Wavefront&, float* scratch);
};

}  // namespace mmkernels
