// Finds the statistics of a row's softmax and its best entries. This file is compiled once for each instruction set
// (MMK_VARIANT).
//
// The kernel reads a row from memory once, for the largest entry of every block; it was fetched while the row before it
// was summed, and is in the cache for its own sum. The keep-th largest of the blocks' largest bounds the keep-th
// largest entry from below, so that the kernel looks for candidates only in the few blocks that reach it.
//
// Every variant gives the same bits (mmkernels/beam_search/reference.py says how): no operation is contracted, and the
// sum is exact.
#include "cpu_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/tiles.h"
#include "step_types.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

// 50,257 logits are 197 blocks: as many maxima to compare, and blocks of 256 to look into, where `keep` is about 10.
constexpr int64_t kBlock = 256;

// Adding 1.5 x 2^23 quanta rounds to a whole number of them: see quantum_bits and log_sums in the reference.
float quantum_shift(int64_t vocabulary) {
  int bits = 0;
  while ((int64_t{1} << bits) < vocabulary) ++bits;
  return 1.5f * std::ldexp(1.f, 23 - (52 - bits));
}

// e^x for x <= 0. Each product and each sum rounds by itself. The one fma is a sum in disguise: the multipliers have
// less to do here than the adders.
MMK_INLINE Vec exact_exp(Vec x) {
  const Vec whole = Vec::set1(12582912.f + 127.f);
  const Vec y = max(Vec::set1(-100.f), x * Vec::set1(1.44269504088896341f));
  const Vec k = fma(y, Vec::set1(1.f), whole);
  const Vec f = y - (k - whole);
  Vec p = Vec::set1(0.00132647273f);
  p = p * f + Vec::set1(0.00967151299f);
  p = p * f + Vec::set1(0.0555073358f);
  p = p * f + Vec::set1(0.240222424f);
  p = p * f + Vec::set1(0.693147004f);
  p = p * f + Vec::set1(1.f);
  return p * exponent_of_low_bits(k);
}

// Reads the row in blocks of floats, with -inf past its end and, where asked for, in place of the forbidden.
template <Dtype kDtype>
struct Blocks {
  const BeamRows& rows;
  const void* row;
  const bool* forbidden;
  float* stage;

  // Returns a block in memory: in place if it can be read there, else a copy in `stage`.
  MMK_INLINE const float* floats(int64_t at, bool masked) const {
    const int64_t n = std::min(kBlock, rows.vocabulary - at);
    if (kDtype == Dtype::kFloat32 && !masked && n == kBlock) return static_cast<const float*>(row) + at;
    for (int64_t i = 0; i < n; i += Vec::kLanes) load_floats<kDtype>(row, at + i, rows.vocabulary).store(stage + i);
    std::fill(stage + n, stage + kBlock, kNegativeInfinity);
    if (masked)
      for (int64_t i = 0; i < n; ++i) stage[i] = forbidden[at + i] ? kNegativeInfinity : stage[i];
    return stage;
  }
  // Returns what `use` makes of a block whose vector at i is load(i).
  template <class Use>
  MMK_INLINE auto read(int64_t at, bool masked, const Use& use) const {
    if (!masked && at + kBlock <= rows.vocabulary)
      return use([&](int64_t i) { return load_floats<kDtype>(row, at + i, at + i + Vec::kLanes); });
    const float* block = floats(at, masked);
    return use([&](int64_t i) { return Vec::load(block + i); });
  }
};

// Fetches a block of the next row while this row's exponentials keep the arithmetic busy.
template <Dtype kDtype>
MMK_INLINE void prefetch_block(const void* row, int64_t at) {
  const char* first = static_cast<const char*>(row) + at * bytes_of(kDtype);
  for (int64_t line = 0; line < kBlock * bytes_of(kDtype); line += 64) __builtin_prefetch(first + line, 0, 2);
}

// Finds the largest of a block.
struct Largest {
  template <class Load>
  MMK_INLINE float operator()(const Load& load) const {
    Vec a = load(0), b = load(Vec::kLanes);
    for (int64_t i = 2 * Vec::kLanes; i < kBlock; i += 2 * Vec::kLanes) {
      a = max(a, load(i));
      b = max(b, load(i + Vec::kLanes));
    }
    return max(a, b).largest();
  }
};

// Sums e^(x - top) over kCount vectors that lie kSumColumns apart: neighbours first, then neighbouring sums.
template <int64_t kCount, class Load>
MMK_INLINE Vec sum_of_exps(const Load& load, int64_t at, Vec top) {
  if constexpr (kCount == 1)
    return exact_exp(load(at) - top);
  else
    return sum_of_exps<kCount / 2>(load, at, top) + sum_of_exps<kCount / 2>(load, at + kCount / 2 * kSumColumns, top);
}

