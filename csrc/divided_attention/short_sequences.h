// The schedule for sequences of no more rows than a vector has lanes.
//
// The queries of one head or more lie in the lanes, so that the softmax needs no sum across lanes, and everything stays
// in L1: the rows of 4 tensors, 16 rows of 64 floats each, take 16 KiB. Rows become floats as they are gathered, and
// results leave them as they are written, so that no code between the two knows the dtype.
#pragma once

#include "dropout.h"
#include "sequences.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace divided_attention {

// How many lanes a head takes: the least of 4, 8 and 16 that holds `rows`; 0 if a vector does not.
inline int64_t slots_of(int64_t rows) {
  for (const int64_t slots : {4, 8, 16})
    if (rows <= slots && slots <= Vec::kLanes) return slots;
  return 0;
}

// A group is as many heads as fit in a vector of queries: lane `g * slots + i` is query i of the group's head g, and
// row `g * slots + i` of the buffers is its row.
struct ShortBuffers {
  int64_t size;     // of a row, whole vectors
  int64_t* tokens;  // [length + 1]
  float* queries;   // [lanes][size]
  float* keys;      // [lanes][size]
  float* values;    // [lanes][size]
  float* grads;     // [lanes][size], of the outputs; backward alone
  float* scores;    // [keys][lanes], then the probabilities
  float* products;  // [keys][lanes], dO V, then the gradients of the scores; backward alone
  float* factors;   // [keys][lanes], dropout's
  int64_t floats = 0;

  ShortBuffers(const Clips& clips, bool backward, float* scratch) {
    size = round_up(clips.head_size, Vec::kLanes);
    const auto take = [&](int64_t count) {
      float* start = scratch + floats;
      floats += round_up(count, 16);
      return start;
    };
    const int64_t rows = Vec::kLanes * size, tile = Vec::kLanes * Vec::kLanes;
    tokens = reinterpret_cast<int64_t*>(take(2 * (clips.length + 1)));
    queries = take(rows);
    keys = take(rows);
    values = take(rows);
    grads = backward ? take(rows) : nullptr;
    scores = take(tile);
    products = backward ? take(tile) : nullptr;
    factors = take(tile);
  }

  // Lanes without a query keep what they held before. Nobody reads it, but it must be numbers.
  void clear() const {
    for (float* rows : {queries, keys, values, grads})
      if (rows != nullptr) std::fill(rows, rows + Vec::kLanes * size, 0.f);
    for (float* tile : {scores, products})
      if (tile != nullptr) std::fill(tile, tile + Vec::kLanes * Vec::kLanes, 0.f);
  }
};

// What depends on the dtype, the lanes or the size of a head. Heads of 64, the common ones, have code of their own with
// offsets known when compiling; all others share the code of kHead = 0.

// to[i] = row i as floats, zero past the head's size. Prefetches the rows at +`ahead` bytes, which the next sequence
// reads.
using GatherRows = void(const ListedFeatures& rows, int64_t count, int64_t head_size, int64_t ahead, float* to);

template <int kHead, Dtype kDtype>
void gather_rows(const ListedFeatures& rows, int64_t count, int64_t any_size, int64_t ahead, float* to) {
  const int64_t head_size = kHead > 0 ? kHead : any_size, size = round_up(head_size, Vec::kLanes);
  for (int64_t i = 0; i < count; ++i, to += size) {
    const char* row = static_cast<const char*>(rows.row(i));
    for (int64_t line = 0; line < head_size * bytes_of(kDtype); line += 64)
      __builtin_prefetch(row + ahead + line, 0, 2);
    for (int64_t d = 0; d < size; d += Vec::kLanes) load_floats<kDtype>(row, d, head_size).store(to + d);
  }
}

// tile[j][lane] = left[lane] . right[head of the lane][j], for `count` rows j of each head.
using DotRows = void(const float* left, const float* right, int64_t count, int64_t size, float* tile);

template <int kHead, int kSlots>
void dot_rows(const float* left, const float* right, int64_t count, int64_t any_size, float* tile) {
  const int64_t size = kHead > 0 ? kHead : any_size;
  for (int64_t j = 0; j < count; ++j, right += size, tile += Vec::kLanes) {
    Vec acc[Vec::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < Vec::kLanes; ++i) acc[i] = Vec::set1(0.f);
    for (int64_t d = 0; d < size; d += Vec::kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < Vec::kLanes; ++i)
        acc[i] = fma(Vec::load(left + i * size + d), Vec::load(right + i / kSlots * kSlots * size + d), acc[i]);
    }
    sums_of(acc).store(tile);
  }
}

