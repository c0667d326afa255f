// The sequences of a call: which tokens meet, and where their rows lie.
//
// A sequence is a list of tokens: the class token where it takes part, then the patches that are not absent. All of its
// tokens are queries and keys, so no mask is left to apply.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/tiles.h"
#include "cpu_kernels.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace divided_attention {

struct Sequence {
  int64_t clip, index;  // index: among the sequences of the clip
  int64_t count;        // of tokens that take part
  int64_t* tokens;      // [count]
  bool cls_first;       // token 0 leads
  // A class token that attends to all tokens is a key of itself once: every sequence but the first hides it from
  // itself.
  bool cls_hides_itself;
  // The class token's row spans several sequences, so no single one can normalise it.
  bool cls_is_split;

  bool is_cls(int64_t i) const { return cls_first && i == 0; }
};

inline bool holds_a_frame(const Clips& clips, int64_t clip, int64_t index) {
  for (int64_t j = 0; j < clips.length; ++j)
    if (clips.present(clip, index, j)) return true;
  return false;
}

inline Sequence sequence_of(const Clips& clips, int64_t clip, int64_t index, int64_t* tokens) {
  const bool hides_itself = clips.cls_is_global() && index > 0, is_split = clips.cls_is_global() && clips.sequences > 1;
  Sequence sequence{clip, index, 0, tokens, clips.cls_takes_part(), hides_itself, is_split};
  int64_t& count = sequence.count;
  if (sequence.cls_first) tokens[count++] = 0;
  for (int64_t j = 0; j < clips.length; ++j)
    if (clips.present(clip, index, j)) tokens[count++] = clips.token(index, j);
  // Without a patch the class token attends to nothing, or, if it attends to all tokens, to itself in the first
  // sequence.
  if (count == sequence.cls_first && !(clips.cls_is_global() && index == 0)) count = 0;
  return sequence;
}

// The number of sequences that the class token's outputs are averaged over; 1 if its row spans them all.
inline int64_t cls_divisor(const Clips& clips, int64_t clip) {
  if (clips.cls_is_global()) return 1;
  int64_t real = 0;
  for (int64_t s = 0; s < clips.sequences; ++s) real += holds_a_frame(clips, clip, s);
  return std::max<int64_t>(real, 1);
}

// ---- Where a head's rows and log-sum-exps lie

// Query, key and value: part 0, 1 and 2.
inline ListedFeatures rows_of(const AttentionForward& p, const Sequence& sequence, int64_t part, int64_t head) {
  const Clips& clips = p.clips;
  const int64_t at = sequence.clip * p.batch_stride + (part * clips.heads + head) * clips.head_size;
  return {static_cast<const char*>(p.qkv) + at * bytes_of(p.dtype), p.dtype, sequence.tokens, p.token_stride};
}

inline ListedFeatures grad_rows_of(const AttentionBackward& p, const Sequence& sequence, int64_t head) {
  const Dtype dtype = p.forward.dtype;
  const int64_t at = sequence.clip * p.grad_batch_stride + head * p.forward.clips.head_size;
  return {static_cast<const char*>(p.grad_out) + at * bytes_of(dtype), dtype, sequence.tokens, p.grad_token_stride};
}

inline char* out_row(const AttentionForward& p, int64_t clip, int64_t token, int64_t head) {
  const Clips& clips = p.clips;
  const int64_t at = ((clip * clips.tokens + token) * clips.heads + head) * clips.head_size;
  return static_cast<char*>(p.out) + at * bytes_of(p.dtype);
}

inline char* grad_row(const AttentionBackward& p, int64_t clip, int64_t token, int64_t part, int64_t head) {
  const Clips& clips = p.forward.clips;
  const int64_t at = (((clip * clips.tokens + token) * 3 + part) * clips.heads + head) * clips.head_size;
  return static_cast<char*>(p.grad_qkv) + at * bytes_of(p.forward.dtype);
}

// The index in cls_largest and cls_sums of a sequence's part of the class token. The rows of cls_out and cls_grads have
// the same order.
inline int64_t cls_index(const Clips& clips, const Sequence& sequence, int64_t head) {
  return (sequence.clip * clips.heads + head) * clips.sequences + sequence.index;
}

inline float* cls_out(const AttentionForward& p, const Sequence& sequence, int64_t head) {
  return p.cls_out + cls_index(p.clips, sequence, head) * p.clips.head_size;
}

inline float* cls_grad(const AttentionBackward& p, const Sequence& sequence, int64_t part, int64_t head) {
  const Clips& clips = p.forward.clips;
  return p.cls_grads + (cls_index(clips, sequence, head) * 3 + part) * clips.head_size;
}

// The index in lse of row i's log-sum-exp. The forward pass keeps that of a split row in two parts, which forward_cls
// joins.
inline int64_t lse_index(const Clips& clips, const Sequence& sequence, int64_t head, int64_t i) {
  const int64_t first = (sequence.clip * clips.heads + head) * clips.rows();
  if (sequence.is_cls(i)) return first + (clips.cls_is_global() ? 0 : sequence.index);
  return first + clips.cls_rows() + sequence.tokens[i] - clips.has_cls;
}

