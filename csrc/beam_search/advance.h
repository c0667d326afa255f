// What follows a step of beam search, for one item: hypotheses, bounds, the done flag and the next beams. The CPU and
// CUDA run this same code; beam_search_advance in reference.py says the same with tensors.
#pragma once

#include "step_types.h"

#ifdef __CUDACC__
#define MMK_HOST_DEVICE __host__ __device__
#else
#define MMK_HOST_DEVICE
#endif

namespace mmkernels {

// These are the numbers of specification.py: faults, and rules that stop an item.
constexpr int64_t kPoisoned = 1, kDead = 2;
constexpr int64_t kBound = 0, kCountOrTop = 2;

// Returns the larger, or a if b is NaN.
MMK_HOST_DEVICE inline float larger(float a, float b) {
  return b > a ? b : a;
}

// Puts a hypothesis behind its equals among the item's best, best first; what is pushed out is lost. One of -inf
// stands before places that hold none.
MMK_HOST_DEVICE inline void place_hypothesis(const BeamAdvance& a, int64_t item, float total, int64_t candidate) {
  const int64_t first = item * a.beams, after = first + a.beams;
  int64_t place = after;
  while (place > first && (!a.best_valid[place - 1] || a.best_scores[place - 1] < total)) --place;
  if (place == after) return;
  for (int64_t i = after - 1; i > place; --i) {
    a.best_scores[i] = a.best_scores[i - 1];
    a.best_log_probs[i] = a.best_log_probs[i - 1];
    a.best_times[i] = a.best_times[i - 1];
    a.best_beams[i] = a.best_beams[i - 1];
    a.best_tokens[i] = a.best_tokens[i - 1];
    a.best_valid[i] = a.best_valid[i - 1];
  }
  a.best_scores[place] = total;
  a.best_log_probs[place] = a.scores[candidate];
  a.best_times[place] = a.step;
  a.best_beams[place] = a.found_beams[candidate];
  a.best_tokens[place] = a.tokens[candidate];
  a.best_valid[place] = true;
}

MMK_HOST_DEVICE inline void advance_item(const BeamAdvance& a, int64_t item) {
  constexpr float kNone = -__builtin_huge_valf();
  const int64_t first = item * a.beams, first_candidate = item * a.candidates;
  const bool last = a.step == a.max_length - 1, was_done = a.done[item];
  int64_t count = a.counts[item], going = 0;
  float cut_off = kNone;  // the best score that is turned away
  bool any_valid = false, top_ended = a.top_ended[item];
  for (int64_t c = 0; c < a.candidates; ++c) {
    const int64_t at = first_candidate + c;
    if (!a.valid[at]) continue;
    any_valid = true;
    bool ends = last && a.cuts;
    for (int64_t e = 0; e < a.num_eos; ++e) ends = ends || a.tokens[at] == a.eos[e];
    if (!ends) {
      if (going == a.beams) continue;
      a.next_scores[first + going] = a.scores[at];
      a.next_parents[first + going] = a.found_beams[at];
      a.next_tokens[first + going] = a.tokens[at];
      ++going;
      continue;
    }
    if (c >= a.beams || was_done) continue;
    if (c == 0) top_ended = true;
    const float total = a.scores[at] / a.penalties[a.step + 1];
    if (a.first_come && count >= a.target) {
      cut_off = larger(cut_off, total);
    } else {
      ++count;
      place_hypothesis(a, item, total, at);
    }
  }
  for (int64_t i = first + going; i < first + a.beams; ++i) {
    a.next_scores[i] = kNone;
    a.next_parents[i] = a.next_tokens[i] = 0;
  }

  bool stops = a.poisoned[item] || going == 0 || last;
  const float top = going > 0 ? a.next_scores[first] : kNone;
  if (a.stop == kBound)
    stops = stops || (count >= a.beams && top / a.penalties[a.bound_length] <= a.best_scores[first + a.beams - 1]);
  else
    stops = stops || count >= a.target || (a.stop == kCountOrTop && top_ended && count >= a.num_return);
  if (!was_done) {
    if (a.poisoned[item])
      a.faults[item] = kPoisoned;
    else if (!any_valid && a.faults[item] == 0)
      a.faults[item] = kDead;
    if (stops) {
      if (!last) {  // a beam that still runs could end one step later, or at the end
        cut_off = larger(cut_off, top / a.penalties[a.step + 2]);
        cut_off = larger(cut_off, top / a.penalties[a.max_length]);
      }
      a.missed[item] = cut_off;
      a.done[item] = true;
    }
    a.counts[item] = count;
    a.top_ended[item] = top_ended;
  }
  for (int64_t i = 0; i < a.beams; ++i) a.next_valid[first + i] = i < going && !was_done && !stops;
}

}  // namespace mmkernels
