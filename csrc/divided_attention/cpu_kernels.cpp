// The kernels of divided attention. Compiled once for each instruction set (MMK_VARIANT).
//
// A sequence is a list of tokens: the class token where it takes part, then the patches that are not absent. All of
// its tokens are queries and keys, so no mask is left to apply. Two schedules:
//   short  as many rows as a vector has lanes, or fewer: the queries of one or more heads lie in the lanes, so that the
//          softmax needs no sum across lanes, and everything stays in L1;
//   long   keys and values of one head are packed once, and blocks of queries pass by them: the scores of a block
//          against all keys lie in L2, where the softmax is taken in place.
// The backward pass computes the probabilities anew from the log-sum-exps. They are normalised again: a float32 holds a
// log-sum-exp of 100 to 4e-6, and that error would be in every probability. The sum of p dp comes from the
// probabilities too, so that `out` is read only for a class token whose row no single sequence holds.
#include "cpu_kernels.h"

#include <algorithm>
#include <cmath>

#include "../common/tiles.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

constexpr float kNegativeInfinity = -__builtin_inff();

// Rows of the long schedule's blocks: half of what L2 holds is theirs.
constexpr int64_t kMostRows = 64;
constexpr int64_t kBlockFloats = 1 << 16;

// ---- Sequences

struct Sequence {
  int64_t b, s;
  int64_t count;    // of tokens that take part
  int64_t* tokens;  // [count]
  bool cls_first;   // token 0 leads
  // The class token is counted once as a key of itself, where its row goes over all sequences.
  bool cls_hides_itself;
  // ... and its row is not normalised by one sequence alone.
  bool cls_is_split;

  bool is_cls(int64_t i) const { return cls_first && i == 0; }
};

bool holds_a_frame(const Clips& c, int64_t b, int64_t s) {
  for (int64_t j = 0; j < c.length; ++j)
    if (c.present(b, s, j)) return true;
  return false;
}

Sequence sequence_of(const Clips& c, int64_t b, int64_t s, int64_t* tokens) {
  Sequence q{b, s, 0, tokens, c.cls_takes_part, c.cls_is_global && s > 0, c.cls_is_global && c.sequences > 1};
  if (q.cls_first) tokens[q.count++] = 0;
  for (int64_t j = 0; j < c.length; ++j)
    if (c.present(b, s, j)) tokens[q.count++] = c.token(s, j);
  // Without a patch the class token has nothing to attend to but, where it attends to all tokens, itself.
  if (q.count == q.cls_first && !(c.cls_is_global && s == 0)) q.count = 0;
  return q;
}

// The number of sequences that the class token's outputs are averaged over; 1 where it is one row.
int64_t cls_divisor(const Clips& c, int64_t b) {
  if (c.cls_is_global) return 1;
  int64_t real = 0;
  for (int64_t s = 0; s < c.sequences; ++s) real += holds_a_frame(c, b, s);
  return std::max<int64_t>(real, 1);
}

// Where row i of head h finds its log-sum-exp; the class token's in a split row is kept elsewhere.
int64_t lse_index(const Clips& c, const Sequence& q, int64_t h, int64_t i) {
  const int64_t first = (q.b * c.heads + h) * c.rows();
  if (q.is_cls(i)) return first + (c.cls_is_global ? 0 : q.s);
  return first + c.cls_rows() + q.tokens[i] - c.has_cls;
}

// Query, key and value of head h: part 0, 1 and 2.
ListedFeatures rows_of(const AttentionForward& p, const Sequence& q, int64_t part, int64_t h) {
  const Clips& c = p.clips;
  const int64_t at = q.b * p.batch_stride + (part * c.heads + h) * c.head;
  return {static_cast<const char*>(p.qkv) + at * bytes_of(p.dtype), p.dtype, q.tokens, p.token_stride};
}

ListedFeatures grad_rows_of(const AttentionBackward& p, const Sequence& q, int64_t h) {
  const Dtype dtype = p.forward.dtype;
  const int64_t at = q.b * p.grad_batch_stride + h * p.forward.clips.head;
  return {static_cast<const char*>(p.grad_out) + at * bytes_of(dtype), dtype, q.tokens, p.grad_token_stride};
}

char* out_row(const AttentionForward& p, int64_t b, int64_t token, int64_t h) {
  const Clips& c = p.clips;
  return static_cast<char*>(p.out) + ((b * c.tokens + token) * c.heads + h) * c.head * bytes_of(p.dtype);
}

char* grad_row(const AttentionBackward& p, int64_t b, int64_t token, int64_t part, int64_t h) {
  const Clips& c = p.forward.clips;
  const int64_t at = ((b * c.tokens + token) * 3 + part) * c.heads + h;
  return static_cast<char*>(p.grad_qkv) + at * c.head * bytes_of(p.forward.dtype);
}

float* cls_grad(const AttentionBackward& p, const Sequence& q, int64_t part, int64_t h) {
  const Clips& c = p.forward.clips;
  return p.cls_grads + (((q.b * c.heads + h) * c.sequences + q.s) * 3 + part) * c.head;
}

// Absent frames, and class tokens of sequences without a frame, have no output; their gradients are 0.
void clear_absent_outputs(const AttentionForward& p, const Sequence& q, int64_t h) {
  const Clips& c = p.clips;
  for (int64_t j = 0; c.frame_mask != nullptr && j < c.length; ++j) {
    if (c.present(q.b, q.s, j)) continue;
    const int64_t token = c.token(q.s, j);
    std::memset(out_row(p, q.b, token, h), 0, c.head * bytes_of(p.dtype));
    p.lse[(q.b * c.heads + h) * c.rows() + c.cls_rows() + token - c.has_cls] = kNegativeInfinity;
  }
  if (!q.cls_first || q.count > 0) return;
  const int64_t at = (q.b * c.heads + h) * c.sequences + q.s;
  p.cls_largest[at] = kNegativeInfinity;
  p.cls_sums[at] = 0;
  if (!c.cls_is_global) p.lse[lse_index(c, q, h, 0)] = kNegativeInfinity;
  std::memset(p.cls_out + at * c.head, 0, c.head * sizeof(float));
}

void clear_absent_gradients(const AttentionBackward& p, const Sequence& q, int64_t h) {
  const Clips& c = p.forward.clips;
  for (int64_t part = 0; part < 3; ++part) {
    for (int64_t j = 0; c.frame_mask != nullptr && j < c.length; ++j)
      if (!c.present(q.b, q.s, j))
        std::memset(grad_row(p, q.b, c.token(q.s, j), part, h), 0, c.head * bytes_of(p.forward.dtype));
    if (q.cls_first && q.count == 0) std::memset(cls_grad(p, q, part, h), 0, c.head * sizeof(float));
  }
}

