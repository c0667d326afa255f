// The triplet loss on the tile engine: plain data, so that its variants, one for each instruction set, need no torch
// header. Rows are queries, columns keys; key i is the positive of query i, and column i < n has the other queries for
// its negatives.
#pragma once

#include "../common/engine_types.h"

namespace mmkernels {

// The hinges max(0, s(i, j) - positive + margin) of all negatives, and the gradient of their weighted sum.
struct TripletHinges {
  Logits logits;           // scale: of the gradients
  const float* positives;  // [n], s(i, i)
  float margin;
  bool columns;          // the columns' hinges too
  const float* weights;  // [n], of row i's and column i's hinges; for the gradients
  // Outputs, [n]: the sums of the hinges of a row and of a column; for the gradients how many of them are above 0.
  double *row_sum, *col_sum;
  float *row_count, *col_count;
  // The gradients lack the share of the positives, which is known when the last hinge is.
  Gradients grads;
};

// The worst negative of every row and column.
struct TripletWorst {
  Logits logits;
  const float* positives;
  float margin;
  bool columns;
  bool semi_hard;  // of those within the margin below the positive alone
  // Outputs, [n]: the largest similarity, -infinity where there is no negative, infinity for a NaN; and where it is.
  float *row_best, *col_best;
  int32_t *row_index, *col_index;
};

// A sparse matrix: the entries of row i are those from starts[i] to starts[i + 1].
struct SparseRows {
  const int64_t* starts;
  const int32_t* columns;
  const float* values;
};

struct TripletKernels {
  Tiling (*tiling)(const Logits&, bool backward, int64_t threads);
  // The similarities of queries [row0, row0 + rows) and the keys that match them: the very bits of the tiles.
  void (*positives)(const Logits&, const int64_t* own, int64_t row0, int64_t rows, float* out);
  // Each does the work of one thread: call it from as many as the tiling says, each with its own scratch.
  void (*hinges)(const TripletHinges&, const Tiling&, Wavefront&, float* scratch);
  void (*hinge_gradients)(const TripletHinges&, const Tiling&, Wavefront&, float* scratch);
  void (*worst)(const TripletWorst&, const Tiling&, Wavefront&, float* scratch);
  // grads[i] -= weights[i] x[i], for rows [begin, end).
  void (*subtract_rows)(const Features& x, const float* weights, int64_t begin, int64_t end, int64_t size,
                        float* grads);
  // out = matrix x, in the dtype of x, for rows [begin, end).
  void (*multiply_sparse)(const SparseRows& matrix, const Features& x, int64_t begin, int64_t end, int64_t size,
                          void* out);
};

}  // namespace mmkernels
