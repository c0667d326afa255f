// The tile engine of the contrastive losses. Compiled once for each instruction set (MMK_VARIANT).
//
// A thread holds one panel of queries, packed for both products, and walks the chunks of keys:
//   forward    S = K_J Q_I^T, and the epilogue folds the tile into the statistics of its rows and columns;
//   backward   S again, the epilogue turns it into G = d loss / d logits in place, dQ_I += G^T K_J, dK_J += G Q_I.
// Tiles are stored with the keys as rows, [keys][queries]: the packed panel of queries is the streamed operand.
// A loss is an epilogue; the engine knows nothing of softmax.
#include "cpu_kernels.h"

#include <algorithm>
#include <cmath>
#include <thread>
#include <type_traits>

#include "../common/tiles.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

constexpr int64_t kMaxRows = 256;
constexpr int64_t kMaxCols = 256;
// Rows of a tile lie this far apart: not a multiple of 4 KiB, or they would fight for the same lines of L1.
constexpr int64_t kTileStride = kMaxRows + 16;
// A panel of this many words fits in L1 beside the other operand.
constexpr int64_t kWordsInL1 = 256;
constexpr int64_t kPanelElements = kMaxRows * 512;
// What may be held beside inputs and gradients even where it is more than the inputs take.
constexpr int64_t kFreeBytes = int64_t{64} << 20;

constexpr float kNegativeInfinity = -__builtin_inff();

// Within this spread of its statistics a tile needs one exponential for rows and columns alike: e^(s - c) with one c
// neither overflows nor loses a term that counts.
constexpr float kOneExponentialSpread = 60.f;

