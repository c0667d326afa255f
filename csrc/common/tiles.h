// Tile products: packing of operands into panels, and the register kernel that multiplies them.
//
// All operands are 32-bit words: a float, or a pair of bfloat16 neighbours along the contracted axis (Product below).
// A panel is kPanel words wide and contiguous, so that the register kernel streams it from L1.
#pragma once

#include <type_traits>

#include "simd/simd.h"
#include "tiles_types.h"

namespace mmkernels {

inline namespace MMK_VARIANT {

// The register tile has kRows x kPanel sums, kVecs vectors wide, beside kVecs vectors of the panel and a word of A:
//   AVX-512   8 x 2 of 32 registers          AVX2    6 x 2 of 16 registers
//   aarch64   5 x 4 of 32 registers          SSE2    4 x 2 of 16 registers; a product needs one too, without an fma
// Two multiply-adds a clock of 4 clocks each need 8 sums under way; 12 leave room for a load that comes late.
constexpr bool kNarrow = Vec::kLanes == 4, kHas32Registers = Vec::kRegisters == 32;
constexpr int kVecs = kNarrow && kHas32Registers ? 4 : 2;
constexpr int kRows = Vec::kLanes == 16 ? 8 : kNarrow ? (kHas32Registers ? 5 : 4) : 6;
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

// Calls visit(row, height) for each register tile that `rows` rows take: kRows of them, and the rest in a lower one.
// The height is a constant, so that the register kernel reads and writes no row that is not there.
template <int kHeight, class Visit>
MMK_INLINE void visit_rest(int64_t row, int64_t rest, const Visit& visit) {
  if constexpr (kHeight > 0) {
    if (rest == kHeight) return visit(row, std::integral_constant<int, kHeight>{});
    visit_rest<kHeight - 1>(row, rest, visit);
  }
}
template <class Visit>
MMK_INLINE void for_each_tile(int64_t rows, const Visit& visit) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) visit(row, std::integral_constant<int, kRows>{});
  visit_rest<kRows - 1>(row, rows - row, visit);
}

// The types of tile that a finished register tile is put into.

// A tile of floats whose rows lie row_stride apart.
struct FloatTile {
  float* data;
  int64_t row_stride;
  bool accumulate;