// Coefficient (i, j): data[i * row + j * step].
struct Coefficients {
  const float* data;
  int64_t row, step;
};

// Row i of `to` = the sum over j of coefficient (i, j) times rows[j], for i and j < count.
using CombineRows = void(const Coefficients& left, const float* rows, int64_t count, int64_t head_size,
                         const ResultRows& to);

// Vectors [d, d + kWide) of the rows [i0, i0 + kOut), of which the first `written` are kept.
template <int kOut, int kWide, Dtype kDtype>
MMK_INLINE void combine_block(const Coefficients& left, const float* rows, int64_t count, int64_t head_size,
                              const ResultRows& to, int64_t i0, int written, int64_t d) {
  const int64_t size = round_up(head_size, Vec::kLanes);
  const float* coefficients = left.data + i0 * left.row;
  Vec acc[kOut][kWide];
#pragma GCC unroll 4
  for (int i = 0; i < kOut; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) acc[i][w] = Vec::set1(0.f);
  for (int64_t j = 0; j < count; ++j) {
    Vec right[kWide];
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) right[w] = Vec::load(rows + j * size + d + w * Vec::kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kOut; ++i) {
      const Vec coefficient = Vec::set1(coefficients[i * left.row + j * left.step]);
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) acc[i][w] = fma(coefficient, right[w], acc[i][w]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kOut; ++i) {
    if (i >= written) break;
    const bool is_cls = i == 0 && to.is_cls(i0);
    void* row = is_cls ? to.cls : to.row(i0 + i);
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) {
      const int64_t at = d + w * Vec::kLanes;
      is_cls ? store_floats<Dtype::kFloat32>(acc[i][w], row, at, head_size)
             : store_floats<kDtype>(acc[i][w], row, at, head_size);
    }
  }
}

template <int kHead, Dtype kDtype>
void combine_rows(const Coefficients& left, const float* rows, int64_t count, int64_t any_size, const ResultRows& to) {
  constexpr int kOut = 4, kWide = Vec::kLanes == 16 ? 4 : 2, kStep = kWide * Vec::kLanes;
  const int64_t head_size = kHead > 0 ? kHead : any_size;
  for (int64_t i = 0; i < count; i += kOut) {
    // A block past the end computes rows that are not written: their coefficients are within the tile.
    const int written = static_cast<int>(std::min<int64_t>(kOut, count - i));
    int64_t d = 0;
    for (; d + kStep <= round_up(head_size, Vec::kLanes); d += kStep)
      combine_block<kOut, kWide, kDtype>(left, rows, count, head_size, to, i, written, d);
    for (; d < head_size; d += Vec::kLanes)
      combine_block<kOut, 1, kDtype>(left, rows, count, head_size, to, i, written, d);
  }
}

struct RowKernels {
  GatherRows* gather;
  DotRows* dot;
  CombineRows* combine;
};

template <int kHead>
RowKernels row_kernels(Dtype dtype, int64_t slots) {
  RowKernels kernels{nullptr, dot_rows<kHead, 4>, nullptr};
  if constexpr (Vec::kLanes >= 8)
    if (slots == 8) kernels.dot = dot_rows<kHead, 8>;
  if constexpr (Vec::kLanes >= 16)
    if (slots == 16) kernels.dot = dot_rows<kHead, 16>;
  with_dtype(dtype, [&](auto known) {
    kernels.gather = gather_rows<kHead, known()>;
    kernels.combine = combine_rows<kHead, known()>;
  });
  return kernels;
}

inline RowKernels row_kernels(Dtype dtype, int64_t slots, int64_t head_size) {
  return head_size == 64 ? row_kernels<64>(dtype, slots) : row_kernels<0>(dtype, slots);
}

// Minus infinity in the lanes where the class token does not see itself.
inline Vec hidden_lanes(const Sequence& sequence, int64_t slots) {
  float lanes[Vec::kLanes] = {};
  for (int64_t i = 0; sequence.cls_hides_itself && i < Vec::kLanes; i += slots) lanes[i] = kNegativeInfinity;
  return Vec::load(lanes);
}