void keep_lse(const AttentionForward& p, const Sequence& q, int64_t h, int64_t i, float largest, float sum, float lse) {
  const Clips& c = p.clips;
  if (q.is_cls(i)) {
    const int64_t at = (q.b * c.heads + h) * c.sequences + q.s;
    p.cls_largest[at] = largest;
    p.cls_sums[at] = sum;
  }
  if (!(q.is_cls(i) && c.cls_is_global)) p.lse[lse_index(c, q, h, i)] = lse;
}

// The sum of dO_i O_i of a class token's row that goes over all sequences: what each of them takes off dp.
float split_delta(const AttentionBackward& p, const Sequence& q, int64_t h) {
  const Clips& c = p.forward.clips;
  const void* grad = grad_rows_of(p, q, h).row(0);
  const void* out = out_row(p.forward, q.b, 0, h);
  Vec sum = Vec::set1(0.f);
  with_dtype(p.forward.dtype, [&](auto dtype) {
    for (int64_t d = 0; d < c.head; d += Vec::kLanes)
      sum = fma(load_floats<dtype()>(grad, d, c.head), load_floats<dtype()>(out, d, c.head), sum);
  });
  return sum.sum();
}

// ---- Dropout

// 1 / (1 - p) where the probability of (query, keys[j]) is kept, 0 where it is dropped and in the lanes past the last.
void dropout_factors(const Dropout& d, const int64_t* keys, int64_t count, uint32_t query, uint32_t clip_and_head,
                     uint32_t sequence, float* factors) {
  constexpr int kLanes = 16;
  for (int64_t j0 = 0; j0 < count; j0 += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, count - j0));
    uint32_t c0[kLanes] = {}, c1[kLanes], c2[kLanes], c3[kLanes], k0 = d.key[0], k1 = d.key[1];
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
    for (int j = 0; j < n; ++j) factors[j0 + j] = c0[j] < d.threshold ? 0.f : d.growth;
  }
  std::fill(factors + count, factors + round_up(count, Vec::kLanes), 0.f);
}

void dropout_factors(const AttentionForward& p, const Sequence& q, int64_t h, int64_t i, float* factors) {
  // A row of the class token over all sequences is one row: it counts as the first sequence's.
  const int64_t sequence = q.is_cls(i) && p.clips.cls_is_global ? 0 : q.s;
  dropout_factors(p.dropout, q.tokens, q.count, static_cast<uint32_t>(q.tokens[i]),
                  static_cast<uint32_t>(q.b * p.clips.heads + h), static_cast<uint32_t>(sequence), factors);
}

// ---- Rows out

// A row of results in the dtype of the op, or in float32 for the class token, whose rows are summed up later.
template <Dtype kDtype>
MMK_INLINE void write_row(const float* from, float scale, bool is_cls, void* row, float* cls_row, int64_t size) {
  for (int64_t d = 0; d < size; d += Vec::kLanes) {
    const Vec value = Vec::load(from + d) * Vec::set1(scale);
    is_cls ? store_floats<Dtype::kFloat32>(value, cls_row, d, size) : store_floats<kDtype>(value, row, d, size);
  }
}

// For the last vector of a row of `count`: minus infinity in the lanes past the end, else zero.
MMK_INLINE Vec edge_of(int64_t count) {
  const int64_t inside = count - (round_up(count, Vec::kLanes) - Vec::kLanes);
  float lanes[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) lanes[i] = i < inside ? 0.f : kNegativeInfinity;
  return Vec::load(lanes);
}

// For the first vector of a row: minus infinity in lane 0 if its key is hidden.
MMK_INLINE Vec start_of(bool hides_first) {
  float lanes[Vec::kLanes] = {};
  if (hides_first) lanes[0] = kNegativeInfinity;
  return Vec::load(lanes);
}

// ---- The short schedule
//
// A group is as many heads as fit in a vector of queries, kSlots lanes each. Tiles are [keys][lanes].

// How many lanes a head takes: the least of 4, 8 and 16 that holds `rows`; 0 if a vector does not.
int64_t slots_of(int64_t rows) {
  for (const int64_t slots : {4, 8, 16})
    if (rows <= slots && slots <= Vec::kLanes) return slots;
  return 0;
}

struct ShortBuffers {
  int64_t size;  // of a row, whole vectors
  int64_t* tokens;
  float *a, *b, *c, *d;      // rows of a group, [lanes][size]: queries, keys, values, gradients of the output
  float *scores, *products;  // tiles
  float* factors;            // dropout's, a tile
  float* row;                // results of a row
  int64_t floats = 0;

  ShortBuffers(const Clips& c_, bool backward, float* scratch) {
    size = round_up(c_.head, Vec::kLanes);
    const auto take = [&](int64_t count) {
      float* p = scratch + floats;
      floats += round_up(count, 16);
      return p;
    };
    tokens = reinterpret_cast<int64_t*>(take(2 * (c_.length + 1)));
    a = take(Vec::kLanes * size);
    b = take(Vec::kLanes * size);
    c = take(Vec::kLanes * size);
    d = backward ? take(Vec::kLanes * size) : nullptr;
    scores = take(Vec::kLanes * Vec::kLanes);
    products = backward ? take(Vec::kLanes * Vec::kLanes) : nullptr;
    factors = take(Vec::kLanes * Vec::kLanes);
    row = take(4 * size);
  }
};

// Rows as floats, zero past the head's size: to[i] for each of the sequence's tokens. What lies `ahead` bytes further
// is needed soon, and fetched.
template <Dtype kDtype>
MMK_INLINE void gather_rows(const ListedFeatures& x, int64_t count, int64_t head, int64_t size, int64_t ahead,
                            float* to) {
  for (int64_t i = 0; i < count; ++i, to += size) {
    const char* row = static_cast<const char*>(x.row(i));
    for (int64_t line = 0; line < head * bytes_of(kDtype); line += 64) __builtin_prefetch(row + ahead + line, 0, 2);
    for (int64_t d = 0; d < size; d += Vec::kLanes) load_floats<kDtype>(row, d, head).store(to + d);
  }
}

// tile[j][lane] = a[lane] . b[head of the lane][j], for `count` rows j of each head.
template <int kSlots>
MMK_INLINE void dot_rows(const float* a, const float* b, int64_t count, int64_t size, float* tile) {
  for (int64_t j = 0; j < count; ++j, b += size, tile += Vec::kLanes) {
    Vec acc[Vec::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < Vec::kLanes; ++i) acc[i] = Vec::set1(0.f);
    for (int64_t d = 0; d < size; d += Vec::kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < Vec::kLanes; ++i)
        acc[i] = fma(Vec::load(a + i * size + d), Vec::load(b + i / kSlots * kSlots * size + d), acc[i]);
    }
    sums_of(acc).store(tile);
  }
}