MMK_INLINE void wait_for_turn(const std::atomic<int32_t>& done, int64_t panel) {
  for (int spins = 0; done.load(std::memory_order_acquire) != panel; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
}

// The buffers of one thread, cut from its scratch.
template <class Product>
struct Buffers {
  static constexpr bool kPairs = Product::kPerWord == 2;

  int64_t words, panels_of_words, padded_size;
  float* query_columns;  // [rows / kPanel][words][kPanel]
  float* key_rows;       // [words / kPanel][cols][kPanel]
  float* tile;           // [cols][kTileStride]
  // Backward alone.
  float* query_rows;   // as key_rows; pairs of rows for bfloat16
  float* key_pairs;    // bfloat16: [size / kPanel][cols / 2][kPanel]; float32: key_rows serves
  float* grad_pairs;   // bfloat16: the tile as pairs of keys, [cols / 2][kTileStride] words
  float* grad_rows;    // bfloat16: the tile as pairs of queries, [cols][kTileStride / 2] words; float32: the tile
  float* grad_panel;   // [padded_size / kPanel][rows][kPanel]
  int64_t floats = 0;  // taken in all

  Buffers(const Logits& x, const Tiling& t, bool backward, float* scratch) {
    words = (x.size + Product::kPerWord - 1) / Product::kPerWord;
    panels_of_words = (words + kPanel - 1) / kPanel;
    padded_size = round_up(x.size, kPanel);
    const int64_t rows = round_up(t.rows, kPanel), cols = round_up(t.cols, kRows);
    const auto take = [&](int64_t count) {
      float* p = scratch + floats;
      floats += round_up(count, 16);
      return p;
    };
    query_columns = take(rows * words);
    key_rows = take(cols * panels_of_words * kPanel);
    tile = take(cols * kTileStride);
    if (!backward) return;
    query_rows = take(rows * padded_size / Product::kPerWord);
    key_pairs = kPairs ? take(cols * padded_size / 2) : key_rows;
    grad_pairs = kPairs ? take(cols / 2 * kTileStride) : tile;
    grad_rows = kPairs ? take(cols * kTileStride / 2) : tile;
    grad_panel = take(rows * padded_size);
  }
};

// How often the products of one tile call the register kernel.
int64_t calls_in_tile(const Logits& x, int64_t words, int64_t rows, int64_t cols, bool backward) {
  const int64_t tiles = (rows + kPanel - 1) / kPanel * ((cols + kRows - 1) / kRows);
  const int64_t panels = (x.size + kPanel - 1) / kPanel;
  return (words + kWordsInL1 - 1) / kWordsInL1 * tiles + (backward ? panels * ((rows + kRows - 1) / kRows) : 0);
}

// The words of a chunk of keys as the left operand: where they lie if they can be read there, else packed.
template <class Product>
RowsLeft key_words(const Features& keys, int64_t col0, int64_t cols, int64_t size, int64_t capacity, float* packed) {
  const int64_t element = keys.dtype == Dtype::kFloat32 ? 4 : 2, row_bytes = keys.row_stride * element;
  const bool same_words = element * Product::kPerWord == 4 && size % Product::kPerWord == 0 && row_bytes % 4 == 0;
  // Whole register tiles only, and rows that do not all fall on the same lines of L1.
  if (same_words && cols % kRows == 0 && row_bytes % 4096 != 0)
    return {reinterpret_cast<const float*>(static_cast<const char*>(keys.data) + col0 * row_bytes), row_bytes / 4, 0};
  pack_rows<Product>(keys, col0, cols, size, capacity, packed);
  return {packed, kPanel, (capacity - 1) * kPanel};
}

// S = K Q^T of one tile.
template <class Product>
void product_of_features(const Buffers<Product>& b, const RowsLeft& keys, int64_t rows, int64_t cols, Ahead& ahead) {
  for (int64_t w = 0; w < b.words; w += kWordsInL1) {
    const int64_t count = std::min(kWordsInL1, b.words - w);
    const float* from = keys.data + w + w / kPanel * keys.jump;
    for (int64_t r = 0; r < rows; r += kPanel) {
      const float* right = b.query_columns + r * b.words + w * kPanel;
      for (int64_t c = 0; c < cols; c += kRows) {
        ahead.fetch();
        const FloatTile to{b.tile + c * kTileStride + r, kTileStride, w > 0};
        multiply<Product>(count, RowsLeft{from + c * keys.row, keys.row, keys.jump}, right, to);
      }
    }
  }
}

// dQ += G^T K.
template <class Product>
void add_query_gradients(const Buffers<Product>& b, int64_t rows, int64_t row_capacity, int64_t cols,
                         int64_t col_capacity, bool first, Ahead& ahead) {
  constexpr int kPer = Product::kPerWord;
  const int64_t k_words = (cols + kPer - 1) / kPer;
  for (int64_t j = 0; j < b.padded_size / kPanel; ++j) {
    const float* right = b.key_pairs + j * (col_capacity / kPer) * kPanel;
    float* out = b.grad_panel + j * row_capacity * kPanel;
    for (int64_t r = 0; r < rows; r += kRows) {
      ahead.fetch();
      const FloatTile to{out + r * kPanel, kPanel, !first};
      multiply<Product>(k_words, FixedLeft<1, kTileStride>{b.grad_pairs + r}, right, to);
    }
  }
}

// dK += G Q; out is where the gradient of the chunk's first key begins.
template <class Product, class Tile>
void add_key_gradients(const Buffers<Product>& b, int64_t rows, int64_t row_capacity, int64_t cols, int64_t size,
                       const Tile& out) {
  constexpr int kPer = Product::kPerWord;
  const int64_t k_words = (rows + kPer - 1) / kPer;
  for (int64_t d = 0; d < size; d += kPanel) {
    const float* right = b.query_rows + d * (row_capacity / kPer);
    const int64_t width = std::min<int64_t>(kPanel, size - d);
    for (int64_t c = 0; c < cols; c += kRows) {
      const FixedLeft<kTileStride / kPer, 1> left{b.grad_rows + c * (kTileStride / kPer)};
      const int64_t height = std::min<int64_t>(kRows, cols - c);
      const Tile to = out.at(c, d);
      if (height == kRows && width == kPanel) {
        multiply<Product>(k_words, left, right, to);
        continue;
      }
      float part[kRows * kPanel];
      multiply<Product>(k_words, left, right, FloatTile{part, kPanel, false});
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) to.set(i, j, part[i * kPanel + j] + (to.accumulate ? to.get(i, j) : 0.f));
    }
  }
}