  MMK_INLINE void prefetch(int height) const {
    for (int i = 0; i < height; ++i)
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

// A tile of floats kept as two halves of 16 bits: the high halves lie in the half-precision output, the low ones beside
// it. So a half-precision result accumulates in float32, without loss, and takes half the extra memory of a float32
// copy.
struct SplitTile {
  uint16_t* high;
  uint16_t* low;
  int64_t row_stride;
  bool accumulate;

  MMK_INLINE void prefetch(int height) const {
    for (int i = 0; i < height; ++i) {
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

// The types of left operand say where its words lie: word (i, k) at data[i * row + k * step], and `jump` words further
// after every kPanel values of k. The compiler addresses better with strides that it knows (FixedLeft).
template <int kRow, int kStep>
struct FixedLeft {
  const float* data;
  static constexpr int64_t row = kRow, step = kStep, jump = 0;
};
struct RowsLeft {
  const float* data;
  int64_t row, jump;
  static constexpr int64_t step = 1;
};
struct ColumnsLeft {
  const float* data;
  int64_t step;
  static constexpr int64_t row = 1, jump = 0;
};

// tile = A B (+ tile): kHeight rows of A, one panel of B, contracted over k words. Word (k, j) of B at
// b[k * kPanel + j]. It multiplies the first kUsed vectors of the panel.
template <class Product, int kHeight, int kUsed = kVecs, class Left, class Tile>
MMK_INLINE void multiply(int64_t k_words, const Left& left, const float* b, const Tile& tile) {
  const float* a = left.data;
  Vec acc[kHeight][kUsed];
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kUsed; ++j) acc[i][j] = Vec::set1(0.f);
  tile.prefetch(kHeight);
  const int64_t words_to_jump = left.jump == 0 ? k_words : kPanel;
  for (int64_t k0 = 0; k0 < k_words; k0 += words_to_jump) {
    const int64_t count = k_words - k0 < words_to_jump ? k_words - k0 : words_to_jump;
    for (int64_t k = 0; k < count; ++k) {
      Vec right[kUsed];
#pragma GCC unroll 16
      for (int j = 0; j < kUsed; ++j) right[j] = Vec::load(b + j * Vec::kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kHeight; ++i) {
        const Vec word = Vec::set1(a[i * left.row]);
#pragma GCC unroll 16
        for (int j = 0; j < kUsed; ++j) acc[i][j] = Product::fma(word, right[j], acc[i][j]);
      }
      a += left.step;
      b += kPanel;
    }
    a += left.jump;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kHeight; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kUsed; ++j) tile.put(i, j, acc[i][j]);
}

// Fetches memory that is needed soon to L2, a few lines at a time while the register kernel works.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  int64_t lines_at_once = 0;

  // Fetches rows [row, row + count) of x in `calls` equal parts.
  static Ahead of(const Features& x, int64_t row, int64_t count, int64_t size, int64_t calls) {
    if (count <= 0 || x.row_stride != size) return {};
    return of(x.row(row), count * size * bytes_of(x.dtype), calls);
  }
  static Ahead of(const void* data, int64_t bytes, int64_t calls) {
    const char* first = static_cast<const char*>(data);
    const int64_t lines = (bytes + 63) / 64;
    return {first, first + lines * 64, (lines + calls - 1) / calls};
  }
  MMK_INLINE void fetch() {
    for (int64_t i = 0; i < lines_at_once && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Loads one vector of elements of a row as floats, from element `at`, with zeros from element `size` on.
template <Dtype kDtype>
MMK_INLINE Vec load_floats(const void* row, int64_t at, int64_t size) {
  const int n = size - at < Vec::kLanes ? static_cast<int>(size - at) : Vec::kLanes;
  if constexpr (kDtype == Dtype::kFloat32) return Vec::load(static_cast<const float*>(row) + at, n);
  if constexpr (kDtype == Dtype::kBFloat16) return Vec::load_bf16(static_cast<const uint16_t*>(row) + at, n);
  return Vec::load_f16(static_cast<const uint16_t*>(row) + at, n);
}

// Stores one vector of floats as elements of a row, from element `at`; leaves alone what lies at element `size` and on.
template <Dtype kDtype>
MMK_INLINE void store_floats(Vec values, void* row, int64_t at, int64_t size) {
  const int n = size - at < Vec::kLanes ? static_cast<int>(size - at) : Vec::kLanes;
  if constexpr (kDtype == Dtype::kFloat32) return values.store(static_cast<float*>(row) + at, n);
  if constexpr (kDtype == Dtype::kBFloat16) return values.store_bf16(static_cast<uint16_t*>(row) + at, n);
  values.store_f16(static_cast<uint16_t*>(row) + at, n);
}

// For the last vector of `count` values: minus infinity in the lanes past the last, zero in the others.
MMK_INLINE Vec edge_of(int64_t count) {
  const int64_t inside = count - (round_up(count, Vec::kLanes) - Vec::kLanes);
  float lanes[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) lanes[i] = i < inside ? 0.f : kNegativeInfinity;
  return Vec::load(lanes);
}

// Loads one vector of words of a row, from element `at`, with zeros from element `size` on.
template <class Product, Dtype kDtype>
MMK_INLINE Vec load_words(const void* row, int64_t at, int64_t size) {
  const int64_t left = size - at;
  if (left <= 0) return Vec::set1(0.f);
  if constexpr (Product::kPerWord == 1) {
    return load_floats<kDtype>(row, at, size);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(row) + at;
    if (left >= 2 * Vec::kLanes) return Vec::load(reinterpret_cast<const float*>(from));
    float words[Vec::kLanes] = {};
    std::memcpy(words, from, left * sizeof(uint16_t));
    return Vec::load(words);
  }
}

template <class Call>
MMK_INLINE void with_dtype(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::kFloat32:
      return call(std::integral_constant<Dtype, Dtype::kFloat32>{});
    case Dtype::kBFloat16:
      return call(std::integral_constant<Dtype, Dtype::kBFloat16>{});
    default:
      return call(std::integral_constant<Dtype, Dtype::kFloat16>{});
  }
}

// Packs rows [row, row + count) into panels of words along the features: out[panel][capacity rows][kPanel].
template <class Product, class Rows>
void pack_rows(const Rows& x, int64_t row, int64_t count, int64_t size, int64_t capacity, float* out) {
  const int64_t words = (size + Product::kPerWord - 1) / Product::kPerWord;
  with_dtype(x.dtype, [&](auto dtype) {
    for (int64_t w = 0; w < words; w += kPanel, out += capacity * kPanel)
      for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < kPanel; j += Vec::kLanes)
          load_words<Product, dtype()>(x.row(row + i), (w + j) * Product::kPerWord, size).store(out + i * kPanel + j);
  });
}

// Packs rows [row, row + count) into panels along the rows: out[panel][words][kPanel], word w of row i in lane i. Lanes
// past the last row are zero.
template <class Product, class Rows>
void pack_columns(const Rows& x, int64_t row, int64_t count, int64_t size, float* out) {
  const int64_t words = (size + Product::kPerWord - 1) / Product::kPerWord;
  with_dtype(x.dtype, [&](auto dtype) {
    for (int64_t i0 = 0; i0 < count; i0 += kPanel, out += words * kPanel) {
      for (int64_t w = 0; w < words; w += Vec::kLanes) {
        const int64_t n = words - w < Vec::kLanes ? words - w : Vec::kLanes;
        for (int i1 = 0; i1 < kPanel; i1 += Vec::kLanes) {
          Vec lanes[Vec::kLanes];
          for (int i = 0; i < Vec::kLanes; ++i) {
            const int64_t at = i0 + i1 + i;
            lanes[i] = at < count ? load_words<Product, dtype()>(x.row(row + at), w * Product::kPerWord, size)
                                  : Vec::set1(0.f);
          }
          transpose(lanes);
          for (int64_t j = 0; j < n; ++j) lanes[j].store(out + (w + j) * kPanel + i1);
        }
      }
    }
  });
}

#ifdef MMK_HAS_BF16_PRODUCT
// Packs rows [row, row + count) into panels of pairs of rows: out[panel][capacity / 2][kPanel], rows 2i and 2i + 1 in a
// word. Zeros are the partner of a last row without one.
template <class Rows>
void pack_row_pairs(const Rows& x, int64_t row, int64_t count, int64_t size, int64_t capacity, float* out) {
  const uint16_t zeros[Vec::kLanes] = {};
  for (int64_t w = 0; w < size; w += kPanel, out += capacity / 2 * kPanel) {
    for (int64_t i = 0; i < count; i += 2) {
      const uint16_t* upper = static_cast<const uint16_t*>(x.row(row + i));
      const uint16_t* lower = i + 1 < count ? static_cast<const uint16_t*>(x.row(row + i + 1)) : nullptr;
      for (int j = 0; j < kPanel; j += Vec::kLanes) {
        const int64_t left = size - w - j;
        const int n = left >= Vec::kLanes ? Vec::kLanes : left > 0 ? static_cast<int>(left) : 0;
        const uint16_t* first = n ? upper + w + j : zeros;
        const uint16_t* second = n && lower ? lower + w + j : zeros;
        Vec::load_pairs(first, second, n).store(out + i / 2 * kPanel + j);
      }
    }
  }
}
#endif

// Packs rows [row, row + count) as the right operand of a product that contracts over the rows.
template <class Product, class Rows>
void pack_contracted_rows(const Rows& x, int64_t row, int64_t count, int64_t size, int64_t capacity, float* out) {
#ifdef MMK_HAS_BF16_PRODUCT
  if constexpr (Product::kPerWord == 2) return pack_row_pairs(x, row, count, size, capacity, out);
#endif
  pack_rows<Product>(x, row, count, size, capacity, out);
}

}  // namespace MMK_VARIANT
}  // namespace mmkernels