// kOut x kWide vectors of combine_rows.
template <int kOut, int kWide, class Write>
MMK_INLINE void combine_block(const float* coefficients, int64_t out_step, int64_t in_step, const float* rows,
                              int64_t count, int64_t size, int written, const Write& write) {
  Vec acc[kOut][kWide];
#pragma GCC unroll 4
  for (int i = 0; i < kOut; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) acc[i][w] = Vec::set1(0.f);
  for (int64_t j = 0; j < count; ++j) {
    Vec right[kWide];
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) right[w] = Vec::load(rows + j * size + w * Vec::kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kOut; ++i) {
      const Vec left = Vec::set1(coefficients[i * out_step + j * in_step]);
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) acc[i][w] = fma(left, right[w], acc[i][w]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kOut; ++i) {
    if (i >= written) break;
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) write(i, w * Vec::kLanes, acc[i][w]);
  }
}

// The sums over j of coefficient[i * out_step + j * in_step] rows[j], for each i < count, handed to write(i, d,
// vector).
template <class Write>
MMK_INLINE void combine_rows(const float* coefficients, int64_t out_step, int64_t in_step, const float* rows,
                             int64_t count, int64_t size, const Write& write) {
  constexpr int kOut = 4, kWide = Vec::kLanes == 16 ? 4 : 2;
  for (int64_t i = 0; i < count; i += kOut) {
    // A block past the end computes rows that are not written: their coefficients are within the tile.
    const int written = static_cast<int>(std::min<int64_t>(kOut, count - i));
    const float* left = coefficients + i * out_step;
    int64_t d = 0;
    const auto at = [&](int row, int64_t column, Vec value) { write(i + row, d + column, value); };
    for (; d + kWide * Vec::kLanes <= size; d += kWide * Vec::kLanes)
      combine_block<kOut, kWide>(left, out_step, in_step, rows + d, count, size, written, at);
    for (; d < size; d += Vec::kLanes)
      combine_block<kOut, 1>(left, out_step, in_step, rows + d, count, size, written, at);
  }
}

// Minus infinity in the lanes where the class token does not see itself.
template <int kSlots>
MMK_INLINE Vec hidden_lanes(const Sequence& q) {
  float lanes[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) lanes[i] = q.cls_hides_itself && i % kSlots == 0 ? kNegativeInfinity : 0.f;
  return Vec::load(lanes);
}

// The factors of a group of heads, as a tile.
template <int kSlots>
void dropout_tile(const AttentionForward& p, const Sequence& q, int64_t h0, int64_t heads, float* tile) {
  float factors[Vec::kLanes];
  for (int64_t g = 0; g < heads; ++g) {
    for (int64_t i = 0; i < q.count; ++i) {
      dropout_factors(p, q, h0 + g, i, factors);
      for (int64_t j = 0; j < q.count; ++j) tile[j * Vec::kLanes + g * kSlots + i] = factors[j];
    }
  }
}

template <Dtype kDtype, int kSlots, int kSize>
void short_forward(const AttentionForward& p, int64_t begin, int64_t end, float* scratch) {
  const Clips& c = p.clips;
  const ShortBuffers t(c, false, scratch);
  const int64_t size = kSize > 0 ? kSize : t.size;
  const int64_t ahead = c.sequence_step * p.token_stride * bytes_of(kDtype);
  constexpr int64_t kHeads = Vec::kLanes / kSlots;
  // Lanes without a query hold what was there before; it is not read, but it must be numbers.
  std::fill(t.a, t.a + Vec::kLanes * size, 0.f);
  std::fill(t.b, t.b + Vec::kLanes * size, 0.f);
  std::fill(t.scores, t.scores + Vec::kLanes * Vec::kLanes, 0.f);
  const Vec scale = Vec::set1(p.scale);
  for (int64_t task = begin; task < end; ++task) {
    const Sequence q = sequence_of(c, task / c.sequences, task % c.sequences, t.tokens);
    const Vec hidden = hidden_lanes<kSlots>(q);
    for (int64_t h = 0; h < c.heads; ++h) clear_absent_outputs(p, q, h);
    for (int64_t h0 = 0; q.count > 0 && h0 < c.heads; h0 += kHeads) {
      const int64_t heads = std::min(kHeads, c.heads - h0);
      for (int64_t g = 0; g < heads; ++g) {
        gather_rows<kDtype>(rows_of(p, q, 0, h0 + g), q.count, c.head, size, ahead, t.a + g * kSlots * size);
        gather_rows<kDtype>(rows_of(p, q, 1, h0 + g), q.count, c.head, size, ahead, t.b + g * kSlots * size);
        gather_rows<kDtype>(rows_of(p, q, 2, h0 + g), q.count, c.head, size, ahead, t.c + g * kSlots * size);
      }
      dot_rows<kSlots>(t.a, t.b, q.count, size, t.scores);
      Vec largest = Vec::set1(kNegativeInfinity), sum = Vec::set1(0.f);
      for (int64_t j = 0; j < q.count; ++j) {
        Vec x = Vec::load(t.scores + j * Vec::kLanes) * scale;
        if (j == 0) x = x + hidden;
        x.store(t.scores + j * Vec::kLanes);
        largest = max(largest, x);
      }
      for (int64_t j = 0; j < q.count; ++j) {
        const Vec e = exp(Vec::load(t.scores + j * Vec::kLanes) - largest);
        e.store(t.scores + j * Vec::kLanes);
        sum = sum + e;
      }
      float largests[Vec::kLanes], sums[Vec::kLanes], lse[Vec::kLanes];
      largest.store(largests);
      sum.store(sums);
      (largest + log(sum)).store(lse);
      const Vec share = Vec::set1(1.f) / sum;
      if (p.dropout.threshold != 0) dropout_tile<kSlots>(p, q, h0, heads, t.factors);
      for (int64_t j = 0; j < q.count; ++j) {
        Vec probability = Vec::load(t.scores + j * Vec::kLanes) * share;
        if (p.dropout.threshold != 0) probability = probability * Vec::load(t.factors + j * Vec::kLanes);
        probability.store(t.scores + j * Vec::kLanes);
      }
      for (int64_t g = 0; g < heads; ++g) {
        for (int64_t i = 0; i < q.count; ++i) {
          const int64_t at = g * kSlots + i;
          keep_lse(p, q, h0 + g, i, largests[at], sums[at], lse[at]);
        }
        float* cls = p.cls_out + ((q.b * c.heads + h0 + g) * c.sequences + q.s) * c.head;
        combine_rows(t.scores + g * kSlots, 1, Vec::kLanes, t.c + g * kSlots * size, q.count, size,
                     [&](int64_t i, int64_t d, Vec value) {
                       if (q.is_cls(i)) return store_floats<Dtype::kFloat32>(value, cls, d, c.head);
                       store_floats<kDtype>(value, out_row(p, q.b, q.tokens[i], h0 + g), d, c.head);
                     });
      }
    }
  }
}

