// Tile products: packing of operands into panels, and the register kernel that multiplies them.
//
// All operands are 32-bit words: a float, or a pair of bfloat16 neighbours along the contracted axis (Product below).
// A panel is kPanel words wide and contiguous, so that the register kernel streams it from L1.
#pragma once

#include "simd.h"
#include "tiles_types.h"

namespace mmkernels {

inline namespace MMK_VARIANT {

// The register tile: kRows x kPanel accumulators, kVecs vectors wide.
constexpr int kVecs = 2;
constexpr int kRows = Vec::kLanes == 16 ? 8 : 4;
constexpr int kPanel = kVecs * Vec::kLanes;

MMK_INLINE int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

struct Float32Product {
  static constexpr int kPerWord = 1;
  static MMK_INLINE Vec fma(Vec a, Vec b, Vec c) { return MMK_VARIANT::fma(a, b, c); }
};
#ifdef MMK_HAS_BF16_PRODUCT
struct BFloat16Product {
  static constexpr int kPerWord = 2;
  static MMK_INLINE Vec fma(Vec a, Vec b, Vec c) { return fma_pairs(a, b, c); }
};
#endif

// Where a finished register tile goes. Each takes the part of a kRows x kPanel tile that lies inside the matrix.

// Floats, row_stride apart.
struct FloatTile {
  float* data;
  int64_t row_stride;
  bool accumulate;

  MMK_INLINE void prefetch() const {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kPanel; j += 16) __builtin_prefetch(data + i * row_stride + j, 1, 3);
  }
  MMK_INLINE FloatTile at(int64_t row, int64_t col) const {
    return {data + row * row_stride + col, row_stride, accumulate};
  }
  MMK_INLINE float get(int64_t row, int64_t col) const { return data[row * row_stride + col]; }
  MMK_INLINE void set(int64_t row, int64_t col, float value) const { data[row * row_stride + col] = value; }
  MMK_INLINE void put(int row, int vec, Vec value) const {
    float* p = data + row * row_stride + vec * Vec::kLanes;
    (accumulate ? value + Vec::load(p) : value).store(p);
  }
};

// Floats kept as two halves of 16 bits: the high halves lie in the (half-precision) output, the low ones beside it.
// Lossless float32 accumulation for a half-precision result at half the extra memory.
struct SplitTile {
  uint16_t* high;
  uint16_t* low;
  int64_t row_stride;
  bool accumulate;

  MMK_INLINE void prefetch() const {
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(high + i * row_stride, 1, 3);
      __builtin_prefetch(low + i * row_stride, 1, 3);
    }
  }
  MMK_INLINE SplitTile at(int64_t row, int64_t col) const {
    const int64_t by = row * row_stride + col;
    return {high + by, low + by, row_stride, accumulate};
  }
  MMK_INLINE float get(int64_t row, int64_t col) const {
    const int64_t by = row * row_stride + col;
    return from_bits(static_cast<uint32_t>(high[by]) << 16 | low[by]);
  }
  MMK_INLINE void set(int64_t row, int64_t col, float value) const {
    const uint32_t bits = to_bits(value);
    high[row * row_stride + col] = static_cast<uint16_t>(bits >> 16);
    low[row * row_stride + col] = static_cast<uint16_t>(bits);
  }
  MMK_INLINE void put(int row, int vec, Vec value) const {
    const int64_t at = row * row_stride + vec * Vec::kLanes;
    if (accumulate) value = value + Vec::load_pairs(low + at, high + at, Vec::kLanes);
    value.store_halves(high + at, low + at);
  }
};

// tile = A B (+ tile): kRows rows of A, one panel of B, contracted over k words.
//   A: word (i, k) at a[i * kARow + k * kAStep], and a_jump words further after every kPanel values of k.
//   B: word (k, j) at b[k * kPanel + j].
template <class Product, int kARow, int kAStep, class Tile>
MMK_INLINE void multiply(int64_t k_words, const float* a, int64_t a_jump, const float* b, const Tile& tile) {
  Vec acc[kRows][kVecs];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec::set1(0.f);
  tile.prefetch();
  for (int64_t k0 = 0; k0 < k_words; k0 += kPanel) {
    const int count = k_words - k0 < kPanel ? static_cast<int>(k_words - k0) : kPanel;
    for (int k = 0; k < count; ++k) {
      Vec right[kVecs];
      for (int j = 0; j < kVecs; ++j) right[j] = Vec::load(b + j * Vec::kLanes);
      for (int i = 0; i < kRows; ++i) {
        const Vec left = Vec::set1(a[i * kARow]);
        for (int j = 0; j < kVecs; ++j) acc[i][j] = Product::fma(left, right[j], acc[i][j]);
      }
      a += kAStep;
      b += kPanel;
    }
    a += a_jump;
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) tile.put(i, j, acc[i][j]);
}