#ifdef MMK_HAS_BF16_PRODUCT
// The tile of gradients as bfloat16, in the two forms that the products contract over.
void round_tile(const Buffers<BFloat16Product>& b, int64_t rows, int64_t cols) {
  uint16_t* by_rows = reinterpret_cast<uint16_t*>(b.grad_rows);
  for (int64_t c = 0; c < cols; c += 2) {
    const float* tile = b.tile + c * kTileStride;
    for (int64_t r = 0; r < rows; r += Vec::kLanes) {
      const Vec first = Vec::load(tile + r), second = Vec::load(tile + kTileStride + r);
      store_bf16(first, by_rows + c * kTileStride + r);
      store_bf16(second, by_rows + (c + 1) * kTileStride + r);
      round_to_pairs(first, second).store(b.grad_pairs + c / 2 * kTileStride + r);
    }
  }
}
#endif

// A finished row of gradients, scaled and written in the dtype of the features. It lies in panels, one kPanel wide part
// every grad_stride.
void finish_row(const float* grad, int64_t grad_stride, float scale, const Features& x, int64_t row, int64_t size,
                void* out) {
  with_dtype(x.dtype, [&](auto dtype) {
    void* to = static_cast<char*>(out) + row * size * bytes_of(dtype());
    for (int64_t d = 0; d < size; d += Vec::kLanes) {
      const Vec value = load_floats<Dtype::kFloat32>(grad + d / kPanel * grad_stride + d % kPanel, 0, size - d);
      store_floats<dtype()>(value * Vec::set1(scale), to, d, size);
    }
  });
}

// The gradients of a chunk of keys are complete: scaled and rounded in place.
template <class Tile>
void finish_keys(const Logits& x, int64_t col0, int64_t cols, const Tile& grads, void* out, float* buffer) {
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t d = 0; d < x.size; ++d) buffer[d] = grads.get(c, d);
    finish_row(buffer, kPanel, x.scale, x.keys, col0 + c, x.size, out);
  }
}

template <class Product, class Epilogue>
void forward_panels(const Logits& x, const Tiling& t, Wavefront& wave, float* scratch, Epilogue& epilogue) {
  const Buffers<Product> b(x, t, false, scratch);
  const int64_t col_capacity = round_up(t.cols, kRows);
  for (int64_t panel; (panel = wave.next_panel.fetch_add(1)) < t.panels;) {
    const int64_t row0 = panel * t.rows, rows = std::min(t.rows, x.queries.rows - row0);
    pack_columns<Product>(x.queries, row0, rows, x.size, b.query_columns);
    epilogue.begin_panel(row0, rows);
    for (int64_t chunk = 0; chunk < t.chunks; ++chunk) {
      const int64_t col0 = chunk * t.cols, cols = std::min(t.cols, x.keys.rows - col0);
      const RowsLeft keys = key_words<Product>(x.keys, col0, cols, x.size, col_capacity, b.key_rows);
      const int64_t next = (chunk + 1) % t.chunks * t.cols, next_cols = std::min(t.cols, x.keys.rows - next);
      Ahead ahead = Ahead::of(x.keys, next, next_cols, x.size, calls_in_tile(x, b.words, rows, cols, false));
      product_of_features(b, keys, rows, cols, ahead);
      epilogue.tile(b.tile, col0, cols);
      wait_for_turn(wave.done[chunk], panel);
      epilogue.update_columns(col0, cols);
      wave.done[chunk].store(static_cast<int32_t>(panel + 1), std::memory_order_release);
    }
    epilogue.end_panel();
  }
}

struct Gradients {
  void* queries;
  void* keys;
  uint16_t* low_keys;
  double* scale;
};