template <Dtype kDtype, int kSlots, int kSize>
void short_backward(const AttentionBackward& p, int64_t begin, int64_t end, float* scratch) {
  const AttentionForward& f = p.forward;
  const Clips& c = f.clips;
  const ShortBuffers t(c, true, scratch);
  const int64_t size = kSize > 0 ? kSize : t.size;
  const int64_t ahead = c.sequence_step * f.token_stride * bytes_of(kDtype);
  const int64_t grad_ahead = c.sequence_step * p.grad_token_stride * bytes_of(kDtype);
  constexpr int64_t kHeads = Vec::kLanes / kSlots;
  for (float* rows : {t.a, t.b, t.c, t.d}) std::fill(rows, rows + Vec::kLanes * size, 0.f);
  for (float* tile : {t.scores, t.products}) std::fill(tile, tile + Vec::kLanes * Vec::kLanes, 0.f);
  const Vec scale = Vec::set1(f.scale);
  for (int64_t task = begin; task < end; ++task) {
    const Sequence q = sequence_of(c, task / c.sequences, task % c.sequences, t.tokens);
    const Vec hidden = hidden_lanes<kSlots>(q);
    const float cls_share = q.cls_first ? 1.f / static_cast<float>(cls_divisor(c, q.b)) : 1.f;
    for (int64_t h = 0; h < c.heads; ++h) clear_absent_gradients(p, q, h);
    for (int64_t h0 = 0; q.count > 0 && h0 < c.heads; h0 += kHeads) {
      const int64_t heads = std::min(kHeads, c.heads - h0);
      float lse[Vec::kLanes] = {}, split_deltas[Vec::kLanes] = {}, split_shares[Vec::kLanes] = {};
      for (int64_t g = 0; g < heads; ++g) {
        const int64_t h = h0 + g, at = g * kSlots * size;
        gather_rows<kDtype>(rows_of(f, q, 0, h), q.count, c.head, size, ahead, t.a + at);
        gather_rows<kDtype>(rows_of(f, q, 1, h), q.count, c.head, size, ahead, t.b + at);
        gather_rows<kDtype>(rows_of(f, q, 2, h), q.count, c.head, size, ahead, t.c + at);
        gather_rows<kDtype>(grad_rows_of(p, q, h), q.count, c.head, size, grad_ahead, t.d + at);
        for (int64_t i = 0; i < q.count; ++i) lse[g * kSlots + i] = f.lse[lse_index(c, q, h, i)];
        for (int64_t d = 0; q.cls_first && d < size; ++d) t.d[at + d] *= cls_share;
        if (q.cls_is_split) {
          split_shares[g * kSlots] = p.cls_shares[q.b * c.heads + h];
          split_deltas[g * kSlots] = split_delta(p, q, h);
        }
      }
      dot_rows<kSlots>(t.a, t.b, q.count, size, t.scores);
      dot_rows<kSlots>(t.d, t.c, q.count, size, t.products);
      const bool drops = f.dropout.threshold != 0;
      if (drops) dropout_tile<kSlots>(f, q, h0, heads, t.factors);
      const Vec lse_lanes = Vec::load(lse);
      Vec sum = Vec::set1(0.f), delta = Vec::set1(0.f);
      for (int64_t j = 0; j < q.count; ++j) {
        const int64_t at = j * Vec::kLanes;
        Vec x = Vec::load(t.scores + at) * scale;
        if (j == 0) x = x + hidden;
        const Vec e = exp(x - lse_lanes);
        Vec dp = Vec::load(t.products + at);
        if (drops) {
          dp = dp * Vec::load(t.factors + at);
          dp.store(t.products + at);
        }
        e.store(t.scores + at);
        sum = sum + e;
        delta = fma(e, dp, delta);
      }
      Vec share = Vec::set1(1.f) / sum;
      delta = delta * share;
      if (q.cls_is_split) {
        float shares[Vec::kLanes], deltas[Vec::kLanes];
        share.store(shares);
        delta.store(deltas);
        for (int64_t i = 0; i < heads * kSlots; i += kSlots) {
          shares[i] = split_shares[i];
          deltas[i] = split_deltas[i];
        }
        share = Vec::load(shares);
        delta = Vec::load(deltas);
      }
      for (int64_t j = 0; j < q.count; ++j) {
        const int64_t at = j * Vec::kLanes;
        const Vec probability = Vec::load(t.scores + at) * share;
        (probability * scale * (Vec::load(t.products + at) - delta)).store(t.products + at);
        (drops ? probability * Vec::load(t.factors + at) : probability).store(t.scores + at);
      }
      for (int64_t g = 0; g < heads; ++g) {
        const int64_t h = h0 + g, at = g * kSlots;
        const auto writer = [&](int64_t part) {
          return [&, part](int64_t i, int64_t d, Vec value) {
            if (q.is_cls(i)) return store_floats<Dtype::kFloat32>(value, cls_grad(p, q, part, h), d, c.head);
            store_floats<kDtype>(value, grad_row(p, q.b, q.tokens[i], part, h), d, c.head);
          };
        };
        combine_rows(t.products + at, 1, Vec::kLanes, t.b + at * size, q.count, size, writer(0));
        combine_rows(t.products + at, Vec::kLanes, 1, t.a + at * size, q.count, size, writer(1));
        combine_rows(t.scores + at, Vec::kLanes, 1, t.d + at * size, q.count, size, writer(2));
      }
    }
  }
}

// ---- The long schedule

template <class Product>
struct LongBuffers {
  static constexpr bool kPairs = Product::kPerWord == 2;