// Puts x behind its equals into the list of the largest so far, which holds at most `keep`. x is above the last entry
// of a full list.
MMK_INLINE void place(float x, int64_t token, int64_t keep, BeamRow& list) {
  int64_t at = list.count < keep ? list.count++ : keep - 1;
  for (; at > 0 && list.logits[at - 1] < x; --at) {
    list.logits[at] = list.logits[at - 1];
    list.tokens[at] = list.tokens[at - 1];
  }
  list.logits[at] = x;
  list.tokens[at] = static_cast<int32_t>(token);
}

template <Dtype kDtype>
void read_row(const BeamRows& p, int64_t index, BeamRow& out, float* scratch) {
  const int64_t V = p.vocabulary, num_blocks = (V + kBlock - 1) / kBlock;
  float *stage = scratch, *block_max = scratch + kBlock;
  const Blocks<kDtype> blocks{p, p.row(index), p.forbidden ? p.forbidden + index * p.forbidden_stride : nullptr, stage};
  const bool masked = blocks.forbidden != nullptr, mask_first = masked && (p.mask_first || !p.normalize);

  float largest = kNegativeInfinity;
  for (int64_t i = 0; i < num_blocks; ++i) {
    block_max[i] = blocks.read(i * kBlock, masked, Largest{});
    const float in_softmax = masked && !mask_first ? blocks.read(i * kBlock, false, Largest{}) : block_max[i];
    if (!(in_softmax <= largest)) largest = in_softmax;  // keeps a NaN
  }
  out.largest = largest;
  out.sum = 0;
  out.count = 0;

  if (p.normalize && largest != kNegativeInfinity) {
    const Vec top = Vec::set1(largest), shift = Vec::set1(quantum_shift(V));
    DoubleSum sum;
    for (int64_t i = 0; i < num_blocks; ++i) {
      prefetch_block<kDtype>(p.row(index + 1), i * kBlock);
      blocks.read(i * kBlock, mask_first, [&](const auto& load) {
        for (int64_t part = 0; part < kBlock; part += kSumRows * kSumColumns)
          for (int64_t column = 0; column < kSumColumns; column += Vec::kLanes)
            sum.add((sum_of_exps<kSumRows>(load, part + column, top) + shift) - shift);
      });
    }
    out.sum = sum.total();
    out.poisoned = out.sum != out.sum;
  } else {
    Vec poison = Vec::set1(0.f);
    for (int64_t i = 0; i < num_blocks; ++i)
      blocks.read(i * kBlock, mask_first, [&](const auto& load) {
        for (int64_t j = 0; j < kBlock; j += Vec::kLanes)
          poison = poison + max(Vec::set1(-std::numeric_limits<float>::max()), load(j)) * Vec::set1(0.f);
      });
    const float sum = poison.sum();
    out.poisoned = sum != sum;
  }
  if (out.poisoned || p.keep == 0) return;

  float level = kNegativeInfinity;  // candidates lie above it
  if (num_blocks >= p.keep) {
    for (int64_t i = 0; i < num_blocks; ++i)
      if (out.count < p.keep || block_max[i] > out.logits[p.keep - 1]) place(block_max[i], i, p.keep, out);
    level = std::nextafter(out.logits[p.keep - 1], kNegativeInfinity);
    out.count = 0;
  }
  for (int64_t i = 0; i < num_blocks; ++i) {
    if (!(block_max[i] > level)) continue;
    const float* block = blocks.floats(i * kBlock, masked);
    for (int64_t j = 0; j < kBlock; j += Vec::kLanes) {
      if (!any_above(Vec::load(block + j), Vec::set1(level))) continue;
      for (int64_t lane = j; lane < j + Vec::kLanes; ++lane) {
        if (!(block[lane] > level)) continue;
        place(block[lane], i * kBlock + lane, p.keep, out);
        if (out.count == p.keep) level = std::max(level, out.logits[p.keep - 1]);
      }
    }
  }
}

void row(const BeamRows& p, int64_t index, BeamRow& out, float* scratch) {
  with_dtype(p.dtype, [&](auto dtype) { read_row<dtype()>(p, index, out, scratch); });
}

int64_t scratch_floats(int64_t vocabulary) {
  return kBlock + (vocabulary + kBlock - 1) / kBlock;
}

}  // namespace

extern const BeamKernels beam_kernels;
const BeamKernels beam_kernels{MMK_STRING(MMK_VARIANT), scratch_floats, row};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
