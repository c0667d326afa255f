// What the kernels of divided attention take: plain data, so that the variants, one for each instruction set, need no
// torch header.
#pragma once

#include <cstdint>

#include "../common/tiles_types.h"

namespace mmkernels {

// What the class token does, if there is one: see mmkernels/divided_attention/layout.py.
enum class ClassToken : int64_t { kApart, kAveraged, kGlobal };

// The tokens of a clip and the sequences that its patches form. Patch j of sequence s is the token
// has_cls + s * sequence_step + j * patch_step; the frame of a token is (token - has_cls) / frame_step % frames.
struct Clips {
  int64_t batch, tokens, heads, head_size;  // [B, L, 3 H D]
  int64_t sequences, length;
  int64_t sequence_step, patch_step;
  int64_t has_cls;
  ClassToken cls;
  int64_t frames, frame_step;
  const bool* frame_mask;  // [B, T], true for a real frame, or null

  int64_t token(int64_t s, int64_t j) const { return has_cls + s * sequence_step + j * patch_step; }
  bool present(int64_t b, int64_t s, int64_t j) const {
    const int64_t frame = (s * sequence_step + j * patch_step) / frame_step % frames;
    return frame_mask == nullptr || frame_mask[b * frames + frame];
  }
  bool cls_takes_part() const { return cls != ClassToken::kApart; }
  bool cls_is_global() const { return cls == ClassToken::kGlobal; }
  int64_t most_rows() const { return length + cls_takes_part(); }  // that a sequence has
  int64_t cls_rows() const { return cls == ClassToken::kAveraged ? sequences : cls_is_global(); }
  int64_t rows() const { return cls_rows() + sequences * length; }  // of log-sum-exps
};

// Probabilities whose word, of Philox 4x32-10 at the counter (key token, query token, batch * heads + head, sequence),
// lies below the threshold are dropped; the others grow by `growth`.
struct Dropout {
  uint64_t threshold;  // 0: nothing is dropped
  uint32_t key[2];
  float growth;
};

struct AttentionForward {
  Clips clips;
  const void* qkv;
  Dtype dtype;
  int64_t batch_stride, token_stride;  // of qkv, in elements
  float scale;
  Dropout dropout;
  void* out;   // [B, L, H D]
  float* lse;  // [B, H, rows]
  // The class token's output in each sequence, its largest score there and the sum of exp(score - largest). In their
  // place a log-sum-exp, rounded, would be off by 1e-4 where scores are in the thousands.
  float* cls_out;      // [B, H, sequences, D]
  float* cls_largest;  // [B, H, sequences]
  float* cls_sums;     // [B, H, sequences]
};

struct AttentionBackward {
  AttentionForward forward;  // its outputs are inputs here: out, lse
  const void* grad_out;      // in the dtype of qkv
  int64_t grad_batch_stride, grad_token_stride;
  void* grad_qkv;     // [B, L, 3 H D]
  float* cls_grads;   // [B, H, sequences, 3, D], what each sequence gives to the class token's query, key and value
  float* cls_shares;  // [B, H], for a class token whose row goes over several sequences: see prepare_cls
};

struct AttentionPlan {
  int64_t tasks;           // of one pass over the sequences
  int64_t scratch_floats;  // of each thread
};

struct AttentionKernels {
  AttentionPlan (*plan)(const AttentionForward&, bool backward);
  // These run tasks [begin, end) of the sequences, and after all of them those of the class token, one per clip and
  // head.
  void (*forward)(const AttentionForward&, int64_t begin, int64_t end, float* scratch);
  void (*forward_cls)(const AttentionForward&, int64_t begin, int64_t end);
  void (*backward)(const AttentionBackward&, int64_t begin, int64_t end, float* scratch);
  // Runs before the backward pass where the class token attends to several sequences at once, one task per clip and
  // head.
  void (*prepare_cls)(const AttentionBackward&, int64_t begin, int64_t end);
  void (*backward_cls)(const AttentionBackward&, int64_t begin, int64_t end);
};

}  // namespace mmkernels