  int64_t words, word_panels;  // of a row of features
  int64_t size;                // of a row of features, whole panels
  int64_t keys;                // capacity: whole register tiles, and an even number
  int64_t stride;              // of a row of scores
  int64_t rows;                // of a block of queries
  int64_t* tokens;
  float* key_columns;    // [keys / kPanel][words][kPanel]
  float* value_columns;  // as key_columns, backward alone
  float* value_rows;     // [size / kPanel][keys][kPanel], pairs of rows for bfloat16
  float* key_rows;       // as value_rows, backward alone
  float* query_words;    // [word_panels][rows][kPanel]
  float* scores;         // [rows][stride]
  float* results;        // [rows][size]
  // Backward alone.
  float* grad_words;                   // as query_words, of the gradient of the output
  float *query_pairs, *grad_pairs;     // rows for the products over queries; float32: the words serve
  float* products;                     // [rows][stride], dp and ds
  float *score_pairs, *product_pairs;  // bfloat16: pairs of queries, [rows / 2][stride]; float32: scores and products
  float *key_grads, *value_grads;      // [size / kPanel][keys][kPanel]
  float* factors;                      // [stride]
  int64_t floats = 0;

  LongBuffers(const Clips& c, bool backward, float* scratch) {
    words = (c.head + Product::kPerWord - 1) / Product::kPerWord;
    word_panels = (words + kPanel - 1) / kPanel;
    size = round_up(c.head, kPanel);
    const int64_t most = c.length + c.cls_takes_part;
    keys = round_up(most, std::max(kRows, 2));
    stride = round_up(most, kPanel);
    if (stride % 1024 == 0) stride += 16;  // rows 4 KiB apart would fight for the same lines of L1
    rows = std::clamp<int64_t>(kBlockFloats / stride / kRows * kRows, 2 * kRows, kMostRows);
    rows = std::min(rows, round_up(most, kRows));
    const auto take = [&](int64_t count) {
      float* p = scratch + floats;
      floats += round_up(count, 16);
      return p;
    };
    tokens = reinterpret_cast<int64_t*>(take(2 * most));
    const int64_t columns = round_up(most, kPanel) * words, by_rows = size * keys / Product::kPerWord;
    key_columns = take(columns);
    value_rows = backward ? nullptr : take(by_rows);
    query_words = take(word_panels * rows * kPanel);
    scores = take(rows * stride);
    results = take(rows * size);
    factors = take(stride);
    if (!backward) return;
    value_columns = take(columns);
    key_rows = take(by_rows);
    grad_words = take(word_panels * rows * kPanel);
    query_pairs = kPairs ? take(size * rows / 2) : query_words;
    grad_pairs = kPairs ? take(size * rows / 2) : grad_words;
    products = take(rows * stride);
    score_pairs = kPairs ? take(rows / 2 * stride) : scores;
    product_pairs = kPairs ? take(rows / 2 * stride) : products;
    key_grads = take(size * keys);
    value_grads = take(size * keys);
  }

  // Of the register kernel by the product of all queries and keys.
  int64_t calls(int64_t count) const { return (count + kPanel - 1) / kPanel * ((count + kRows - 1) / kRows); }

  RowsLeft left(const float* words_of_rows, int64_t row) const {
    return {words_of_rows + row * kPanel, kPanel, (rows - 1) * kPanel};
  }
};

// The rows that the next task needs, which lie a fixed way from this one's: fetched a few at a time while the register
// kernel works. They are far apart, so that the machine does not see them coming by itself.
struct NextRows {
  struct Part {
    ListedFeatures rows;
    int64_t ahead;  // bytes
  };
  Part parts[4];
  int num_parts;
  int64_t count, row_bytes, at_once;
  int64_t at = 0;

  // Of the task after head h of a sequence: the next head, or the first one of the next sequence.
  static int64_t way(const Clips& c, int64_t h, int64_t token_stride, Dtype dtype) {
    return (h + 1 < c.heads ? c.head : c.sequence_step * token_stride - h * c.head) * bytes_of(dtype);
  }
  void share(int64_t calls) { at_once = (count * num_parts + calls - 1) / calls; }

  MMK_INLINE void fetch() {
    for (int64_t n = 0; n < at_once && at < count * num_parts; ++n, ++at) {
      const Part& part = parts[at % num_parts];
      const char* row = static_cast<const char*>(part.rows.row(at / num_parts)) + part.ahead;
      for (int64_t line = 0; line < row_bytes; line += 64) __builtin_prefetch(row + line, 0, 2);
    }
  }
};

// Rows [row, row + count) as the right operand of a product that contracts over the rows.
template <class Product, class Rows>
void pack_contracted_rows(const Rows& x, int64_t row, int64_t count, int64_t size, int64_t capacity, float* out) {
#ifdef MMK_HAS_BF16_PRODUCT
  if constexpr (Product::kPerWord == 2) return pack_row_pairs(x, row, count, size, capacity, out);
#endif
  pack_rows<Product>(x, row, count, size, capacity, out);
}

// tile[row, row + kRows)[stride] = words of rows times columns. A few rows at a time, so that what comes next, softmax
// or its derivative, finds them in L1.
template <class Product>
void multiply_columns(const LongBuffers<Product>& t, const float* words_of_rows, const float* columns, int64_t row,
                      int64_t keys, float* tile, NextRows& next) {
  for (int64_t j = 0; j < keys; j += kPanel) {
    next.fetch();
    const float* panel = columns + j * t.words;
    const FloatTile to{tile + row * t.stride + j, t.stride, false};
    if (keys - j <= kPanel / 2) {
      multiply<Product, kVecs / 2>(t.words, t.left(words_of_rows, row), panel, to);
    } else {
      multiply<Product>(t.words, t.left(words_of_rows, row), panel, to);
    }
  }
}

// results[rows][size] = tile times rows of features, contracted over the keys.
template <class Product>
void multiply_rows(const LongBuffers<Product>& t, const float* tile, const float* right, int64_t rows, int64_t keys) {
  const int64_t k_words = (keys + Product::kPerWord - 1) / Product::kPerWord;
  for (int64_t d = 0; d < t.size; d += kPanel) {
    const float* panel = right + d * (t.keys / Product::kPerWord);
    for (int64_t i = 0; i < rows; i += kRows)
      multiply<Product>(k_words, RowsLeft{tile + i * t.stride, t.stride, 0}, panel,
                        FloatTile{t.results + i * t.size + d, t.size, false});
  }
}

// grads[keys] += transposed tile times rows of features, contracted over the queries of a block.
template <class Product>
void add_transposed(const LongBuffers<Product>& t, const float* tile, const float* right, int64_t rows, int64_t keys,
                    bool first, float* grads) {
  const int64_t k_words = (rows + Product::kPerWord - 1) / Product::kPerWord;
  for (int64_t d = 0; d < t.size; d += kPanel) {
    const float* panel = right + d * (t.rows / Product::kPerWord);
    for (int64_t j = 0; j < keys; j += kRows)
      multiply<Product>(k_words, ColumnsLeft{tile + j, t.stride}, panel,
                        FloatTile{grads + d * t.keys + j * kPanel, kPanel, !first});
  }
}