// The factors of a group of heads, as a tile.
inline void dropout_tile(const AttentionForward& p, const Sequence& sequence, int64_t first_head, int64_t heads,
                         int64_t slots, float* tile) {
  float factors[Vec::kLanes];
  for (int64_t g = 0; g < heads; ++g) {
    for (int64_t i = 0; i < sequence.count; ++i) {
      dropout_factors(p, sequence, first_head + g, i, factors);
      for (int64_t j = 0; j < sequence.count; ++j) tile[j * Vec::kLanes + g * slots + i] = factors[j];
    }
  }
}

// Tasks [begin, end) of one sequence each.
inline void short_forward(const AttentionForward& p, int64_t begin, int64_t end, float* scratch) {
  const Clips& clips = p.clips;
  const ShortBuffers buffers(clips, false, scratch);
  buffers.clear();
  const int64_t size = buffers.size, slots = slots_of(clips.most_rows()), heads_at_once = Vec::kLanes / slots;
  const int64_t ahead = clips.sequence_step * p.token_stride * bytes_of(p.dtype);
  const RowKernels kernels = row_kernels(p.dtype, slots, clips.head_size);
  const bool drops = p.dropout.threshold != 0;
  const Vec scale = Vec::set1(p.scale);
  for (int64_t task = begin; task < end; ++task) {
    const Sequence sequence = sequence_of(clips, task / clips.sequences, task % clips.sequences, buffers.tokens);
    const int64_t count = sequence.count;
    const Vec hidden = hidden_lanes(sequence, slots);
    for (int64_t h = 0; h < clips.heads; ++h) clear_absent_outputs(p, sequence, h);
    for (int64_t h0 = 0; count > 0 && h0 < clips.heads; h0 += heads_at_once) {
      const int64_t heads = std::min(heads_at_once, clips.heads - h0);
      for (int64_t g = 0; g < heads; ++g) {
        const int64_t h = h0 + g, at = g * slots * size;
        kernels.gather(rows_of(p, sequence, 0, h), count, clips.head_size, ahead, buffers.queries + at);
        kernels.gather(rows_of(p, sequence, 1, h), count, clips.head_size, ahead, buffers.keys + at);
        kernels.gather(rows_of(p, sequence, 2, h), count, clips.head_size, ahead, buffers.values + at);
      }
      kernels.dot(buffers.queries, buffers.keys, count, size, buffers.scores);
      Vec largest = Vec::set1(kNegativeInfinity), sum = Vec::set1(0.f);
      for (int64_t j = 0; j < count; ++j) {
        float* scores = buffers.scores + j * Vec::kLanes;
        Vec x = Vec::load(scores) * scale;
        if (j == 0) x = x + hidden;
        x.store(scores);
        largest = max(largest, x);
      }
      for (int64_t j = 0; j < count; ++j) {
        float* scores = buffers.scores + j * Vec::kLanes;
        const Vec e = exp(Vec::load(scores) - largest);
        e.store(scores);
        sum = sum + e;
      }
      float largests[Vec::kLanes], sums[Vec::kLanes], lse[Vec::kLanes];
      largest.store(largests);
      sum.store(sums);
      (largest + log(sum)).store(lse);
      const Vec share = Vec::set1(1.f) / sum;
      if (drops) dropout_tile(p, sequence, h0, heads, slots, buffers.factors);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = j * Vec::kLanes;
        Vec probability = Vec::load(buffers.scores + at) * share;
        if (drops) probability = probability * Vec::load(buffers.factors + at);
        probability.store(buffers.scores + at);
      }
      for (int64_t g = 0; g < heads; ++g) {
        const int64_t h = h0 + g, at = g * slots;
        for (int64_t i = 0; i < count; ++i) keep_lse(p, sequence, h, i, largests[at + i], sums[at + i], lse[at + i]);
        kernels.combine({buffers.scores + at, 1, Vec::kLanes}, buffers.values + at * size, count, clips.head_size,
                        outputs_of(p, sequence, h));
      }
    }
  }
}

