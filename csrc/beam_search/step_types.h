// A step of beam search and what follows it, as every backend's kernels take them: plain data.
#pragma once

#include <cstdint>

#include "../common/tiles_types.h"

namespace mmkernels {

// A softmax's terms are added in float32 where they are kSumColumns apart in a block of kSumRows x kSumColumns = 128,
// and exactly from there on: log_sums in reference.py.
constexpr int kSumRows = 8, kSumColumns = 16;

struct BeamStep {
  const void* logits;  // [items x beams, vocabulary]
  Dtype dtype;
  int64_t row_stride, forbidden_stride;
  const bool* forbidden;  // [items x beams, vocabulary], or null
  const float* scores;    // [items, beams]
  const bool* valid;      // [items, beams], or null
  int64_t items, beams, vocabulary, candidates;
  bool normalize, mask_first;
  float* out_scores;                // [items, candidates]
  int64_t *out_beams, *out_tokens;  // [items, candidates]
  bool *out_valid, *out_poisoned;   // [items, candidates], [items]
};

// What follows a step: beam_search_advance in reference.py, whose Progress and Rule these are.
struct BeamAdvance {
  int64_t items, beams, candidates;
  const float* scores;  // [items, candidates], as are the next three
  const int64_t *found_beams, *tokens;
  const bool *valid, *poisoned;         // the second [items]
  float *best_scores, *best_log_probs;  // [items, beams], as are the next four
  int64_t *best_times, *best_beams, *best_tokens;
  bool* best_valid;
  int64_t *counts, *faults;  // [items], as are the next three
  bool* done;
  float* missed;
  bool* top_ended;
  const int64_t* eos;
  int64_t num_eos;
  const float* penalties;  // [max_length + 1]
  int64_t step, max_length, stop, bound_length, target, num_return;
  bool cuts, first_come;
  float* next_scores;  // [items, beams], as are the next three
  int64_t *next_parents, *next_tokens;
  bool* next_valid;
};

}  // namespace mmkernels