// Vector c of a row as the left operand of a product: floats, or bfloat16 in place.
template <class Product>
MMK_INLINE void put_left(Vec value, float* row, int64_t c) {
#ifdef MMK_HAS_BF16_PRODUCT
  if constexpr (Product::kPerWord == 2) return store_bf16(value, reinterpret_cast<uint16_t*>(row) + c);
#endif
  value.store(row + c);
}

// The scores scaled in place, minus infinity in front.
void hide_first(float* row, int64_t keys, float scale) {
  for (int64_t c = 0; c < keys; ++c) row[c] = c == 0 ? kNegativeInfinity : row[c] * scale;
}

// e^(scaled score - largest) in place, zero past the last key; the largest of them and their sum.
template <class Product>
MMK_INLINE void softmax_row(float* row, int64_t keys, float scale_of_scores, const float* factors, float& largest_score,
                            float& sum_of_row) {
  const Vec scale = Vec::set1(scale_of_scores), edge = edge_of(keys);
  const int64_t last = round_up(keys, Vec::kLanes) - Vec::kLanes;
  const auto scaled = [&](int64_t c) { return Vec::load(row + c) * scale; };
  Vec largest = scaled(last) + edge;
  for (int64_t c = 0; c < last; c += Vec::kLanes) largest = max(largest, scaled(c));
  largest_score = largest.largest();
  const Vec shift = Vec::set1(largest_score);
  Vec sum = Vec::set1(0.f);
  const auto finish = [&](int64_t c, Vec x) {
    Vec e = exp(x - shift);
    sum = sum + e;
    if (factors != nullptr) e = e * Vec::load(factors + c);
    put_left<Product>(e, row, c);
  };
  for (int64_t c = 0; c < last; c += Vec::kLanes) finish(c, scaled(c));
  finish(last, scaled(last) + edge);
  sum_of_row = sum.sum();
}

template <class Product, Dtype kDtype>
void long_forward(const AttentionForward& p, int64_t begin, int64_t end, float* scratch) {
  const Clips& c = p.clips;
  const LongBuffers<Product> t(c, false, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t h = task % c.heads, bs = task / c.heads;
    const Sequence q = sequence_of(c, bs / c.sequences, bs % c.sequences, t.tokens);
    clear_absent_outputs(p, q, h);
    if (q.count == 0) continue;
    const ListedFeatures queries = rows_of(p, q, 0, h), keys = rows_of(p, q, 1, h), values = rows_of(p, q, 2, h);
    const int64_t way = NextRows::way(c, h, p.token_stride, kDtype);
    NextRows next{{{queries, way}, {keys, way}, {values, way}}, 3, q.count, c.head * bytes_of(kDtype), 0};
    next.share(t.calls(q.count));
    pack_columns<Product>(keys, 0, q.count, c.head, t.key_columns);
    pack_contracted_rows<Product>(values, 0, q.count, c.head, t.keys, t.value_rows);
    float* cls = p.cls_out + ((q.b * c.heads + h) * c.sequences + q.s) * c.head;
    for (int64_t i0 = 0; i0 < q.count; i0 += t.rows) {
      const int64_t rows = std::min(t.rows, q.count - i0);
      pack_rows<Product>(queries, i0, rows, c.head, t.rows, t.query_words);
      float largest[kMostRows], sums[kMostRows], lse[kMostRows];
      for (int64_t i = 0; i < rows; ++i) {
        if (i % kRows == 0) multiply_columns(t, t.query_words, t.key_columns, i, q.count, t.scores, next);
        const float* factors = nullptr;
        if (p.dropout.threshold != 0) {
          dropout_factors(p, q, h, i0 + i, t.factors);
          factors = t.factors;
        }
        float *row = t.scores + i * t.stride, scale = p.scale;
        if (q.is_cls(i0 + i) && q.cls_hides_itself) {
          hide_first(row, q.count, scale);
          scale = 1.f;
        }
        softmax_row<Product>(row, q.count, scale, factors, largest[i], sums[i]);
      }
      for (int64_t i = 0; i < rows; i += Vec::kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(Vec::kLanes, rows - i));
        (Vec::load(largest + i, n) + log(Vec::load(sums + i, n))).store(lse + i, n);
      }
      for (int64_t i = 0; i < rows; ++i) keep_lse(p, q, h, i0 + i, largest[i], sums[i], lse[i]);
      multiply_rows(t, t.scores, t.value_rows, rows, q.count);
      for (int64_t i = 0; i < rows; ++i)
        write_row<kDtype>(t.results + i * t.size, 1.f / sums[i], q.is_cls(i0 + i), out_row(p, q.b, q.tokens[i0 + i], h),
                          cls, c.head);
    }
  }
}

// Of a class token's row of which this sequence holds a part.
struct Split {
  float share, delta;
};

// scores -> probabilities (with dropout), products -> gradients of the scores (times the scale), both in place.
template <class Product>
MMK_INLINE void differentiate_row(float* scores, float* products, int64_t keys, float scale_of_scores, float lse,
                                  bool hides_first, const float* factors, const Split* split) {
  const Vec scale = Vec::set1(scale_of_scores), shift = Vec::set1(lse);
  const Vec start = start_of(hides_first), edge = edge_of(keys);
  const int64_t padded = round_up(keys, Vec::kLanes), last = padded - Vec::kLanes;
  Vec sums = Vec::set1(0.f), deltas = Vec::set1(0.f);
  for (int64_t c = 0; c < padded; c += Vec::kLanes) {
    Vec x = Vec::load(scores + c) * scale - shift;
    if (c == 0) x = x + start;
    if (c == last) x = x + edge;
    const Vec e = exp(x);
    Vec dp = Vec::load(products + c);
    if (factors != nullptr) {
      dp = dp * Vec::load(factors + c);
      dp.store(products + c);
    }
    sums = sums + e;
    deltas = fma(e, dp, deltas);
    e.store(scores + c);
  }
  const float own_share = split ? split->share : 1.f / sums.sum();
  const Vec share = Vec::set1(own_share), delta = Vec::set1(split ? split->delta : deltas.sum() * own_share);
  for (int64_t c = 0; c < padded; c += Vec::kLanes) {
    const Vec probability = Vec::load(scores + c) * share;
    (probability * scale * (Vec::load(products + c) - delta)).store(products + c);
    (factors != nullptr ? probability * Vec::load(factors + c) : probability).store(scores + c);
  }
}

