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
  int64_t threads;         // as many as the wavefront keeps busy within the memory allowed
  int64_t scratch_floats;  // of each thread
  int64_t packed_floats;   // of keys that all panels read packed; 0: each panel packs for itself
};

// Keeps an order without locks. Threads take panels in turn, and each walks the chunks from the first to the last.
// Panel 0 updates what belongs to a chunk (statistics of columns, gradients of keys), then panel 1 does, and so on:
// `done` counts the panels that have passed. One copy of the results serves all threads, and the sums do not depend on
// how many threads there are.
struct Wavefront {
  std::atomic<int64_t> next_panel{0};
  std::atomic<int32_t>* done;  // [chunks], zeros

  // The chunks of keys that all panels share are packed once, before the first panel, piece by piece by whichever
  // thread takes the next.
  float* packed_keys = nullptr;            // [chunks][packed_floats / chunks], or null
  std::atomic<int64_t> next_keys{0};       // the first key that no thread has taken
  std::atomic<int32_t>* packed = nullptr;  // [chunks], how many pieces are packed
};

// The outputs of a backward pass, in the dtype of the features or in float32. A null pointer asks for no such output.
struct Gradients {
  void* queries;       // [n, size]
  void* keys;          // [m, size]
  uint16_t* low_keys;  // [m, size], the low halves of keys until it is complete; null for float32
  bool in_float32;
  int64_t keys_left_out;  // the last keys, which get no gradient
};

}  // namespace mmkernels
