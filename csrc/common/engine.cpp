// The passes of the tile engine, whose head is engine.h, for each dtype of the features.
#include "engine.h"

#include <thread>

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

// How many words one call of the register kernel contracts. 256 of them are a panel of 32 KiB with AVX-512 (32 lanes of
// 4 bytes) and of 16 KiB with AVX2, and the rows of the left operand take 8 or 4 KiB more. An L1 has 32 or 48 KiB.
constexpr int64_t kWordsInL1 = 256;
// A panel of queries has at most 2^17 elements: as floats 512 KiB, half of a 1 MiB L2.
constexpr int64_t kPanelElements = kMaxRows * 512;
// A call may hold this much beside inputs and gradients even where the inputs are smaller: 4,096 x 4,096 floats, as
// FREE_BYTES in mmkernels/_autograd.py, which bounds the products that are kept.
constexpr int64_t kFreeBytes = int64_t{64} << 20;
// All panels share packed keys of at most this much: 2,048 keys of 512 floats. Every panel reads them from the last
// cache, and more of them take longer than to pack what each panel multiplies just before it does.
constexpr int64_t kSharedBytes = int64_t{4} << 20;
// The threads pack them in pieces of so many, so that a single chunk is work for four.
constexpr int64_t kPiece = kMaxCols / 4;

// Calls with the product that serves the dtype: pairs for bfloat16 where the machine multiplies them, else float32.
template <class Call>
auto with_product([[maybe_unused]] Dtype dtype, const Call& call) {
#ifdef MMK_HAS_BF16_PRODUCT
  if (dtype == Dtype::kBFloat16) return call(BFloat16Product{});
#endif
  return call(Float32Product{});
}

