// The schedule for sequences of more rows than a vector has lanes.
//
// A task is a head of a sequence. Its keys and values are packed once, and blocks of queries pass by them: the scores
// of a block against all keys lie in L2, where the softmax is taken in place.
#pragma once

#include "dropout.h"
#include "sequences.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace divided_attention {

// A block's tile of scores takes 2^16 floats = 256 KiB, half of a 512 KiB L2. Only if 64 rows take less, or if they are
// so long that 2 kRows of them take more, is it otherwise. The backward pass has two such tiles.
constexpr int64_t kBlockFloats = 1 << 16;
// The most queries of a block: half of the 197 tokens of a frame at 224 pixels, in whole register tiles. A product over
// the queries of a block reads and writes its sums once for each block.
constexpr int64_t kMostRows = (197 / 2 / kRows + 1) * kRows;
// The rows of this many register tiles are multiplied by a panel of keys while it lies in L1.
constexpr int kTilesTogether = 2;

// The buffers of one thread, cut from its scratch.
template <class Product>
struct LongBuffers {
  static constexpr bool kPairs = Product::kPerWord == 2;

  int64_t words;         // of a row of features
  int64_t words_stride;  // of a row of words: whole vectors
  int64_t size;          // of a row of features, whole panels
  int64_t keys;          // capacity: an even number
  int64_t stride;        // of a row of scores
  int64_t rows;          // of a block of queries
  int64_t* tokens;
  float* key_columns;    // [keys / kPanel][words][kPanel]
  float* value_columns;  // as key_columns, backward alone
  float* value_rows;     // [size / kPanel][keys][kPanel], pairs of rows for bfloat16
  float* key_rows;       // as value_rows, backward alone
  float* query_words;    // [rows][words_stride]
  float* scores;         // [rows][stride]
  float* results;        // [rows][size]
  float* factors;        // [stride], dropout's of one row
  // Backward alone.
  float* grad_words;                   // as query_words, of the gradient of the output
  float *query_rows, *grad_rows;       // for the products over queries: [size / kPanel][rows][kPanel], or pairs of rows
  float* products;                     // [rows][stride], dp and ds
  float *score_pairs, *product_pairs;  // bfloat16: pairs of queries, [rows / 2][stride]; float32: scores and products
  float *key_grads, *value_grads;      // [size / kPanel][keys][kPanel]
  int64_t floats = 0;

  LongBuffers(const Clips& clips, bool backward, float* scratch) {
    words = (clips.head_size + Product::kPerWord - 1) / Product::kPerWord;
    words_stride = round_up(words, Vec::kLanes);
    if (words_stride % 1024 == 0) words_stride += 16;  // rows 4 KiB apart would fight for the same lines of L1
    size = round_up(clips.head_size, kPanel);
    const int64_t most = clips.most_rows();
    keys = round_up(most, 2);
    stride = round_up(most, kPanel);
    if (stride % 1024 == 0) stride += 16;  // as above
    const int64_t highest = std::clamp<int64_t>(kBlockFloats / stride / kRows * kRows, 2 * kRows, kMostRows);
    const int64_t blocks = (most + highest - 1) / highest;
    rows = round_up((most + blocks - 1) / blocks, kRows);  // a last block of few rows would cost nearly a whole one
    const auto take = [&](int64_t count) {
      float* start = scratch + floats;
      floats += round_up(count, 16);
      return start;
    };
    tokens = reinterpret_cast<int64_t*>(take(2 * most));
    const int64_t columns = round_up(most, kPanel) * words, by_rows = size * keys / Product::kPerWord;
    key_columns = take(columns);
    value_rows = backward ? nullptr : take(by_rows);
    query_words = take(rows * words_stride);
    scores = take(rows * stride);
    results = take(rows * size);
    factors = take(stride);
    if (!backward) return;
    value_columns = take(columns);
    key_rows = take(by_rows);
    grad_words = take(rows * words_stride);
    query_rows = take(size * rows / Product::kPerWord);
    grad_rows = take(size * rows / Product::kPerWord);
    products = take(rows * stride);
    score_pairs = kPairs ? take(rows / 2 * stride) : scores;
    product_pairs = kPairs ? take(rows / 2 * stride) : products;
    key_grads = take(size * keys);
    value_grads = take(size * keys);
  }