#ifdef MMK_HAS_BF16_PRODUCT
// Two rows of a tile as pairs, and, if asked for, each as bfloat16 in place: the two forms that the products contract.
MMK_INLINE void round_two_rows(float* first, float* second, int64_t padded, bool in_place, float* pairs) {
  for (int64_t c = 0; c < padded; c += Vec::kLanes) {
    const Vec a = Vec::load(first + c), b = second != nullptr ? Vec::load(second + c) : Vec::set1(0.f);
    round_to_pairs(a, b).store(pairs + c);
    if (!in_place) continue;
    store_bf16(a, reinterpret_cast<uint16_t*>(first) + c);
    if (second != nullptr) store_bf16(b, reinterpret_cast<uint16_t*>(second) + c);
  }
}
#endif

template <class Product, Dtype kDtype>
void long_backward(const AttentionBackward& p, int64_t begin, int64_t end, float* scratch) {
  const AttentionForward& f = p.forward;
  const Clips& c = f.clips;
  const LongBuffers<Product> t(c, true, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t h = task % c.heads, bs = task / c.heads;
    const Sequence q = sequence_of(c, bs / c.sequences, bs % c.sequences, t.tokens);
    clear_absent_gradients(p, q, h);
    if (q.count == 0) continue;
    const float cls_share = q.cls_first ? 1.f / static_cast<float>(cls_divisor(c, q.b)) : 1.f;
    const Split split = q.cls_is_split ? Split{p.cls_shares[q.b * c.heads + h], split_delta(p, q, h)} : Split{};
    const ListedFeatures queries = rows_of(f, q, 0, h), keys = rows_of(f, q, 1, h), values = rows_of(f, q, 2, h);
    const ListedFeatures grads = grad_rows_of(p, q, h);
    const int64_t way = NextRows::way(c, h, f.token_stride, kDtype);
    NextRows next{
        {{queries, way}, {keys, way}, {values, way}, {grads, NextRows::way(c, h, p.grad_token_stride, kDtype)}},
        4,
        q.count,
        c.head * bytes_of(kDtype),
        0};
    next.share(2 * t.calls(q.count));
    pack_columns<Product>(keys, 0, q.count, c.head, t.key_columns);
    pack_columns<Product>(values, 0, q.count, c.head, t.value_columns);
    pack_contracted_rows<Product>(keys, 0, q.count, c.head, t.keys, t.key_rows);
    const int64_t padded = round_up(q.count, Vec::kLanes);
    const auto write = [&](const float* from, float scale, int64_t part, int64_t i) {
      write_row<kDtype>(from, scale, q.is_cls(i), grad_row(p, q.b, q.tokens[i], part, h), cls_grad(p, q, part, h),
                        c.head);
    };
    for (int64_t i0 = 0; i0 < q.count; i0 += t.rows) {
      const int64_t rows = std::min(t.rows, q.count - i0);
      pack_rows<Product>(queries, i0, rows, c.head, t.rows, t.query_words);
      pack_rows<Product>(grads, i0, rows, c.head, t.rows, t.grad_words);
#ifdef MMK_HAS_BF16_PRODUCT
      if constexpr (LongBuffers<Product>::kPairs) {
        pack_row_pairs(queries, i0, rows, c.head, t.rows, t.query_pairs);
        pack_row_pairs(grads, i0, rows, c.head, t.rows, t.grad_pairs);
      }
#endif
      for (int64_t i = 0; i < rows; ++i) {
        if (i % kRows == 0) {
          multiply_columns(t, t.query_words, t.key_columns, i, q.count, t.scores, next);
          multiply_columns(t, t.grad_words, t.value_columns, i, q.count, t.products, next);
        }
        float *row = t.scores + i * t.stride, *products = t.products + i * t.stride;
        const bool is_cls = q.is_cls(i0 + i);
        const float* factors = nullptr;
        if (f.dropout.threshold != 0) {
          dropout_factors(f, q, h, i0 + i, t.factors);
          factors = t.factors;
        }
        if (is_cls) {
          // The gradient of a mean: dp grows smaller by the count, and dv by it, see below.
          for (int64_t k = 0; k < q.count; ++k) products[k] *= cls_share;
        }
        differentiate_row<Product>(row, products, q.count, f.scale, f.lse[lse_index(c, q, h, i0 + i)],
                                   is_cls && q.cls_hides_itself, factors, is_cls && q.cls_is_split ? &split : nullptr);
        if (is_cls)
          for (int64_t k = 0; k < padded; ++k) row[k] *= cls_share;
#ifdef MMK_HAS_BF16_PRODUCT
        if constexpr (LongBuffers<Product>::kPairs) {
          if (i % 2 == 0 && i + 1 < rows) continue;
          const int64_t first = i / 2 * 2, pair = i / 2 * t.stride;
          const auto second = [&](float* tile) { return first < i ? tile + i * t.stride : nullptr; };
          round_two_rows(t.scores + first * t.stride, second(t.scores), padded, false, t.score_pairs + pair);
          round_two_rows(t.products + first * t.stride, second(t.products), padded, true, t.product_pairs + pair);
        }
#endif
      }
      add_transposed(t, t.score_pairs, t.grad_pairs, rows, q.count, i0 == 0, t.value_grads);
      add_transposed(t, t.product_pairs, t.query_pairs, rows, q.count, i0 == 0, t.key_grads);
      multiply_rows(t, t.products, t.key_rows, rows, q.count);
      for (int64_t i = 0; i < rows; ++i) write(t.results + i * t.size, 1.f, 0, i0 + i);
    }
    float* row = t.results;
    for (int64_t j = 0; j < q.count; ++j) {
      for (const int64_t part : {1, 2}) {
        const float* panels = part == 1 ? t.key_grads : t.value_grads;
        for (int64_t d = 0; d < t.size; d += kPanel)
          std::memcpy(row + d, panels + d * t.keys + j * kPanel, kPanel * sizeof(float));
        write(row, 1.f, part, j);
      }
    }
  }
}

// ---- Choices

// float32 everywhere; bfloat16 as pairs where the machine multiplies them, else as float32.
template <Dtype kDtype>
struct ProductOf {
  using Type = Float32Product;
};
#ifdef MMK_HAS_BF16_PRODUCT
template <>
struct ProductOf<Dtype::kBFloat16> {
  using Type = BFloat16Product;
};
#endif

