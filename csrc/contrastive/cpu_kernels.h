// What the tile engine of the contrastive losses takes and gives: plain data, so that its variants, one for each
// instruction set, need no torch header.
#pragma once

#include <atomic>
#include <cstdint>

#include "../common/tiles_types.h"

namespace mmkernels {

// The logits are scale * queries keys^T. They are cut into panels of queries and chunks of keys; a tile is one of each.
struct Logits {
  Features queries;  // [n, size]
  Features keys;     // [m, size]
  int64_t size;
  float scale;
};

struct Tiling {
  int64_t rows, cols;  // of a tile
  int64_t panels, chunks;
  int64_t threads;         // that the wavefront can keep busy within the memory allowed
  int64_t scratch_floats;  // of each thread
};

// Order without locks: threads take panels in turn, and each walks the chunks from the first to the last. What belongs
// to a chunk (statistics of columns, gradients of keys) is updated by panel 0, then panel 1, ...: `done` counts the
// panels that have passed. One copy serves all threads, and the sums do not depend on how many there are.
struct Wavefront {
  std::atomic<int64_t> next_panel{0};
  std::atomic<int32_t>* done;  // [chunks], zeros
};

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
  // Outputs, in the dtype of the features; null: not wanted.
  void* grad_queries;  // [n, size]
  void* grad_keys;     // [m, size]
  uint16_t* low_keys;  // [m, size], the low halves of grad_keys until it is complete; null for float32
  double* grad_scale;  // [panels], the parts of d loss / d scale
};

struct ContrastiveKernels {
  const char* name;
  Tiling (*tiling)(const Logits&, bool backward, int64_t threads);
  // The work of one thread: call it from as many as the tiling says, each with its own scratch.
  void (*info_nce_forward)(const InfoNceForward&, const Tiling&, Wavefront&, float* scratch);
  void (*info_nce_backward)(const InfoNceBackward&, const Tiling&, Wavefront&, float* scratch);
};

}  // namespace mmkernels