template <class Product, class Epilogue>
void backward_panels(const Logits& x, const Gradients& grads, const Tiling& t, Wavefront& wave, float* scratch,
                     Epilogue& epilogue) {
  const Buffers<Product> b(x, t, true, scratch);
  const int64_t row_capacity = round_up(t.rows, kPanel), col_capacity = round_up(t.cols, kRows);
  for (int64_t panel; (panel = wave.next_panel.fetch_add(1)) < t.panels;) {
    const int64_t row0 = panel * t.rows, rows = std::min(t.rows, x.queries.rows - row0);
    pack_columns<Product>(x.queries, row0, rows, x.size, b.query_columns);
    if constexpr (Buffers<Product>::kPairs) {
      pack_row_pairs(x.queries, row0, rows, x.size, row_capacity, b.query_rows);
    } else {
      pack_rows<Product>(x.queries, row0, rows, x.size, row_capacity, b.query_rows);
    }
    epilogue.begin_panel(row0, rows);
    for (int64_t chunk = 0; chunk < t.chunks; ++chunk) {
      const int64_t col0 = chunk * t.cols, cols = std::min(t.cols, x.keys.rows - col0);
      const RowsLeft keys = key_words<Product>(x.keys, col0, cols, x.size, col_capacity, b.key_rows);
      const int64_t next = (chunk + 1) % t.chunks * t.cols, next_cols = std::min(t.cols, x.keys.rows - next);
      Ahead ahead = Ahead::of(x.keys, next, next_cols, x.size, calls_in_tile(x, b.words, rows, cols, true));
      product_of_features(b, keys, rows, cols, ahead);
      epilogue.tile(b.tile, col0, cols);
      // Lanes and rows past the edge of the logits held padding: no gradient comes from there.
      const int64_t padded_rows = round_up(rows, kPanel), padded_cols = round_up(cols, kRows);
      for (int64_t c = 0; c < cols && rows < padded_rows; ++c)
        std::fill(b.tile + c * kTileStride + rows, b.tile + c * kTileStride + padded_rows, 0.f);
      for (int64_t c = cols; c < padded_cols; ++c)
        std::fill(b.tile + c * kTileStride, b.tile + c * kTileStride + padded_rows, 0.f);
      if constexpr (Buffers<Product>::kPairs) {
        pack_row_pairs(x.keys, col0, cols, x.size, col_capacity, b.key_pairs);
        round_tile(b, padded_rows, padded_cols);
      } else if (grads.queries != nullptr && keys.data != b.key_rows) {
        pack_rows<Product>(x.keys, col0, cols, x.size, col_capacity, b.key_rows);
      }
      if (grads.queries != nullptr) add_query_gradients(b, rows, row_capacity, cols, col_capacity, chunk == 0, ahead);
      if (grads.keys == nullptr) continue;
      wait_for_turn(wave.done[chunk], panel);
      const auto add = [&](const auto& out) {
        add_key_gradients(b, rows, row_capacity, cols, x.size, out);
        if (panel == t.panels - 1) finish_keys(x, col0, cols, out, grads.keys, b.tile);
      };
      if (x.keys.dtype == Dtype::kFloat32) {
        add(FloatTile{static_cast<float*>(grads.keys) + col0 * x.size, x.size, panel > 0});
      } else {
        const int64_t at = col0 * x.size;
        add(SplitTile{static_cast<uint16_t*>(grads.keys) + at, grads.low_keys + at, x.size, panel > 0});
      }
      wave.done[chunk].store(static_cast<int32_t>(panel + 1), std::memory_order_release);
    }
    if (grads.scale != nullptr) grads.scale[panel] = epilogue.grad_scale();
    for (int64_t r = 0; r < rows && grads.queries != nullptr; ++r)
      finish_row(b.grad_panel + r * kPanel, row_capacity * kPanel, x.scale, x.queries, row0 + r, x.size, grads.queries);
  }
}

// The largest logit of a row or column, and the sums relative to it, joined from two parts. `reference` is what the
// sum of the second part is relative to.
MMK_INLINE void join(Vec& max_a, Vec& sum_a, Vec max_b, Vec sum_b, Vec reference) {
  const Vec both = max(max_a, max_b);
  sum_a = sum_a * exp(max_a - both) + sum_b * exp(reference - both);
  max_a = both;
}