// One vector of words of a row, elements [at, size), zero past the end.
template <class Product>
MMK_INLINE Vec load_words(const Features& x, int64_t row, int64_t at, int64_t size) {
  const int64_t left = size - at, offset = row * x.row_stride + at;
  if (left <= 0) return Vec::set1(0.f);
  if constexpr (Product::kPerWord == 1) {
    const int n = left < Vec::kLanes ? static_cast<int>(left) : Vec::kLanes;
    switch (x.dtype) {
      case Dtype::kFloat32:
        return Vec::load(static_cast<const float*>(x.data) + offset, n);
      case Dtype::kBFloat16:
        return Vec::load_bf16(static_cast<const uint16_t*>(x.data) + offset, n);
      default:
        return Vec::load_f16(static_cast<const uint16_t*>(x.data) + offset, n);
    }
  } else {
    float words[Vec::kLanes] = {};
    const int64_t n = left < 2 * Vec::kLanes ? left : 2 * Vec::kLanes;
    std::memcpy(words, static_cast<const uint16_t*>(x.data) + offset, n * sizeof(uint16_t));
    return Vec::load(words);
  }
}

// Rows [row, row + count) to panels of words along the features: out[panel][capacity rows][kPanel].
template <class Product>
void pack_rows(const Features& x, int64_t row, int64_t count, int64_t size, int64_t capacity, float* out) {
  const int64_t words = (size + Product::kPerWord - 1) / Product::kPerWord;
  for (int64_t i = 0; i < count; ++i) {
    float* to = out + i * kPanel;
    for (int64_t w = 0; w < words; w += kPanel, to += capacity * kPanel)
      for (int j = 0; j < kPanel; j += Vec::kLanes)
        load_words<Product>(x, row + i, (w + j) * Product::kPerWord, size).store(to + j);
  }
}

// Rows [row, row + count) to panels along the rows: out[panel][words][kPanel], word w of row i in lane i. Lanes past
// the last row are zero.
template <class Product>
void pack_columns(const Features& x, int64_t row, int64_t count, int64_t size, float* out) {
  const int64_t words = (size + Product::kPerWord - 1) / Product::kPerWord;
  for (int64_t i0 = 0; i0 < count; i0 += kPanel, out += words * kPanel) {
    for (int64_t w = 0; w < words; w += Vec::kLanes) {
      const int64_t n = words - w < Vec::kLanes ? words - w : Vec::kLanes;
      for (int i = 0; i < kPanel; ++i) {
        float lane[Vec::kLanes];
        (i0 + i < count ? load_words<Product>(x, row + i0 + i, w * Product::kPerWord, size) : Vec::set1(0.f)).store(lane);
        for (int64_t j = 0; j < n; ++j) out[(w + j) * kPanel + i] = lane[j];
      }
    }
  }
}

#ifdef MMK_HAS_BF16_PRODUCT
// Rows [row, row + count) to panels of pairs of rows: out[panel][capacity / 2][kPanel], rows 2i and 2i + 1 in a word.
// A last row without a partner is paired with zeros.
inline void pack_row_pairs(const Features& x, int64_t row, int64_t count, int64_t size, int64_t capacity, float* out) {
  const uint16_t zeros[Vec::kLanes] = {};
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + row * x.row_stride;
  for (int64_t i = 0; i < count; i += 2, from += 2 * x.row_stride) {
    float* to = out + i / 2 * kPanel;
    for (int64_t w = 0; w < size; w += kPanel, to += capacity / 2 * kPanel) {
      for (int j = 0; j < kPanel; j += Vec::kLanes) {
        const int64_t left = size - w - j;
        const int n = left >= Vec::kLanes ? Vec::kLanes : left > 0 ? static_cast<int>(left) : 0;
        const uint16_t* first = n ? from + w + j : zeros;
        const uint16_t* second = n && i + 1 < count ? first + x.row_stride : zeros;
        Vec::load_pairs(first, second, n).store(to + j);
      }
    }
  }
}
#endif

}  // namespace MMK_VARIANT
}  // namespace mmkernels
