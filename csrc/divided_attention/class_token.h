// The class token's row, which every sequence holds a part of: one task per clip and head.
#pragma once

#include <cmath>

#include "sequences.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace divided_attention {

// The class token's output: the mean of its outputs in the sequences, or their sum in the shares of one softmax.
inline void forward_cls(const AttentionForward& p, int64_t begin, int64_t end) {
  const Clips& clips = p.clips;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t clip = task / clips.heads, h = task % clips.heads;
    void* out = out_row(p, clip, 0, h);
    if (!clips.cls_takes_part()) {
      std::memset(out, 0, clips.head_size * bytes_of(p.dtype));
      continue;
    }
    const float* parts = p.cls_out + task * clips.sequences * clips.head_size;
    const float *largests = p.cls_largest + task * clips.sequences, *sums = p.cls_sums + task * clips.sequences;
    float total = 0, largest = kNegativeInfinity;
    if (clips.cls_is_global()) {
      for (int64_t s = 0; s < clips.sequences; ++s) largest = std::max(largest, largests[s]);
      for (int64_t s = 0; s < clips.sequences; ++s) total += sums[s] * std::exp(largests[s] - largest);
      p.lse[task * clips.rows()] = largest + std::log(total);
    } else {
      total = static_cast<float>(cls_divisor(clips, clip));
    }
    with_dtype(p.dtype, [&](auto dtype) {
      for (int64_t d = 0; d < clips.head_size; d += Vec::kLanes) {
        Vec sum = Vec::set1(0.f);
        for (int64_t s = 0; s < clips.sequences; ++s) {
          const Vec part = load_floats<Dtype::kFloat32>(parts + s * clips.head_size, d, clips.head_size);
          sum =
              clips.cls_is_global() ? fma(part, Vec::set1(sums[s] * std::exp(largests[s] - largest)), sum) : sum + part;
        }
        store_floats<dtype()>(sum * Vec::set1(1.f / total), out, d, clips.head_size);
      }
    });
  }
}

// Normalises the class token's probabilities again, as each sequence does for its own rows: shares = 1 / the sum of
// e^(score - lse) over all tokens.
inline void prepare_cls(const AttentionBackward& p, int64_t begin, int64_t end) {
  const AttentionForward& forward = p.forward;
  const Clips& clips = forward.clips;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t clip = task / clips.heads, h = task % clips.heads;
    const float lse = forward.lse[task * clips.rows()];
    const auto row = [&](int64_t token, int64_t part) {
      const int64_t in_token = (part * clips.heads + h) * clips.head_size;
      const int64_t at = clip * forward.batch_stride + token * forward.token_stride + in_token;
      return static_cast<const char*>(forward.qkv) + at * bytes_of(forward.dtype);
    };
    Vec sum = Vec::set1(0.f);
    float scores[Vec::kLanes];
    int filled = 0;
    const auto flush = [&] {
      std::fill(scores + filled, scores + Vec::kLanes, kNegativeInfinity);
      sum = sum + exp(Vec::load(scores) - Vec::set1(lse));
      filled = 0;
    };
    const auto score = [&](int64_t token) {
      Vec products = Vec::set1(0.f);
      with_dtype(forward.dtype, [&](auto dtype) {
        for (int64_t d = 0; d < clips.head_size; d += Vec::kLanes)
          products = fma(load_floats<dtype()>(row(0, 0), d, clips.head_size),
                         load_floats<dtype()>(row(token, 1), d, clips.head_size), products);
      });
      return products.sum() * forward.scale;
    };
    const auto visit = [&](int64_t token) {
      scores[filled++] = score(token);
      if (filled == Vec::kLanes) flush();
    };
    visit(0);
    for (int64_t s = 0; s < clips.sequences; ++s)
      for (int64_t j = 0; j < clips.length; ++j)
        if (clips.present(clip, s, j)) visit(clips.token(s, j));
    flush();
    p.cls_shares[task] = 1.f / sum.sum();
  }
}

// The gradients of the class token's query, key and value: their sums over the sequences.
inline void backward_cls(const AttentionBackward& p, int64_t begin, int64_t end) {
  const Clips& clips = p.forward.clips;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t clip = task / clips.heads, h = task % clips.heads;
    for (int64_t part = 0; part < 3; ++part) {
      void* out = grad_row(p, clip, 0, part, h);
      if (!clips.cls_takes_part()) {
        std::memset(out, 0, clips.head_size * bytes_of(p.forward.dtype));
        continue;
      }
      const float* parts = p.cls_grads + (task * clips.sequences * 3 + part) * clips.head_size;
      with_dtype(p.forward.dtype, [&](auto dtype) {
        for (int64_t d = 0; d < clips.head_size; d += Vec::kLanes) {
          Vec sum = Vec::set1(0.f);
          for (int64_t s = 0; s < clips.sequences; ++s)
            sum = sum + load_floats<Dtype::kFloat32>(parts + s * 3 * clips.head_size, d, clips.head_size);
          store_floats<dtype()>(sum, out, d, clips.head_size);
        }
      });
    }
  }
}

}  // namespace divided_attention
}  // namespace MMK_VARIANT
}  // namespace mmkernels
