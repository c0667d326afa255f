// The operands of the tile engines, for code compiled for any instruction set.
#pragma once

#include <cstdint>

namespace mmkernels {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

// Rows of features as the caller holds them; the elements of a row are contiguous.
struct Features {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t row_stride;  // in elements

  const void* row(int64_t i) const { return static_cast<const char*>(data) + i * row_stride * bytes_of(dtype); }
};

// Rows of features that lie anywhere: row i is the one numbered index[i].
struct ListedFeatures {
  const void* data;
  Dtype dtype;
  const int64_t* index;
  int64_t row_stride;  // in elements

  const void* row(int64_t i) const { return static_cast<const char*>(data) + index[i] * row_stride * bytes_of(dtype); }
};

}  // namespace mmkernels
