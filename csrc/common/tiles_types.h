// The operands of the tile engines, for code compiled for any instruction set.
#pragma once

#include <cstdint>

namespace mmkernels {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// Rows of features as the caller holds them; the elements of a row are contiguous.
struct Features {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t row_stride;  // in elements
};

}  // namespace mmkernels
