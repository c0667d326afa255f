// Which probabilities dropout keeps: a function of the seed and of where the probability stands, the same in both
// passes and in every schedule.
#pragma once

#include "sequences.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace divided_attention {

// 1 / (1 - p) where the probability of (query, keys[j]) is kept, 0 where it is dropped and in the lanes past the last.
inline void dropout_factors(const Dropout& dropout, const int64_t* keys, int64_t count, uint32_t query,
                            uint32_t clip_and_head, uint32_t sequence, float* factors) {
  constexpr int kLanes = 16;
  for (int64_t j0 = 0; j0 < count; j0 += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, count - j0));
    uint32_t c0[kLanes] = {}, c1[kLanes], c2[kLanes], c3[kLanes], k0 = dropout.key[0], k1 = dropout.key[1];
    for (int j = 0; j < n; ++j) c0[j] = static_cast<uint32_t>(keys[j0 + j]);
    for (int j = 0; j < kLanes; ++j) c1[j] = query, c2[j] = clip_and_head, c3[j] = sequence;
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      for (int j = 0; j < kLanes; ++j) {
        const uint64_t a = uint64_t{c0[j]} * 0xD2511F53, b = uint64_t{c2[j]} * 0xCD9E8D57;
        c0[j] = static_cast<uint32_t>(b >> 32) ^ c1[j] ^ k0;
        c1[j] = static_cast<uint32_t>(b);
        c2[j] = static_cast<uint32_t>(a >> 32) ^ c3[j] ^ k1;
        c3[j] = static_cast<uint32_t>(a);
      }
    }
    for (int j = 0; j < n; ++j) factors[j0 + j] = c0[j] < dropout.threshold ? 0.f : dropout.growth;
  }
  std::fill(factors + count, factors + round_up(count, Vec::kLanes), 0.f);
}

// The factors of query i of a head and all keys of its sequence.
inline void dropout_factors(const AttentionForward& p, const Sequence& sequence, int64_t head, int64_t i,
                            float* factors) {
  // A class token's row that spans all sequences counts as the first one's.
  const int64_t index = sequence.is_cls(i) && p.clips.cls_is_global() ? 0 : sequence.index;
  dropout_factors(p.dropout, sequence.tokens, sequence.count, static_cast<uint32_t>(sequence.tokens[i]),
                  static_cast<uint32_t>(sequence.clip * p.clips.heads + head), static_cast<uint32_t>(index), factors);
}

}  // namespace divided_attention
}  // namespace MMK_VARIANT
}  // namespace mmkernels