inline void short_backward(const AttentionBackward& p, int64_t begin, int64_t end, float* scratch) {
  const AttentionForward& forward = p.forward;
  const Clips& clips = forward.clips;
  const ShortBuffers buffers(clips, true, scratch);
  buffers.clear();
  const int64_t size = buffers.size, slots = slots_of(clips.most_rows()), heads_at_once = Vec::kLanes / slots;
  const int64_t ahead = clips.sequence_step * forward.token_stride * bytes_of(forward.dtype);
  const int64_t grad_ahead = clips.sequence_step * p.grad_token_stride * bytes_of(forward.dtype);
  const RowKernels kernels = row_kernels(forward.dtype, slots, clips.head_size);
  const bool drops = forward.dropout.threshold != 0;
  const Vec scale = Vec::set1(forward.scale);
  for (int64_t task = begin; task < end; ++task) {
    const Sequence sequence = sequence_of(clips, task / clips.sequences, task % clips.sequences, buffers.tokens);
    const int64_t count = sequence.count;
    const Vec hidden = hidden_lanes(sequence, slots);
    const float cls_share = sequence.cls_first ? 1.f / static_cast<float>(cls_divisor(clips, sequence.clip)) : 1.f;
    for (int64_t h = 0; h < clips.heads; ++h) clear_absent_gradients(p, sequence, h);
    for (int64_t h0 = 0; count > 0 && h0 < clips.heads; h0 += heads_at_once) {
      const int64_t heads = std::min(heads_at_once, clips.heads - h0);
      float lse[Vec::kLanes] = {};
      Split splits[Vec::kLanes / 4];
      for (int64_t g = 0; g < heads; ++g) {
        const int64_t h = h0 + g, at = g * slots * size;
        kernels.gather(rows_of(forward, sequence, 0, h), count, clips.head_size, ahead, buffers.queries + at);
        kernels.gather(rows_of(forward, sequence, 1, h), count, clips.head_size, ahead, buffers.keys + at);
        kernels.gather(rows_of(forward, sequence, 2, h), count, clips.head_size, ahead, buffers.values + at);
        kernels.gather(grad_rows_of(p, sequence, h), count, clips.head_size, grad_ahead, buffers.grads + at);
        for (int64_t i = 0; i < count; ++i) lse[g * slots + i] = forward.lse[lse_index(clips, sequence, h, i)];
        for (int64_t d = 0; sequence.cls_first && d < size; ++d) buffers.grads[at + d] *= cls_share;
        if (sequence.cls_is_split) splits[g] = split_of(p, sequence, h);
      }
      kernels.dot(buffers.queries, buffers.keys, count, size, buffers.scores);
      kernels.dot(buffers.grads, buffers.values, count, size, buffers.products);
      if (drops) dropout_tile(forward, sequence, h0, heads, slots, buffers.factors);
      const Vec lse_lanes = Vec::load(lse);
      Vec sum = Vec::set1(0.f), delta = Vec::set1(0.f);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = j * Vec::kLanes;
        Vec x = Vec::load(buffers.scores + at) * scale;
        if (j == 0) x = x + hidden;
        const Vec e = exp(x - lse_lanes);
        Vec dp = Vec::load(buffers.products + at);
        if (drops) {
          dp = dp * Vec::load(buffers.factors + at);
          dp.store(buffers.products + at);
        }
        e.store(buffers.scores + at);
        sum = sum + e;
        delta = fma(e, dp, delta);
      }
      Vec share = Vec::set1(1.f) / sum;
      delta = delta * share;
      if (sequence.cls_is_split) {
        float shares[Vec::kLanes], deltas[Vec::kLanes];
        share.store(shares);
        delta.store(deltas);
        for (int64_t g = 0; g < heads; ++g) {
          shares[g * slots] = splits[g].share;
          deltas[g * slots] = splits[g].delta;
        }
        share = Vec::load(shares);
        delta = Vec::load(deltas);
      }
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = j * Vec::kLanes;
        const Vec probability = Vec::load(buffers.scores + at) * share;
        (probability * scale * (Vec::load(buffers.products + at) - delta)).store(buffers.products + at);
        (drops ? probability * Vec::load(buffers.factors + at) : probability).store(buffers.scores + at);
      }
      for (int64_t g = 0; g < heads; ++g) {
        const int64_t at = g * slots;
        const float *probabilities = buffers.scores + at, *score_grads = buffers.products + at;
        const auto combine = [&](int64_t part, const Coefficients& left, const float* rows) {
          kernels.combine(left, rows + at * size, count, clips.head_size, gradients_of(p, sequence, part, h0 + g));
        };
        combine(0, {score_grads, 1, Vec::kLanes}, buffers.keys);
        combine(1, {score_grads, Vec::kLanes, 1}, buffers.queries);
        combine(2, {probabilities, Vec::kLanes, 1}, buffers.grads);
      }
    }
  }
}

}  // namespace divided_attention
}  // namespace MMK_VARIANT
}  // namespace mmkernels