// Waits until a count has come to `value`. 4,096 loads of 5 clocks are 7 us at 3 GHz: a thread that waits longer gives
// its core to others.
MMK_INLINE void wait_for(const std::atomic<int32_t>& count, int64_t value) {
  for (int spins = 0; count.load(std::memory_order_acquire) != value; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
}

// Cuts the buffers of one thread from its scratch.
template <class Product>
struct Buffers {
  static constexpr bool kPairs = Product::kPerWord == 2;

  int64_t words, panels_of_words, padded_size;
  float* query_columns;  // [rows / kPanel][words][kPanel]
  float* key_rows;       // [words / kPanel][cols][kPanel]
  float* tile;           // [cols][kTileStride]
  // A backward pass alone has the rest.
  float* query_rows;   // as key_rows; pairs of rows for bfloat16
  float* key_panel;    // a panel of features: [cols][kPanel]; bfloat16: pairs of keys, [cols / 2][kPanel]
  float* grad_pairs;   // bfloat16: the tile as pairs of keys, [cols / 2][kTileStride] words
  float* grad_rows;    // bfloat16: the tile as pairs of queries, [cols][kTileStride / 2] words; float32: the tile
  float* grad_panel;   // [padded_size / kPanel][rows][kPanel]
  int64_t floats = 0;  // taken in all

  Buffers(const Logits& x, const Tiling& t, bool backward, float* scratch) {
    words = (x.size + Product::kPerWord - 1) / Product::kPerWord;
    panels_of_words = (words + kPanel - 1) / kPanel;
    padded_size = round_up(x.size, kPanel);
    const int64_t rows = round_up(t.rows, kPanel), cols = round_up(t.cols, 2);
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
    key_panel = take(cols * kPanel / Product::kPerWord);
    grad_pairs = kPairs ? take(cols / 2 * kTileStride) : tile;
    grad_rows = kPairs ? take(cols * kTileStride / 2) : tile;
    grad_panel = take(rows * padded_size);
  }
};

// How often a tile of products calls the register kernel.
inline int64_t calls_in_tile(const Logits& x, int64_t words, int64_t rows, int64_t cols, bool features,
                             bool gradients) {
  const int64_t tiles = (rows + kPanel - 1) / kPanel * ((cols + kRows - 1) / kRows);
  const int64_t panels = (x.size + kPanel - 1) / kPanel;
  return (features ? (words + kWordsInL1 - 1) / kWordsInL1 * tiles : 0) +
         (gradients ? panels * ((rows + kRows - 1) / kRows) : 0);
}

// Whether the register kernel can read words of keys where they lie. The kRows rows that it reads at once must not all
// fall on the same lines of an L1, whose sets repeat every 4 KiB.
template <class Product>
bool lie_as_words(const Features& keys, int64_t size) {
  const int64_t element = bytes_of(keys.dtype), row_bytes = keys.row_stride * element;
  return element * Product::kPerWord == 4 && size % Product::kPerWord == 0 && row_bytes % 4 == 0 &&
         row_bytes % 4096 != 0;
}

// Returns the words of a chunk of keys as the left operand: in place if they can be read there, else packed, as float32
// alone may be `already`; else they are packed to `buffer`.
template <class Product>
RowsLeft key_words(const Features& keys, int64_t col0, int64_t cols, int64_t size, int64_t capacity, float* buffer,
                   const float* already = nullptr) {
  if (lie_as_words<Product>(keys, size))
    return {static_cast<const float*>(keys.row(col0)), keys.row_stride / Product::kPerWord, 0};
  const bool is_packed = already != nullptr && Product::kPerWord == 1;
  if (!is_packed) pack_rows<Product>(keys, col0, cols, size, capacity, buffer);
  return {is_packed ? already : buffer, kPanel, (capacity - 1) * kPanel};
}

// ---- Keys that all panels share

// Returns the floats of all packed chunks, or 0 where a pass reads keys where they lie, or they take too much.
template <class Product>
int64_t shared_floats(const Logits& x, const Tiling& t, bool backward) {
  const bool reads_packed = backward || (Product::kPerWord == 1 && !lie_as_words<Product>(x.keys, x.size));
  const int64_t floats = t.chunks * round_up(t.cols, 2) * round_up(x.size, kPanel) / Product::kPerWord;
  return reads_packed && t.panels > 1 && floats * 4 <= kSharedBytes ? floats : 0;
}

// Packs pieces of chunks until none is left.
template <class Product>
void share_keys(const Logits& x, const Tiling& t, Wavefront& wave) {
  for (int64_t row; (row = wave.next_keys.fetch_add(kPiece)) < x.keys.rows;) {
    const int64_t chunk = row / t.cols, count = std::min(kPiece, x.keys.rows - row);
    float* out = wave.packed_keys + chunk * (t.packed_floats / t.chunks) + row % t.cols / Product::kPerWord * kPanel;
    pack_contracted_rows<Product>(x.keys, row, count, x.size, round_up(t.cols, 2), out);
    wave.packed[chunk].fetch_add(1, std::memory_order_release);
  }
}

// Waits until a chunk of so many keys is packed whole.
inline void wait_for_keys(const Wavefront& wave, int64_t chunk, int64_t cols) {
  wait_for(wave.packed[chunk], (cols + kPiece - 1) / kPiece);
}

// The keys that the next tile reads, packed or as they lie.
inline Ahead next_keys(const Logits& x, const Tiling& t, const Wavefront& wave, int64_t chunk, bool packed,
                       int64_t calls) {
  if (calls == 0) return {};  // the product is kept, and no gradient of queries is asked for
  const int64_t floats = t.packed_floats / t.chunks;
  if (packed) return Ahead::of(wave.packed_keys + chunk * floats, floats * 4, calls);
  return Ahead::of(x.keys, chunk * t.cols, std::min(t.cols, x.keys.rows - chunk * t.cols), x.size, calls);
}

// S = K Q^T of one tile.
template <class Product>
void product_of_features(const Buffers<Product>& b, const RowsLeft& keys, int64_t rows, int64_t cols, Ahead& ahead) {
  for (int64_t w = 0; w < b.words; w += kWordsInL1) {
    const int64_t count = std::min(kWordsInL1, b.words - w);
    const float* from = keys.data + w + w / kPanel * keys.jump;
    for (int64_t r = 0; r < rows; r += kPanel) {
      const float* right = b.query_columns + r * b.words + w * kPanel;
      for_each_tile(cols, [&](int64_t c, auto height) {
        ahead.fetch();
        const FloatTile to{b.tile + c * kTileStride + r, kTileStride, w > 0};
        multiply<Product, height()>(count, RowsLeft{from + c * keys.row, keys.row, keys.jump}, right, to);
      });
    }
  }
}

// The same rows from their feature d on.
inline Features from_feature(const Features& x, int64_t d) {
  return {static_cast<const char*>(x.data) + d * bytes_of(x.dtype), x.dtype, x.rows, x.row_stride};
}

// dQ += G^T K. The keys are packed here, a panel of features just before it is multiplied, unless `packed` has them
// all.
template <class Product>
void add_query_gradients(const Buffers<Product>& b, const Logits& x, const float* packed, int64_t rows,
                         int64_t row_capacity, int64_t col0, int64_t cols, int64_t col_capacity, bool first,
                         Ahead& ahead) {
  constexpr int kPer = Product::kPerWord;
  const int64_t k_words = (cols + kPer - 1) / kPer;
  for (int64_t d = 0; d < x.size; d += kPanel) {
    if (packed == nullptr) {
      const int64_t width = std::min<int64_t>(kPanel, x.size - d);
      pack_contracted_rows<Product>(from_feature(x.keys, d), col0, cols, width, col_capacity, b.key_panel);
    }
    const float* right = packed != nullptr ? packed + d * (col_capacity / kPer) : b.key_panel;
    float* out = b.grad_panel + d * row_capacity;
    for_each_tile(rows, [&](int64_t r, auto height) {
      ahead.fetch();
      const FloatTile to{out + r * kPanel, kPanel, !first};
      multiply<Product, height()>(k_words, FixedLeft<1, kTileStride>{b.grad_pairs + r}, right, to);
    });
  }
}

// dK += G Q. `out` begins at the gradient of the chunk's first key.
template <class Product, class Tile>
void add_key_gradients(const Buffers<Product>& b, int64_t rows, int64_t row_capacity, int64_t cols, int64_t size,
                       const Tile& out) {
  constexpr int kPer = Product::kPerWord;
  const int64_t k_words = (rows + kPer - 1) / kPer;
  for (int64_t d = 0; d < size; d += kPanel) {
    const float* right = b.query_rows + d * (row_capacity / kPer);
    const int64_t width = std::min<int64_t>(kPanel, size - d);
    for_each_tile(cols, [&](int64_t c, auto height) {
      const FixedLeft<kTileStride / kPer, 1> left{b.grad_rows + c * (kTileStride / kPer)};
      const Tile to = out.at(c, d);
      if (width == kPanel) return multiply<Product, height()>(k_words, left, right, to);
      float part[height() * kPanel];
      multiply<Product, height()>(k_words, left, right, FloatTile{part, kPanel, false});
      for (int64_t i = 0; i < height(); ++i)
        for (int64_t j = 0; j < width; ++j) to.set(i, j, part[i * kPanel + j] + (to.accumulate ? to.get(i, j) : 0.f));
    });
  }
}

#ifdef MMK_HAS_BF16_PRODUCT
// Rounds the tile of gradients to bfloat16, as pairs of keys and as pairs of queries: the two products contract over
// one each.
inline void round_tile(const Buffers<BFloat16Product>& b, int64_t rows, int64_t cols) {
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

// Scales a finished row of gradients and writes it in their dtype. The row lies in parts kPanel wide, grad_stride
// apart.
inline void finish_row(const float* grad, int64_t grad_stride, float scale, Dtype dtype_of_grads, int64_t row,
                       int64_t size, void* out) {
  with_dtype(dtype_of_grads, [&](auto dtype) {
    void* to = static_cast<char*>(out) + row * size * bytes_of(dtype());
    for (int64_t d = 0; d < size; d += Vec::kLanes) {
      const Vec value = load_floats<Dtype::kFloat32>(grad + d / kPanel * grad_stride + d % kPanel, 0, size - d);
      store_floats<dtype()>(value * Vec::set1(scale), to, d, size);
    }
  });
}

// Scales and rounds the gradients of a chunk of keys in place, once they are complete.
template <class Tile>
void finish_keys(const Logits& x, Dtype dtype, int64_t col0, int64_t cols, const Tile& grads, void* out,
                 float* buffer) {
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t d = 0; d < x.size; ++d) buffer[d] = grads.get(c, d);
    finish_row(buffer, kPanel, x.scale, dtype, col0 + c, x.size, out);
  }
}