  // How often the register kernel is called for one Q K^T.
  int64_t calls(int64_t count) const { return (count + kPanel - 1) / kPanel * ((count + kRows - 1) / kRows); }
};

// Prefetches the rows that the next task reads, a few at each call of the register kernel. They lie a fixed number of
// bytes from this task's, but so far from each other that the machine does not see them coming.
struct NextRows {
  struct Part {
    ListedFeatures rows;
    int64_t ahead;  // bytes
  };
  Part parts[4];
  int num_parts;
  int64_t count, row_bytes, at_once;
  int64_t at = 0;

  // Returns the bytes from head `head` to the next one, or from the last one to the first of the next sequence.
  static int64_t bytes_ahead(const Clips& clips, int64_t head, int64_t token_stride, Dtype dtype) {
    const bool is_last = head + 1 == clips.heads;
    const int64_t to_next_sequence = clips.sequence_step * token_stride - head * clips.head_size;
    return (is_last ? to_next_sequence : clips.head_size) * bytes_of(dtype);
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

// ---- Products

// Copies rows [row, row + count) as words, one row after the other: the left operand of a product.
template <class Product, class Rows>
void copy_words(const Rows& x, int64_t row, int64_t count, int64_t size, int64_t stride, float* out) {
  with_dtype(x.dtype, [&](auto dtype) {
    for (int64_t i = 0; i < count; ++i, out += stride)
      for (int64_t w = 0; w * Product::kPerWord < size; w += Vec::kLanes)
        load_words<Product, dtype()>(x.row(row + i), w * Product::kPerWord, size).store(out + w);
  });
}

// tile[row, row + count)[stride] = words of rows times columns. A few rows at a time, so that what comes next, softmax
// or its derivative, finds them in L1.
template <class Product>
void multiply_columns(const LongBuffers<Product>& buffers, const float* words_of_rows, const float* columns,
                      int64_t row, int64_t count, int64_t keys, float* tile, NextRows& next) {
  for (int64_t j = 0; j < keys; j += kPanel) {
    const float* panel = columns + j * buffers.words;
    for_each_tile(count, [&](int64_t i, auto height) {
      next.fetch();
      const RowsLeft left{words_of_rows + (row + i) * buffers.words_stride, buffers.words_stride, 0};
      const FloatTile to{tile + (row + i) * buffers.stride + j, buffers.stride, false};
      if (keys - j <= kPanel / 2) {
        multiply<Product, height(), kVecs / 2>(buffers.words, left, panel, to);
      } else {
        multiply<Product, height()>(buffers.words, left, panel, to);
      }
    });
  }
}

// results[rows][size] = tile times rows of features, contracted over the keys.
template <class Product>
void multiply_rows(const LongBuffers<Product>& buffers, const float* tile, const float* right, int64_t rows,
                   int64_t keys) {
  const int64_t k_words = (keys + Product::kPerWord - 1) / Product::kPerWord;
  for (int64_t d = 0; d < buffers.size; d += kPanel) {
    const float* panel = right + d * (buffers.keys / Product::kPerWord);
    for_each_tile(rows, [&](int64_t i, auto height) {
      multiply<Product, height()>(k_words, RowsLeft{tile + i * buffers.stride, buffers.stride, 0}, panel,
                                  FloatTile{buffers.results + i * buffers.size + d, buffers.size, false});
    });
  }
}

// grads[keys] += transposed tile times rows of features, contracted over the queries of a block.
template <class Product>
void add_transposed(const LongBuffers<Product>& buffers, const float* tile, const float* right, int64_t rows,
                    int64_t keys, bool first, float* grads) {
  const int64_t k_words = (rows + Product::kPerWord - 1) / Product::kPerWord;
  for (int64_t d = 0; d < buffers.size; d += kPanel) {
    const float* panel = right + d * (buffers.rows / Product::kPerWord);
    for_each_tile(keys, [&](int64_t j, auto height) {
      multiply<Product, height()>(k_words, ColumnsLeft{tile + j, buffers.stride}, panel,
                                  FloatTile{grads + d * buffers.keys + j * kPanel, kPanel, !first});
    });
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

// ---- Softmax and its derivative

// For the first vector of a row: minus infinity in lane 0 if its key is hidden.
MMK_INLINE Vec start_of(bool hides_first) {
  float lanes[Vec::kLanes] = {};
  if (hides_first) lanes[0] = kNegativeInfinity;
  return Vec::load(lanes);
}

// Scales the scores in place and hides the first key.
inline void hide_first(float* row, int64_t keys, float scale) {
  for (int64_t c = 0; c < keys; ++c) row[c] = c == 0 ? kNegativeInfinity : row[c] * scale;
}

struct Softmax {
  float largest, sum;  // of the scaled scores, and of e^(score - largest) before dropout
};

// e^(scaled score - largest), times dropout's factors, in place; zero past the last key.
template <class Product>
Softmax softmax_row(float* row, int64_t keys, float scale_of_scores, const float* factors) {
  const Vec scale = Vec::set1(scale_of_scores), edge = edge_of(keys);
  const int64_t last = round_up(keys, Vec::kLanes) - Vec::kLanes;
  const auto scaled = [&](int64_t c) { return Vec::load(row + c) * scale; };
  Vec largest = scaled(last) + edge;
  for (int64_t c = 0; c < last; c += Vec::kLanes) largest = max(largest, scaled(c));
  const float largest_score = largest.largest();
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
  return {largest_score, sum.sum()};
}

// scores -> probabilities (with dropout), products -> gradients of the scores (times the scale), both in place.
inline void differentiate_row(float* scores, float* products, int64_t keys, float scale_of_scores, float lse,
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
// A last row has no second one beside it.
inline void round_two_rows(float* first, float* second, int64_t padded, bool in_place, float* pairs) {
  for (int64_t c = 0; c < padded; c += Vec::kLanes) {
    const Vec a = Vec::load(first + c), b = second != nullptr ? Vec::load(second + c) : Vec::set1(0.f);
    round_to_pairs(a, b).store(pairs + c);
    if (!in_place) continue;
    store_bf16(a, reinterpret_cast<uint16_t*>(first) + c);
    if (second != nullptr) store_bf16(b, reinterpret_cast<uint16_t*>(second) + c);
  }
}
#endif

// ---- Passes

// Tasks [begin, end) of one head of one sequence each.
template <class Product>
void long_forward(const AttentionForward& p, int64_t begin, int64_t end, float* scratch) {
  const Clips& clips = p.clips;
  const LongBuffers<Product> buffers(clips, false, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t h = task % clips.heads, s = task / clips.heads;
    const Sequence sequence = sequence_of(clips, s / clips.sequences, s % clips.sequences, buffers.tokens);
    const int64_t count = sequence.count;
    clear_absent_outputs(p, sequence, h);
    if (count == 0) continue;
    const ListedFeatures queries = rows_of(p, sequence, 0, h), keys = rows_of(p, sequence, 1, h);
    const ListedFeatures values = rows_of(p, sequence, 2, h);
    const ResultRows outputs = outputs_of(p, sequence, h);
    const int64_t ahead = NextRows::bytes_ahead(clips, h, p.token_stride, p.dtype);
    NextRows next{{{queries, ahead}, {keys, ahead}, {values, ahead}}, 3, count, clips.head_size * bytes_of(p.dtype), 0};
    next.share(buffers.calls(count));
    pack_columns<Product>(keys, 0, count, clips.head_size, buffers.key_columns);
    pack_contracted_rows<Product>(values, 0, count, clips.head_size, buffers.keys, buffers.value_rows);
    for (int64_t i0 = 0; i0 < count; i0 += buffers.rows) {
      const int64_t rows = std::min(buffers.rows, count - i0);
      copy_words<Product>(queries, i0, rows, clips.head_size, buffers.words_stride, buffers.query_words);
      float largest[kMostRows], sums[kMostRows], lse[kMostRows];
      const auto take_softmax = [&](int64_t i) {
        const float* factors = nullptr;
        if (p.dropout.threshold != 0) {
          dropout_factors(p, sequence, h, i0 + i, buffers.factors);
          factors = buffers.factors;
        }
        float *row = buffers.scores + i * buffers.stride, scale = p.scale;
        if (sequence.is_cls(i0 + i) && sequence.cls_hides_itself) {
          hide_first(row, count, scale);
          scale = 1.f;
        }
        const Softmax softmax = softmax_row<Product>(row, count, scale, factors);
        largest[i] = softmax.largest;
        sums[i] = softmax.sum;
      };
      for (int64_t i = 0; i < rows; i += kTilesTogether * kRows) {
        const int64_t together = std::min<int64_t>(kTilesTogether * kRows, rows - i);
        multiply_columns(buffers, buffers.query_words, buffers.key_columns, i, together, count, buffers.scores, next);
        for (int64_t row = i; row < i + together; ++row) take_softmax(row);
      }
      for (int64_t i = 0; i < rows; i += Vec::kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(Vec::kLanes, rows - i));
        (Vec::load(largest + i, n) + log(Vec::load(sums + i, n))).store(lse + i, n);
      }
      for (int64_t i = 0; i < rows; ++i) keep_lse(p, sequence, h, i0 + i, largest[i], sums[i], lse[i]);
      multiply_rows(buffers, buffers.scores, buffers.value_rows, rows, count);
      for (int64_t i = 0; i < rows; ++i)
        write_row(buffers.results + i * buffers.size, 1.f / sums[i], outputs, i0 + i, clips.head_size);
    }
  }
}

template <class Product>
void long_backward(const AttentionBackward& p, int64_t begin, int64_t end, float* scratch) {
  const AttentionForward& forward = p.forward;
  const Clips& clips = forward.clips;
  const LongBuffers<Product> buffers(clips, true, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t h = task % clips.heads, s = task / clips.heads;
    const Sequence sequence = sequence_of(clips, s / clips.sequences, s % clips.sequences, buffers.tokens);
    const int64_t count = sequence.count;
    clear_absent_gradients(p, sequence, h);
    if (count == 0) continue;
    const float cls_share = sequence.cls_first ? 1.f / static_cast<float>(cls_divisor(clips, sequence.clip)) : 1.f;
    const Split split = sequence.cls_is_split ? split_of(p, sequence, h) : Split{};
    const ListedFeatures queries = rows_of(forward, sequence, 0, h), keys = rows_of(forward, sequence, 1, h);
    const ListedFeatures values = rows_of(forward, sequence, 2, h), grads = grad_rows_of(p, sequence, h);
    const int64_t ahead = NextRows::bytes_ahead(clips, h, forward.token_stride, forward.dtype);
    const int64_t grad_ahead = NextRows::bytes_ahead(clips, h, p.grad_token_stride, forward.dtype);
    NextRows next{{{queries, ahead}, {keys, ahead}, {values, ahead}, {grads, grad_ahead}},
                  4,
                  count,
                  clips.head_size * bytes_of(forward.dtype),
                  0};
    next.share(2 * buffers.calls(count));
    pack_columns<Product>(keys, 0, count, clips.head_size, buffers.key_columns);
    pack_columns<Product>(values, 0, count, clips.head_size, buffers.value_columns);
    pack_contracted_rows<Product>(keys, 0, count, clips.head_size, buffers.keys, buffers.key_rows);
    const int64_t padded = round_up(count, Vec::kLanes);
    const ResultRows query_results = gradients_of(p, sequence, 0, h);
    for (int64_t i0 = 0; i0 < count; i0 += buffers.rows) {
      const int64_t rows = std::min(buffers.rows, count - i0);
      copy_words<Product>(queries, i0, rows, clips.head_size, buffers.words_stride, buffers.query_words);
      copy_words<Product>(grads, i0, rows, clips.head_size, buffers.words_stride, buffers.grad_words);
      pack_contracted_rows<Product>(queries, i0, rows, clips.head_size, buffers.rows, buffers.query_rows);
      pack_contracted_rows<Product>(grads, i0, rows, clips.head_size, buffers.rows, buffers.grad_rows);
      const auto differentiate = [&](int64_t i) {
        float* row = buffers.scores + i * buffers.stride;
        float* products = buffers.products + i * buffers.stride;
        const bool is_cls = sequence.is_cls(i0 + i);
        const float* factors = nullptr;
        if (forward.dropout.threshold != 0) {
          dropout_factors(forward, sequence, h, i0 + i, buffers.factors);
          factors = buffers.factors;
        }
        if (is_cls) {
          // The gradient of a mean: dp shrinks by the count here, and dv by it below.
          for (int64_t k = 0; k < count; ++k) products[k] *= cls_share;
        }
        differentiate_row(row, products, count, forward.scale, forward.lse[lse_index(clips, sequence, h, i0 + i)],
                          is_cls && sequence.cls_hides_itself, factors,
                          is_cls && sequence.cls_is_split ? &split : nullptr);
        if (is_cls)
          for (int64_t k = 0; k < padded; ++k) row[k] *= cls_share;
#ifdef MMK_HAS_BF16_PRODUCT
        if constexpr (LongBuffers<Product>::kPairs) {
          if (i % 2 == 0 && i + 1 < rows) return;
          const int64_t first = i / 2 * 2, pair = i / 2 * buffers.stride;
          const auto round = [&](float* tile, bool in_place, float* pairs) {
            float* second = first < i ? tile + i * buffers.stride : nullptr;
            round_two_rows(tile + first * buffers.stride, second, padded, in_place, pairs + pair);
          };
          round(buffers.scores, false, buffers.score_pairs);
          round(buffers.products, true, buffers.product_pairs);
        }
#endif
      };
      for (int64_t i = 0; i < rows; i += kTilesTogether * kRows) {
        const int64_t together = std::min<int64_t>(kTilesTogether * kRows, rows - i);
        multiply_columns(buffers, buffers.query_words, buffers.key_columns, i, together, count, buffers.scores, next);
        multiply_columns(buffers, buffers.grad_words, buffers.value_columns, i, together, count, buffers.products,
                         next);
        for (int64_t row = i; row < i + together; ++row) differentiate(row);
      }
      add_transposed(buffers, buffers.score_pairs, buffers.grad_rows, rows, count, i0 == 0, buffers.value_grads);
      add_transposed(buffers, buffers.product_pairs, buffers.query_rows, rows, count, i0 == 0, buffers.key_grads);
      multiply_rows(buffers, buffers.products, buffers.key_rows, rows, count);
      for (int64_t i = 0; i < rows; ++i)
        write_row(buffers.results + i * buffers.size, 1.f, query_results, i0 + i, clips.head_size);
    }
    const ResultRows key_results = gradients_of(p, sequence, 1, h), value_results = gradients_of(p, sequence, 2, h);
    for (int64_t j = 0; j < count; ++j) {
      const auto write = [&](const float* panels, const ResultRows& to) {
        float* row = buffers.results;
        for (int64_t d = 0; d < buffers.size; d += kPanel)
          std::memcpy(row + d, panels + d * buffers.keys + j * kPanel, kPanel * sizeof(float));
        write_row(row, 1.f, to, j, clips.head_size);
      };
      write(buffers.key_grads, key_results);
      write(buffers.value_grads, value_results);
    }
  }
}

}  // namespace divided_attention
}  // namespace MMK_VARIANT
}  // namespace mmkernels