// Calls visit(row, element of the tile) for every row of the panel whose target lies in the tile.
template <class Visit>
void for_each_target(const int64_t* targets, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float* tile,
                     const Visit& visit) {
  if (targets == nullptr && (row0 + rows <= col0 || col0 + cols <= row0)) return;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t target = (targets ? targets[row0 + r] : row0 + r) - col0;
    if (0 <= target && target < cols) visit(r, tile[target * kTileStride + r]);
  }
}

// For the last vector of a panel of `rows`: minus infinity in the lanes past the last row, else zero.
MMK_INLINE Vec edge_of(int64_t rows) {
  const int64_t inside = rows - (round_up(rows, Vec::kLanes) - Vec::kLanes);
  float lanes[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) lanes[i] = i < inside ? 0.f : kNegativeInfinity;
  return Vec::load(lanes);
}

// Running statistics of rows and columns: loss = lse - positive, lse = max + log(sum).
template <bool kColumns, bool kTotals>
struct InfoNceStatistics {
  explicit InfoNceStatistics(const InfoNceForward& p) : p(p) {}

  const InfoNceForward& p;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float row_max[kMaxRows], row_sum[kMaxRows], row_total[kMaxRows], row_positive[kMaxRows];
  // Of the tile at hand, relative to col_reference.
  float tile_row_max[kMaxRows], col_max[kMaxCols], col_sum[kMaxCols], col_total[kMaxCols], col_reference[kMaxCols];

  void begin_panel(int64_t first_row, int64_t count) {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    for (int64_t r = 0; r < padded_rows; ++r) {
      row_max[r] = kNegativeInfinity;
      row_sum[r] = row_total[r] = 0.f;
      row_positive[r] = __builtin_nanf("");
    }
  }

  void tile(float* s, int64_t col0, int64_t cols) {
    scale_and_find_maxima(s, cols);
    for_each_target(p.targets, row0, rows, col0, cols, s, [&](int64_t r, float& logit) { row_positive[r] = logit; });
    // Columns past the last are repeats of it, for whole vectors.
    const int64_t padded_cols = round_up(cols, Vec::kLanes);
    Vec highest = Vec::set1(kNegativeInfinity), lowest = highest;
    for (int64_t r = 0; r < rows; ++r) {
      highest = max(highest, Vec::set1(tile_row_max[r]));
      lowest = max(lowest, Vec::set1(-tile_row_max[r]));
    }
    if constexpr (kColumns) {
      for (int64_t c = cols; c < padded_cols; ++c) col_max[c] = col_max[cols - 1];
      for (int64_t c = 0; c < padded_cols; c += Vec::kLanes)
        lowest = max(lowest, Vec::set1(0.f) - Vec::load(col_max + c));
    }
    const float center = highest.largest();
    if (center + lowest.largest() < kOneExponentialSpread) {
      add_exponentials<true>(s, cols, center);
    } else {
      add_exponentials<false>(s, cols, center);
    }
  }