template <class Product>
void forward_in(const Logits& x, const Tiling& t, Wavefront& wave, float* scratch, Epilogue& epilogue) {
  const Buffers<Product> b(x, t, false, scratch);
  const int64_t col_capacity = round_up(t.cols, 2);
  const bool shares = wave.packed_keys != nullptr;
  if (shares) share_keys<Product>(x, t, wave);
  for (int64_t panel; (panel = wave.next_panel.fetch_add(1)) < t.panels;) {
    const int64_t row0 = panel * t.rows, rows = std::min(t.rows, x.queries.rows - row0);
    pack_columns<Product>(x.queries, row0, rows, x.size, b.query_columns);
    epilogue.begin_panel(row0, rows);
    for (int64_t chunk = 0; chunk < t.chunks; ++chunk) {
      const int64_t col0 = chunk * t.cols, cols = std::min(t.cols, x.keys.rows - col0);
      if (shares) wait_for_keys(wave, chunk, cols);
      const float* packed = shares ? wave.packed_keys + chunk * (t.packed_floats / t.chunks) : nullptr;
      const RowsLeft keys = key_words<Product>(x.keys, col0, cols, x.size, col_capacity, b.key_rows, packed);
      const int64_t calls = calls_in_tile(x, b.words, rows, cols, true, false);
      Ahead ahead = next_keys(x, t, wave, (chunk + 1) % t.chunks, shares, calls);
      product_of_features(b, keys, rows, cols, ahead);
      epilogue.tile(b.tile, col0, cols);
      if (epilogue.has_columns()) {
        wait_for(wave.done[chunk], panel);
        epilogue.update_columns(col0, cols);
        wave.done[chunk].store(static_cast<int32_t>(panel + 1), std::memory_order_release);
      }
    }
    epilogue.end_panel(panel);
  }
}

