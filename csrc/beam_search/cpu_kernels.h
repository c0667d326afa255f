// What the step of beam search reads of one row of logits: plain data, so that its variants, one for each instruction
// set, need no torch header.
#pragma once

#include <cstdint>

#include "../common/tiles_types.h"

namespace mmkernels {

struct BeamRows {
  const void* logits;
  Dtype dtype;
  int64_t row_stride, vocabulary;
  const bool* forbidden;  // or null
  int64_t forbidden_stride;
  bool normalize, mask_first;
  int64_t keep;  // the most candidates that a row can place

  const void* row(int64_t i) const { return static_cast<const char*>(logits) + i * row_stride * bytes_of(dtype); }
};

// The best entries of a row, higher logits first and of equal ones the lower token, with the largest logit and the sum
// of its softmax.
struct BeamRow {
  float* logits;    // [keep]
  int32_t* tokens;  // [keep]
  int64_t count;
  float largest;
  double sum;
  bool poisoned;  // NaN or +inf
};

struct BeamKernels {
  const char* name;
  // How many floats of scratch each thread needs.
  int64_t (*scratch_floats)(int64_t vocabulary);
  void (*row)(const BeamRows&, int64_t index, BeamRow& out, float* scratch);
};

}  // namespace mmkernels
