// The tile engine of the losses over all pairs of two sets of rows. engine.cpp is compiled once for each instruction
// set (MMK_VARIANT), and so is each loss.
//
// A thread holds one panel of queries, packed for both products, and walks the chunks of keys:
//   forward    S = K_J Q_I^T, and the epilogue folds the tile into the statistics of its rows and columns;
//   backward   S again, the epilogue turns it into G = d loss / d logits in place, dQ_I += G^T K_J, dK_J += G Q_I.
// Tiles are stored with the keys as rows, [keys][queries]: the packed panel of queries is the streamed operand.
//
// A loss is an epilogue; the engine knows nothing of softmax, and the epilogue nothing of dtypes and products.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "engine_types.h"
#include "tiles.h"

namespace mmkernels {
inline namespace MMK_VARIANT {

// The largest tile: 256 x 256 floats = 256 KiB, half of a 512 KiB L2.
constexpr int64_t kMaxRows = 256;
constexpr int64_t kMaxCols = 256;
// Rows of a tile lie this far apart. A line (16 floats) more than kMaxRows: rows of 256 floats = 1 KiB would put every
// fourth row on the same lines of an L1, whose sets repeat every 4 KiB.
constexpr int64_t kTileStride = kMaxRows + 16;

// What a loss makes of the tiles. A virtual call serves a tile of up to 256 x 256 pairs, so that its cost does not
// show.
class Epilogue {
 public:
  // The next panel of queries begins: `rows` of them from row0.
  virtual void begin_panel(int64_t row0, int64_t rows) = 0;
  // A forward pass reads the products of a tile, and may change them; a backward pass turns them into gradients.
  virtual void tile(float* s, int64_t col0, int64_t cols) = 0;
  // The panel has met all the keys.
  virtual void end_panel(int64_t panel) = 0;

  // Whether the loss folds results of the keys. If so, the engine calls update_columns after each tile, in the order
  // of panels for each chunk of keys, so that sums do not depend on thread timing.
  virtual bool has_columns() const { return false; }
  virtual void update_columns(int64_t /*col0*/, int64_t /*cols*/) {}

  // In a backward pass, fills in the products of a tile if the forward pass kept them; else returns false.
  virtual bool recall(float* /*s*/, int64_t /*col0*/, int64_t /*cols*/) const { return false; }

 protected:
  ~Epilogue() = default;
};

// The work of one thread. Each thread has its own scratch and its own epilogue.
void forward_panels(const Logits& x, const Tiling& t, Wavefront& wave, float* scratch, Epilogue& epilogue);
void backward_panels(const Logits& x, const Gradients& grads, const Tiling& t, Wavefront& wave, float* scratch,
                     Epilogue& epilogue);

// Cuts the problem into panels and chunks. `companion` is the second pair of sets of an epilogue with a Companion, or
// null.
Tiling choose_tiling(const Logits& x, bool backward, int64_t threads, const Logits* companion);
Tiling tiling_of(const Logits& x, bool backward, int64_t threads);

// How many floats of a thread's scratch the engine takes. What an epilogue needs lies behind them.
int64_t engine_floats(const Logits& x, const Tiling& t, bool backward);

// Copies a tile of products to `kept`, which keeps all of them for the backward pass: panel after panel, each
// [keys][its rows], so that a thread fetches fresh pages of its own in order. A null `kept` keeps none.
void keep_tile(const Logits& x, const float* tile, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float* kept);

// Copies it back, with zeros in the lanes past the last row, as the product itself leaves them. Returns false if `kept`
// is null.
bool recall_tile(const Logits& x, const float* kept, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
                 float* tile);

// Multiplies single pairs: query row0 + i and the key that keys.index[i] names, for i < rows. The products have the
// very bits of the tiles, because they repeat the order of their sums. The scratch holds 2 size kPanel floats.
void products_of_pairs(const Features& queries, int64_t row0, const ListedFeatures& keys, int64_t rows, int64_t size,
                       float* scratch, float* out);

// Multiplies a second pair of sets of rows, tile by tile beside the engine's own. An epilogue that needs such products
// holds a Companion, whose scratch lies behind the engine's.
class Companion {
 public:
  Companion(const Logits& logits, const Tiling& tiling, float* scratch)
      : logits(logits), tiling(tiling), scratch(scratch) {}

  void begin_panel(int64_t first_row, int64_t count);
  // Returns the products of the panel and a chunk of keys, laid out as the engine's tile and valid until the next call.
  // It copies them from `kept`, which has all products, unless that is null.
  float* products(int64_t col0, int64_t cols, const float* kept = nullptr) const;

 private:
  const Logits& logits;
  const Tiling& tiling;
  float* const scratch;
  int64_t row0 = 0, rows = 0;
};

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

template <class Call>
void with_flag(bool flag, const Call& call) {
  flag ? call(std::true_type{}) : call(std::false_type{});
}
template <class Call>
void with_flags(bool first, bool second, const Call& call) {
  with_flag(first, [&](auto one) { with_flag(second, [&](auto two) { call(one, two); }); });
}

}  // namespace MMK_VARIANT
}  // namespace mmkernels