template <class Product>
void backward_in(const Logits& x, const Gradients& grads, const Tiling& t, Wavefront& wave, float* scratch,
                 Epilogue& epilogue) {
  const Buffers<Product> b(x, t, true, scratch);
  const int64_t row_capacity = round_up(t.rows, kPanel), col_capacity = round_up(t.cols, 2);
  const Dtype dtype = grads.in_float32 ? Dtype::kFloat32 : x.queries.dtype;
  const bool shares = wave.packed_keys != nullptr && grads.queries != nullptr;
  if (shares) share_keys<Product>(x, t, wave);
  for (int64_t panel; (panel = wave.next_panel.fetch_add(1)) < t.panels;) {
    const int64_t row0 = panel * t.rows, rows = std::min(t.rows, x.queries.rows - row0);
    bool queries_packed = false;  // not where all products are recalled
    pack_contracted_rows<Product>(x.queries, row0, rows, x.size, row_capacity, b.query_rows);
    epilogue.begin_panel(row0, rows);
    for (int64_t chunk = 0; chunk < t.chunks; ++chunk) {
      const int64_t col0 = chunk * t.cols, cols = std::min(t.cols, x.keys.rows - col0);
      if (shares) wait_for_keys(wave, chunk, cols);
      const float* contracted = shares ? wave.packed_keys + chunk * (t.packed_floats / t.chunks) : nullptr;
      const bool recalled = epilogue.recall(b.tile, col0, cols);
      Ahead ahead = next_keys(x, t, wave, (chunk + 1) % t.chunks, shares && recalled,
                              calls_in_tile(x, b.words, rows, cols, !recalled, grads.queries != nullptr));
      if (!recalled) {
        if (!queries_packed) pack_columns<Product>(x.queries, row0, rows, x.size, b.query_columns);
        queries_packed = true;
        RowsLeft keys = key_words<Product>(x.keys, col0, cols, x.size, col_capacity, b.key_rows, contracted);
        product_of_features(b, keys, rows, cols, ahead);
        if (keys.data == b.key_rows && !Buffers<Product>::kPairs) contracted = keys.data;
      }
      epilogue.tile(b.tile, col0, cols);
      if constexpr (Buffers<Product>::kPairs) {
        // The partner of a last row or column without one must add nothing to the gradients.
        const int64_t padded_rows = round_up(rows, kPanel), padded_cols = round_up(cols, 2);
        for (int64_t c = 0; c < cols && rows < padded_rows; ++c)
          std::fill(b.tile + c * kTileStride + rows, b.tile + c * kTileStride + padded_rows, 0.f);
        for (int64_t c = cols; c < padded_cols; ++c)
          std::fill(b.tile + c * kTileStride, b.tile + c * kTileStride + padded_rows, 0.f);
        round_tile(b, padded_rows, padded_cols);
      }
      if (grads.queries != nullptr) {
        add_query_gradients(b, x, contracted, rows, row_capacity, col0, cols, col_capacity, chunk == 0, ahead);
      }
      const int64_t wanted_cols = grads.keys == nullptr ? 0 : std::min(cols, x.keys.rows - grads.keys_left_out - col0);
      if (wanted_cols <= 0 && !epilogue.has_columns()) continue;
      wait_for(wave.done[chunk], panel);
      const auto add = [&](const auto& out) {
        add_key_gradients(b, rows, row_capacity, wanted_cols, x.size, out);
        if (panel == t.panels - 1) finish_keys(x, dtype, col0, wanted_cols, out, grads.keys, b.tile);
      };
      const int64_t at = col0 * x.size;
      if (wanted_cols > 0 && dtype == Dtype::kFloat32) {
        add(FloatTile{static_cast<float*>(grads.keys) + at, x.size, panel > 0});
      } else if (wanted_cols > 0) {
        add(SplitTile{static_cast<uint16_t*>(grads.keys) + at, grads.low_keys + at, x.size, panel > 0});
      }
      if (epilogue.has_columns()) epilogue.update_columns(col0, cols);
      wave.done[chunk].store(static_cast<int32_t>(panel + 1), std::memory_order_release);
    }
    epilogue.end_panel(panel);
    for (int64_t r = 0; r < rows && grads.queries != nullptr; ++r)
      finish_row(b.grad_panel + r * kPanel, row_capacity * kPanel, x.scale, dtype, row0 + r, x.size, grads.queries);
  }
}

