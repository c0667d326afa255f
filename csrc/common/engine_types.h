// What the tile engine takes: plain data, so that its variants, one for each instruction set, need no torch header.
#pragma once

#include <atomic>
#include <cstdint>

#include "tiles_types.h"

namespace mmkernels {

// The logits are scale * queries keys^T. They are cut into panels of queries and chunks of keys; a tile is one of each.
struct Logits {
  Features queries;  // [n, size]
  Features keys;     // [m, size]
  int64_t size;
  float scale;
};

struct Tiling {
  int64_t rows, cols;  // of a tile
  int64_t panels, chunks;
  int64_t threads;         // that the wavefront can keep busy within the memory allowed
  int64_t scratch_floats;  // of each thread
};

// Order without locks: threads take panels in turn, and each walks the chunks from the first to the last. What belongs
// to a chunk (statistics of columns, gradients of keys) is updated by panel 0, then panel 1, ...: `done` counts the
// panels that have passed. One copy serves all threads, and the sums do not depend on how many there are.
struct Wavefront {
  std::atomic<int64_t> next_panel{0};
  std::atomic<int32_t>* done;  // [chunks], zeros
};

// Outputs of a backward pass, in the dtype of the features or in float32; null: not wanted.
struct Gradients {
  void* queries;       // [n, size]
  void* keys;          // [m, size]
  uint16_t* low_keys;  // [m, size], the low halves of keys until it is complete; null for float32
  bool in_float32;
  int64_t keys_left_out;  // the last keys, which get no gradient
};

}  // namespace mmkernels