  void scale_and_find_maxima(float* s, int64_t cols) {
    const Vec scale = Vec::set1(p.logits.scale), last_edge = edge_of(rows);
    for (int64_t r = 0; r < padded_rows; ++r) tile_row_max[r] = kNegativeInfinity;
    for (int64_t c = 0; c < cols; ++c) {
      float* row = s + c * kTileStride;
      Vec col = Vec::set1(kNegativeInfinity), total = Vec::set1(0.f);
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        Vec logits = Vec::load(row + r) * scale;
        if constexpr (kTotals) {
          (Vec::load(row_total + r) + logits).store(row_total + r);
          total = total + logits;  // lanes past the last row hold zero
        }
        if (r + Vec::kLanes == padded_rows) logits = logits + last_edge;
        logits.store(row + r);
        max(Vec::load(tile_row_max + r), logits).store(tile_row_max + r);
        col = max(col, logits);
      }
      col_max[c] = col.largest();
      if constexpr (kTotals) col_total[c] = total.sum();
    }
  }

  // Adds e^(s - reference) to the sums: one reference for all, or one a row and one a column.
  template <bool kOne>
  void add_exponentials(const float* s, int64_t cols, float center) {
    float sums[kMaxRows];
    for (int64_t r = 0; r < padded_rows; ++r) sums[r] = 0.f;
    for (int64_t c = 0; c < cols; ++c) {
      const float* row = s + c * kTileStride;
      const Vec reference = Vec::set1(kOne ? center : col_max[c]);
      Vec col = Vec::set1(0.f);
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        const Vec logits = Vec::load(row + r);
        if constexpr (kOne) {
          const Vec e = exp(logits - reference);
          (Vec::load(sums + r) + e).store(sums + r);
          col = col + e;
        } else {
          (Vec::load(sums + r) + exp(logits - Vec::load(tile_row_max + r))).store(sums + r);
          if constexpr (kColumns) col = col + exp(logits - reference);
        }
      }
      if constexpr (kColumns) {
        col_sum[c] = col.sum();
        col_reference[c] = kOne ? center : col_max[c];
      }
    }
    for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
      Vec largest = Vec::load(row_max + r), sum = Vec::load(row_sum + r);
      const Vec in_tile = Vec::load(tile_row_max + r);
      join(largest, sum, in_tile, Vec::load(sums + r), kOne ? Vec::set1(center) : in_tile);
      largest.store(row_max + r);
      sum.store(row_sum + r);
    }
  }

  void update_columns(int64_t col0, int64_t cols) {
    if constexpr (!kColumns) return;
    for (int64_t c = 0; c < cols; c += Vec::kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(Vec::kLanes, cols - c));
      Vec largest = Vec::load(col_max + c), sum = Vec::load(col_sum + c);
      Vec total = kTotals ? Vec::load(col_total + c) : sum;
      if (row0 == 0) {
        sum = sum * exp(Vec::load(col_reference + c) - largest);
      } else {
        Vec so_far = Vec::load(p.col_max + col0 + c, n), sum_so_far = Vec::load(p.col_sum + col0 + c, n);
        join(so_far, sum_so_far, largest, sum, Vec::load(col_reference + c));
        largest = so_far;
        sum = sum_so_far;
        if constexpr (kTotals) total = total + Vec::load(p.col_total + col0 + c, n);
      }
      store_part(largest, p.col_max + col0 + c, n);
      store_part(sum, p.col_sum + col0 + c, n);
      if constexpr (kTotals) store_part(total, p.col_total + col0 + c, n);
    }
  }

  static MMK_INLINE void store_part(Vec x, float* to, int n) {
    float lanes[Vec::kLanes];
    x.store(lanes);
    std::memcpy(to, lanes, n * sizeof(float));
  }

  void end_panel() {
    const auto write = [&](const float* from, float* to) { std::memcpy(to + row0, from, rows * sizeof(float)); };
    write(row_max, p.row_max);
    write(row_sum, p.row_sum);
    write(row_positive, p.row_positive);
    if constexpr (kTotals) write(row_total, p.row_total);
  }
};

// Turns a tile of products into d loss / d logits: softmax over rows and columns by one exponential where it can.
template <bool kColumns, bool kShift>
struct InfoNceGradient {
  explicit InfoNceGradient(const InfoNceBackward& p) : p(p) {}

  const InfoNceBackward& p;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  float row_lse[kMaxRows], row_lse_rest[kMaxRows], row_weight[kMaxRows], row_shift[kMaxRows];
  float row_factor[kMaxRows], col_lse[kMaxCols], col_factor[kMaxCols];
  float lowest_row = 0.f, highest_row = 0.f;
  double product_of_logits = 0.;  // <d loss / d logits, logits / scale> of the panel

  void begin_panel(int64_t first_row, int64_t count) {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    product_of_logits = 0.;
    const auto read = [&](const float* from, float* to) {
      std::memcpy(to, from + row0, rows * sizeof(float));
      for (int64_t r = rows; r < padded_rows; ++r) to[r] = to[rows - 1];
    };
    read(p.row_lse, row_lse);
    read(p.row_lse_rest, row_lse_rest);
    read(p.row_weight, row_weight);
    if constexpr (kShift) read(p.row_shift, row_shift);
    range(row_lse, padded_rows, lowest_row, highest_row);
  }