// Calls with the lanes of a head, and with the size of its rows where it is the common one, else 0.
template <class Call>
void with_slots(int64_t slots, int64_t head, const Call& call) {
  const auto with_size = [&](auto lanes) {
    head == 64 ? call(lanes, std::integral_constant<int, 64>{}) : call(lanes, std::integral_constant<int, 0>{});
  };
  if (slots == 4) return with_size(std::integral_constant<int, 4>{});
  if constexpr (Vec::kLanes >= 8)
    if (slots == 8) return with_size(std::integral_constant<int, 8>{});
  if constexpr (Vec::kLanes >= 16)
    if (slots == 16) return with_size(std::integral_constant<int, 16>{});
}

AttentionPlan plan(const AttentionForward& p, bool backward) {
  const Clips& c = p.clips;
  const bool is_short = slots_of(c.length + c.cls_takes_part) > 0;
  AttentionPlan plan{c.batch * c.sequences * (is_short ? 1 : c.heads), 0};
  if (is_short) {
    plan.scratch_floats = ShortBuffers(c, backward, nullptr).floats;
  } else {
    with_dtype(p.dtype, [&](auto dtype) {
      plan.scratch_floats = LongBuffers<typename ProductOf<dtype()>::Type>(c, backward, nullptr).floats;
    });
  }
  return plan;
}

void forward(const AttentionForward& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t slots = slots_of(p.clips.length + p.clips.cls_takes_part);
  with_dtype(p.dtype, [&](auto dtype) {
    if (slots > 0)
      return with_slots(slots, p.clips.head, [&](auto lanes, auto size) {
        short_forward<dtype(), lanes(), size()>(p, begin, end, scratch);
      });
    long_forward<typename ProductOf<dtype()>::Type, dtype()>(p, begin, end, scratch);
  });
}

void backward(const AttentionBackward& p, int64_t begin, int64_t end, float* scratch) {
  const Clips& c = p.forward.clips;
  const int64_t slots = slots_of(c.length + c.cls_takes_part);
  with_dtype(p.forward.dtype, [&](auto dtype) {
    if (slots > 0)
      return with_slots(slots, c.head, [&](auto lanes, auto size) {
        short_backward<dtype(), lanes(), size()>(p, begin, end, scratch);
      });
    long_backward<typename ProductOf<dtype()>::Type, dtype()>(p, begin, end, scratch);
  });
}

// The class token of clip and head `task`: the mean of its outputs, or their sum in the shares of one softmax.
void forward_cls(const AttentionForward& p, int64_t begin, int64_t end) {
  const Clips& c = p.clips;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / c.heads, h = task % c.heads;
    void* out = out_row(p, b, 0, h);
    if (!c.cls_takes_part) {
      std::memset(out, 0, c.head * bytes_of(p.dtype));
      continue;
    }
    const float* parts = p.cls_out + task * c.sequences * c.head;
    const float *largests = p.cls_largest + task * c.sequences, *sums = p.cls_sums + task * c.sequences;
    float total = 0, largest = kNegativeInfinity;
    if (c.cls_is_global) {
      for (int64_t s = 0; s < c.sequences; ++s) largest = std::max(largest, largests[s]);
      for (int64_t s = 0; s < c.sequences; ++s) total += sums[s] * std::exp(largests[s] - largest);
      p.lse[task * c.rows()] = largest + std::log(total);
    } else {
      total = static_cast<float>(cls_divisor(c, b));
    }
    with_dtype(p.dtype, [&](auto dtype) {
      for (int64_t d = 0; d < c.head; d += Vec::kLanes) {
        Vec sum = Vec::set1(0.f);
        for (int64_t s = 0; s < c.sequences; ++s) {
          const Vec part = load_floats<Dtype::kFloat32>(parts + s * c.head, d, c.head);
          sum = c.cls_is_global ? fma(part, Vec::set1(sums[s] * std::exp(largests[s] - largest)), sum) : sum + part;
        }
        store_floats<dtype()>(sum * Vec::set1(1.f / total), out, d, c.head);
      }
    });
  }
}

// What normalises the class token's probabilities again, as each sequence does for its own rows.
void prepare_cls(const AttentionBackward& p, int64_t begin, int64_t end) {
  const AttentionForward& f = p.forward;
  const Clips& c = f.clips;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / c.heads, h = task % c.heads;
    const float lse = f.lse[task * c.rows()];
    const auto row = [&](int64_t token, int64_t part) {
      const int64_t at = b * f.batch_stride + token * f.token_stride + (part * c.heads + h) * c.head;
      return static_cast<const char*>(f.qkv) + at * bytes_of(f.dtype);
    };
    Vec sum = Vec::set1(0.f);
    float scores[Vec::kLanes];
    int filled = 0;
    const auto flush = [&] {
      std::fill(scores + filled, scores + Vec::kLanes, kNegativeInfinity);
      sum = sum + exp(Vec::load(scores) - Vec::set1(lse));
      filled = 0;
    };
    with_dtype(f.dtype, [&](auto dtype) {
      const auto visit = [&](int64_t token) {
        Vec products = Vec::set1(0.f);
        for (int64_t d = 0; d < c.head; d += Vec::kLanes)
          products =
              fma(load_floats<dtype()>(row(0, 0), d, c.head), load_floats<dtype()>(row(token, 1), d, c.head), products);
        scores[filled++] = products.sum() * f.scale;
        if (filled == Vec::kLanes) flush();
      };
      visit(0);
      for (int64_t s = 0; s < c.sequences; ++s)
        for (int64_t j = 0; j < c.length; ++j)
          if (c.present(b, s, j)) visit(c.token(s, j));
    });
    flush();
    p.cls_shares[task] = 1.f / sum.sum();
  }
}

void backward_cls(const AttentionBackward& p, int64_t begin, int64_t end) {
  const Clips& c = p.forward.clips;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / c.heads, h = task % c.heads;
    for (int64_t part = 0; part < 3; ++part) {
      void* out = grad_row(p, b, 0, part, h);
      if (!c.cls_takes_part) {
        std::memset(out, 0, c.head * bytes_of(p.forward.dtype));
        continue;
      }
      const float* parts = p.cls_grads + (task * c.sequences * 3 + part) * c.head;
      with_dtype(p.forward.dtype, [&](auto dtype) {
        for (int64_t d = 0; d < c.head; d += Vec::kLanes) {
          Vec sum = Vec::set1(0.f);
          for (int64_t s = 0; s < c.sequences; ++s)
            sum = sum + load_floats<Dtype::kFloat32>(parts + s * 3 * c.head, d, c.head);
          store_floats<dtype()>(sum, out, d, c.head);
        }
      });
    }
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels{plan, forward, forward_cls, backward, prepare_cls, backward_cls};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