inline void keep_lse(const AttentionForward& p, const Sequence& sequence, int64_t head, int64_t i, float largest,
                     float sum, float lse) {
  const Clips& clips = p.clips;
  if (sequence.is_cls(i)) {
    const int64_t at = cls_index(clips, sequence, head);
    p.cls_largest[at] = largest;
    p.cls_sums[at] = sum;
  }
  if (!(sequence.is_cls(i) && clips.cls_is_global())) p.lse[lse_index(clips, sequence, head, i)] = lse;
}

// ---- Results

// The rows of results of a head. Row i goes to token tokens[i] of the tensor, but the class token's goes, as floats, to
// a row of its own, and a later pass adds these rows up over the sequences.
struct ResultRows {
  char* first;  // token 0's
  Dtype dtype;
  int64_t token_bytes;  // from token to token
  const int64_t* tokens;
  float* cls;  // null if the class token does not lead

  bool is_cls(int64_t i) const { return cls != nullptr && i == 0; }
  void* row(int64_t i) const { return first + tokens[i] * token_bytes; }
};

inline ResultRows outputs_of(const AttentionForward& p, const Sequence& sequence, int64_t head) {
  const Clips& clips = p.clips;
  const int64_t token_bytes = clips.heads * clips.head_size * bytes_of(p.dtype);
  float* cls = sequence.cls_first ? cls_out(p, sequence, head) : nullptr;
  return {out_row(p, sequence.clip, 0, head), p.dtype, token_bytes, sequence.tokens, cls};
}

inline ResultRows gradients_of(const AttentionBackward& p, const Sequence& sequence, int64_t part, int64_t head) {
  const Clips& clips = p.forward.clips;
  const Dtype dtype = p.forward.dtype;
  const int64_t token_bytes = 3 * clips.heads * clips.head_size * bytes_of(dtype);
  float* cls = sequence.cls_first ? cls_grad(p, sequence, part, head) : nullptr;
  return {grad_row(p, sequence.clip, 0, part, head), dtype, token_bytes, sequence.tokens, cls};
}

// Row i of results, `scale` times the floats given.
inline void write_row(const float* from, float scale, const ResultRows& to, int64_t i, int64_t head_size) {
  const bool is_cls = to.is_cls(i);
  void* row = is_cls ? to.cls : to.row(i);
  with_dtype(is_cls ? Dtype::kFloat32 : to.dtype, [&](auto dtype) {
    for (int64_t d = 0; d < head_size; d += Vec::kLanes)
      store_floats<dtype()>(Vec::load(from + d) * Vec::set1(scale), row, d, head_size);
  });
}

// Absent frames, and class tokens of sequences without a frame, have no output; their gradients are 0.
inline void clear_absent_outputs(const AttentionForward& p, const Sequence& sequence, int64_t head) {
  const Clips& clips = p.clips;
  for (int64_t j = 0; clips.frame_mask != nullptr && j < clips.length; ++j) {
    if (clips.present(sequence.clip, sequence.index, j)) continue;
    const int64_t token = clips.token(sequence.index, j), first = (sequence.clip * clips.heads + head) * clips.rows();
    std::memset(out_row(p, sequence.clip, token, head), 0, clips.head_size * bytes_of(p.dtype));
    p.lse[first + clips.cls_rows() + token - clips.has_cls] = kNegativeInfinity;
  }
  if (!sequence.cls_first || sequence.count > 0) return;
  keep_lse(p, sequence, head, 0, kNegativeInfinity, 0.f, kNegativeInfinity);
  std::memset(cls_out(p, sequence, head), 0, clips.head_size * sizeof(float));
}

inline void clear_absent_gradients(const AttentionBackward& p, const Sequence& sequence, int64_t head) {
  const Clips& clips = p.forward.clips;
  for (int64_t part = 0; part < 3; ++part) {
    for (int64_t j = 0; clips.frame_mask != nullptr && j < clips.length; ++j) {
      if (clips.present(sequence.clip, sequence.index, j)) continue;
      void* row = grad_row(p, sequence.clip, clips.token(sequence.index, j), part, head);
      std::memset(row, 0, clips.head_size * bytes_of(p.forward.dtype));
    }
    if (sequence.cls_first && sequence.count == 0)
      std::memset(cls_grad(p, sequence, part, head), 0, clips.head_size * sizeof(float));
  }
}

// ---- A class token's row that spans several sequences

// What brings each sequence's part of the row to one scale: prepare_cls computes the share.
struct Split {
  float share;  // 1 / the sum of the row's probabilities as the backward pass computes them
  float delta;  // the sum of dO O: what each sequence takes off dp
};

inline Split split_of(const AttentionBackward& p, const Sequence& sequence, int64_t head) {
  const Clips& clips = p.forward.clips;
  const void* grad = grad_rows_of(p, sequence, head).row(0);
  const void* out = out_row(p.forward, sequence.clip, 0, head);
  Vec sum = Vec::set1(0.f);
  with_dtype(p.forward.dtype, [&](auto dtype) {
    for (int64_t d = 0; d < clips.head_size; d += Vec::kLanes)
      sum = fma(load_floats<dtype()>(grad, d, clips.head_size), load_floats<dtype()>(out, d, clips.head_size), sum);
  });
  return {p.cls_shares[sequence.clip * clips.heads + head], sum.sum()};
}

}  // namespace divided_attention
}  // namespace MMK_VARIANT
}  // namespace mmkernels