  // The range of x; NaN if x holds one.
  static void range(const float* x, int64_t count, float& lowest, float& highest) {
    Vec low = Vec::set1(kNegativeInfinity), high = low, poison = Vec::set1(0.f);
    for (int64_t i = 0; i < count; i += Vec::kLanes) {
      const Vec v = Vec::load(x + i);
      low = max(low, Vec::set1(0.f) - v);
      high = max(high, v);
      poison = poison + (v - v);
    }
    lowest = -low.largest() + poison.sum();
    highest = high.largest() + poison.sum();
  }

  void tile(float* s, int64_t col0, int64_t cols) {
    float lowest = lowest_row, highest = highest_row;
    if constexpr (kColumns) {
      const int64_t padded_cols = round_up(cols, Vec::kLanes);
      std::memcpy(col_lse, p.col_lse + col0, cols * sizeof(float));
      for (int64_t c = cols; c < padded_cols; ++c) col_lse[c] = col_lse[cols - 1];
      float low, high;
      range(col_lse, padded_cols, low, high);
      lowest = low < lowest ? low : lowest;
      highest = high > highest ? high : highest;
      if (low != low) highest = low;  // a NaN among the columns: no common reference
    }
    // Whole, so that the logits near it lose nothing when it is taken off.
    const float center = std::nearbyint(0.5f * (lowest + highest));
    for_each_target(p.targets, row0, rows, col0, cols, s, [&](int64_t r, float& product) {
      product_of_logits -= static_cast<double>(p.positive_weight[row0 + r]) * product;
    });
    if (highest - lowest < kOneExponentialSpread) {
      differentiate<true>(s, col0, cols, center);
    } else {
      differentiate<false>(s, col0, cols, center);
    }
    for_each_target(p.targets, row0, rows, col0, cols, s,
                    [&](int64_t r, float& grad) { grad -= p.positive_weight[row0 + r]; });
  }

  double grad_scale() const { return product_of_logits; }

  template <bool kOne>
  void differentiate(float* s, int64_t col0, int64_t cols, float center) {
    const Vec scale = Vec::set1(p.logits.scale), middle = Vec::set1(center), last_edge = edge_of(rows);
    if constexpr (kOne) {
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes)
        (Vec::load(row_weight + r) * exp((middle - Vec::load(row_lse + r)) - Vec::load(row_lse_rest + r)))
            .store(row_factor + r);
      for (int64_t c = 0; kColumns && c < cols; c += Vec::kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(Vec::kLanes, cols - c));
        const Vec rest = Vec::load(p.col_lse_rest + col0 + c, n);
        (Vec::load(p.col_weight + col0 + c, n) * exp((middle - Vec::load(col_lse + c)) - rest)).store(col_factor + c);
      }
    }
    for (int64_t c = 0; c < cols; ++c) {
      float* row = s + c * kTileStride;
      const Vec lse = Vec::set1(kColumns ? col_lse[c] : 0.f);
      const Vec lse_rest = Vec::set1(kColumns ? p.col_lse_rest[col0 + c] : 0.f);
      const Vec weight = Vec::set1(!kColumns ? 0.f : kOne ? col_factor[c] : p.col_weight[col0 + c]);
      const Vec shift = Vec::set1(kColumns && kShift ? p.col_shift[col0 + c] : 0.f);
      Vec sum = Vec::set1(0.f);
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        const Vec product = Vec::load(row + r);
        Vec logits = product * scale, g;
        if (r + Vec::kLanes == padded_rows) logits = logits + last_edge;
        if constexpr (kOne) {
          const Vec both = kColumns ? Vec::load(row_factor + r) + weight : Vec::load(row_factor + r);
          g = exp(logits - middle) * both;
        } else {
          const Vec row_rest = Vec::load(row_lse_rest + r);
          g = exp((logits - Vec::load(row_lse + r)) - row_rest) * Vec::load(row_weight + r);
          if constexpr (kColumns) g = fma(exp((logits - lse) - lse_rest), weight, g);
        }
        if constexpr (kShift) g = g - (Vec::load(row_shift + r) + shift);
        sum = fma(g, product, sum);
        g.store(row + r);
      }
      product_of_logits += sum.sum();
    }
  }
};