template <class Product>
void products_in(const Features& queries, int64_t row0, const ListedFeatures& keys, int64_t rows, int64_t size,
                 float* scratch, float* out) {
  const int64_t words = (size + Product::kPerWord - 1) / Product::kPerWord;
  float *query_columns = scratch, *key_columns = scratch + words * kPanel;
  for (int64_t r = 0; r < rows; r += kPanel) {
    const int64_t count = std::min<int64_t>(kPanel, rows - r);
    pack_columns<Product>(queries, row0 + r, count, size, query_columns);
    pack_columns<Product>(keys, r, count, size, key_columns);
    for (int64_t j = 0; j < count; j += Vec::kLanes) {
      Vec total = Vec::set1(0.f);
      for (int64_t w0 = 0; w0 < words; w0 += kWordsInL1) {
        Vec acc = Vec::set1(0.f);
        for (int64_t w = w0; w < std::min(words, w0 + kWordsInL1); ++w)
          acc = Product::fma(Vec::load(key_columns + w * kPanel + j), Vec::load(query_columns + w * kPanel + j), acc);
        total = w0 > 0 ? acc + total : acc;
      }
      total.store(out + r + j, static_cast<int>(std::min<int64_t>(Vec::kLanes, count - j)));
    }
  }
}

}  // namespace

void forward_panels(const Logits& x, const Tiling& t, Wavefront& wave, float* scratch, Epilogue& epilogue) {
  with_product(x.queries.dtype, [&](auto product) { forward_in<decltype(product)>(x, t, wave, scratch, epilogue); });
}

void backward_panels(const Logits& x, const Gradients& grads, const Tiling& t, Wavefront& wave, float* scratch,
                     Epilogue& epilogue) {
  with_product(x.queries.dtype,
               [&](auto product) { backward_in<decltype(product)>(x, grads, t, wave, scratch, epilogue); });
}

int64_t engine_floats(const Logits& x, const Tiling& t, bool backward) {
  return with_product(x.queries.dtype,
                      [&](auto product) { return Buffers<decltype(product)>(x, t, backward, nullptr).floats; });
}

void keep_tile(const Logits& x, const float* tile, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
               float* kept) {
  if (kept == nullptr) return;
  float* to = kept + row0 * x.keys.rows + col0 * rows;
  for (int64_t c = 0; c < cols; ++c) std::memcpy(to + c * rows, tile + c * kTileStride, rows * sizeof(float));
}

