// The operands of tile products, as plain data for code compiled for any instruction set.
#pragma once

#include <cstdint>

namespace mmkernels {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

// Rows of features as the caller holds them. The elements of a row are contiguous.
struct Features {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t row_stride;  // in elements

  const void* row(int64_t i) const { return static_cast<const char*>(data) + i * row_stride * bytes_of(dtype); }
};

// Rows picked from such features: row i is number index[i] of theirs.
struct ListedFeatures {
  const void* data;
  Dtype dtype;
  const int64_t* index;
  int64_t row_stride;  // in elements

  const void* row(int64_t i) const { return static_cast<const char*>(data) + index[i] * row_stride * bytes_of(dtype); }
};

}  // namespace mmkernels