template <class Product>
Tiling choose_tiling(const Logits& x, bool backward, int64_t threads) {
  const int64_t n = x.queries.rows, m = x.keys.rows;
  Tiling t{};
  // Wide features get lower panels, so that a panel stays near the core.
  const int64_t highest = std::min(kMaxRows, std::max<int64_t>(kPanel, kPanelElements / x.size / kPanel * kPanel));
  t.rows = std::min(highest, std::max<int64_t>(64, round_up((n + 7) / 8, kPanel)));
  t.cols = std::min(kMaxCols, round_up(m, kRows));
  t.panels = (n + t.rows - 1) / t.rows;
  t.chunks = (m + t.cols - 1) / t.cols;
  t.scratch_floats = Buffers<Product>(x, t, backward, nullptr).floats;

  const int64_t element = x.queries.dtype == Dtype::kFloat32 ? 4 : 2;
  // All that is held beside inputs and gradients stays within the size of the inputs: statistics, some ten floats a
  // row; for half precision the low halves of the accumulators; and scratch, which bounds the threads.
  const int64_t held = (n + m) * 48 + (element == 2 ? m * x.size * 2 : 0);
  const int64_t allowed = (std::max((n + m) * x.size * element, kFreeBytes) - held) / (t.scratch_floats * 4);
  // A small problem is over before a second thread has woken up.
  const bool small = n * m * x.size < (int64_t{1} << 20);
  t.threads = small ? 1 : std::max<int64_t>(1, std::min({threads, t.panels, allowed}));
  return t;
}

// float32 everywhere; bfloat16 as pairs where the machine multiplies them, else as float32.
template <class Call>
auto with_product([[maybe_unused]] Dtype dtype, const Call& call) {
#ifdef MMK_HAS_BF16_PRODUCT
  if (dtype == Dtype::kBFloat16) return call(BFloat16Product{});
#endif
  return call(Float32Product{});
}

template <class Call>
void with_flags(bool first, bool second, const Call& call) {
  using Yes = std::true_type;
  using No = std::false_type;
  first ? (second ? call(Yes{}, Yes{}) : call(Yes{}, No{})) : (second ? call(No{}, Yes{}) : call(No{}, No{}));
}

Tiling tiling(const Logits& x, bool backward, int64_t threads) {
  return with_product(x.queries.dtype,
                      [&](auto product) { return choose_tiling<decltype(product)>(x, backward, threads); });
}

void info_nce_forward(const InfoNceForward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  with_product(p.logits.queries.dtype, [&](auto product) {
    with_flags(p.columns, p.totals, [&](auto columns, auto totals) {
      InfoNceStatistics<columns(), totals()> epilogue(p);
      forward_panels<decltype(product)>(p.logits, t, wave, scratch, epilogue);
    });
  });
}

void info_nce_backward(const InfoNceBackward& p, const Tiling& t, Wavefront& wave, float* scratch) {
  const Gradients grads{p.grad_queries, p.grad_keys, p.low_keys, p.grad_scale};
  with_product(p.logits.queries.dtype, [&](auto product) {
    with_flags(p.col_lse != nullptr, p.row_shift != nullptr, [&](auto columns, auto shift) {
      InfoNceGradient<columns(), shift()> epilogue(p);
      backward_panels<decltype(product)>(p.logits, grads, t, wave, scratch, epilogue);
    });
  });
}

}  // namespace

#define MMK_STRING_(x) #x
#define MMK_STRING(x) MMK_STRING_(x)

extern const ContrastiveKernels contrastive_kernels;
const ContrastiveKernels contrastive_kernels{MMK_STRING(MMK_VARIANT), tiling, info_nce_forward, info_nce_backward};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
