// Ranks and best keys on the tile engine: plain data, so that its variants, one for each instruction set, need no torch
// header.
//
// A problem is one part of the keys: where there are few queries, the threads share out the keys.
#pragma once

#include "../common/engine_types.h"

namespace mmkernels {

struct RetrievalRanks {
  Logits scores;           // queries [n, size]; keys: those of the part; scale 1
  int64_t first_key;       // of the part
  Features keys;           // all of them
  const int64_t* targets;  // [n], of all keys; null: i
  int32_t* counts;         // [n]: the keys of the part before the target; -1: the target's score is NaN
};

struct RetrievalTopk {
  Logits scores;
  int64_t first_key;
  int64_t k;
  int64_t capacity;  // entries of a row's list, k and more
  uint64_t* best;    // [n, k], as entry_of() makes them, best first; 0 past the part's last
};

// They are always inlined: a function would be compiled for one instruction set and called from all.
// A score and its key as one number: the higher comes first. NaN is above all, the two zeros are one, and of equal
// scores the lower key is the higher. No entry is 0.
[[gnu::always_inline]] inline uint64_t entry_of(float score, int64_t key) {
  uint32_t bits;
  score += 0.f;
  __builtin_memcpy(&bits, &score, sizeof(bits));
  const uint32_t ordered = score != score ? ~uint32_t{0} : bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | (~uint32_t{0} - static_cast<uint32_t>(key));
}
[[gnu::always_inline]] inline float score_of(uint64_t entry) {
  const uint32_t ordered = static_cast<uint32_t>(entry >> 32);
  if (ordered == ~uint32_t{0}) return __builtin_nanf("");
  const uint32_t bits = ordered >> 31 ? ordered & 0x7FFFFFFFu : ~ordered;
  float score;
  __builtin_memcpy(&score, &bits, sizeof(score));
  return score;
}
[[gnu::always_inline]] inline int64_t key_of(uint64_t entry) {
  return ~uint32_t{0} - static_cast<uint32_t>(entry);
}

struct RetrievalKernels {
  Tiling (*ranks_tiling)(const Logits&, int64_t threads);
  Tiling (*topk_tiling)(const Logits&, int64_t capacity, int64_t threads);
  // Each does the work of one thread on one part: call it from as many as the tiling says, each with its own scratch.
  void (*ranks)(const RetrievalRanks&, const Tiling&, Wavefront&, float* scratch);
  void (*topk)(const RetrievalTopk&, const Tiling&, Wavefront&, float* scratch);
};

}  // namespace mmkernels