bool recall_tile(const Logits& x, const float* kept, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
                 float* tile) {
  if (kept == nullptr) return false;
  const float* from = kept + row0 * x.keys.rows + col0 * rows;
  for (int64_t c = 0; c < cols; ++c) {
    float* to = tile + c * kTileStride;
    std::memcpy(to, from + c * rows, rows * sizeof(float));
    std::fill(to + rows, to + round_up(rows, Vec::kLanes), 0.f);
  }
  return true;
}

void products_of_pairs(const Features& queries, int64_t row0, const ListedFeatures& keys, int64_t rows, int64_t size,
                       float* scratch, float* out) {
  with_product(queries.dtype,
               [&](auto product) { products_in<decltype(product)>(queries, row0, keys, rows, size, scratch, out); });
}

void Companion::begin_panel(int64_t first_row, int64_t count) {
  row0 = first_row;
  rows = count;
  with_product(logits.queries.dtype, [&](auto product) {
    using Product = decltype(product);
    pack_columns<Product>(logits.queries, row0, rows, logits.size,
                          Buffers<Product>(logits, tiling, false, scratch).query_columns);
  });
}

float* Companion::products(int64_t col0, int64_t cols, const float* kept) const {
  return with_product(logits.queries.dtype, [&](auto product) {
    using Product = decltype(product);
    const Buffers<Product> b(logits, tiling, false, scratch);
    if (recall_tile(logits, kept, row0, rows, col0, cols, b.tile)) return b.tile;
    const RowsLeft keys = key_words<Product>(logits.keys, col0, cols, logits.size, tiling.cols, b.key_rows);
    const int64_t next = (col0 + cols) % logits.keys.rows, next_cols = std::min(tiling.cols, logits.keys.rows - next);
    const int64_t calls = calls_in_tile(logits, b.words, rows, cols, true, false);
    Ahead ahead = Ahead::of(logits.keys, next, next_cols, logits.size, calls);
    product_of_features(b, keys, rows, cols, ahead);
    return b.tile;
  });
}

Tiling choose_tiling(const Logits& x, bool backward, int64_t threads, const Logits* companion) {
  const int64_t n = x.queries.rows, m = x.keys.rows;
  Tiling t{};
  // Wide features get lower panels, so that a panel stays in L2.
  const int64_t widest = companion == nullptr ? x.size : std::max(x.size, companion->size);
  const int64_t highest = std::min(kMaxRows, std::max<int64_t>(kPanel, kPanelElements / widest / kPanel * kPanel));
  t.rows = std::min(highest, std::max<int64_t>(64, round_up((n + 7) / 8, kPanel)));
  t.cols = std::min(kMaxCols, m);
  t.panels = (n + t.rows - 1) / t.rows;
  t.chunks = (m + t.cols - 1) / t.cols;
  t.scratch_floats = engine_floats(x, t, backward);
  t.packed_floats =
      with_product(x.queries.dtype, [&](auto product) { return shared_floats<decltype(product)>(x, t, backward); });
  if (companion != nullptr) t.scratch_floats += engine_floats(*companion, t, false);

  const int64_t element = x.queries.dtype == Dtype::kFloat32 ? 4 : 2;
  // All that a call holds beside inputs and gradients stays within the size of the inputs: statistics, 12 floats = 48
  // bytes per row; for half precision the low halves of the sums; packed keys; and scratch, which
  // bounds the threads.
  const int64_t held = (n + m) * 48 + (element == 2 ? m * x.size * 2 : 0) + t.packed_floats * 4;
  const int64_t allowed = (std::max((n + m) * x.size * element, kFreeBytes) - held) / (t.scratch_floats * 4);
  // A small problem is over before a second thread has woken up: 2^20 multiply-adds of info_nce (128 x 128 x 64) take
  // 30 us on one core.
  const bool small = n * m * x.size < (int64_t{1} << 20);
  t.threads = small ? 1 : std::max<int64_t>(1, std::min({threads, t.panels, allowed}));
  return t;
}

Tiling tiling_of(const Logits& x, bool backward, int64_t threads) {
  return choose_tiling(x, backward, threads, nullptr);
}

}  // namespace MMK_VARIANT
}  // namespace mmkernels
