// Ranks and best keys as epilogues of the tile engine. This file is compiled once for each instruction set
// (MMK_VARIANT).
#include "cpu_kernels.h"

#include "../common/engine.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace {

// The lists of a panel take at most this much, 256 rows of 4,096 entries of 8 bytes, unless the lowest panel takes
// more: longer lists lower the panel.
constexpr int64_t kListBytes = int64_t{8} << 20;

// The variant has its own type, and so its own copy of what the standard library makes of it.
struct Before {
  bool operator()(uint64_t a, uint64_t b) const { return a > b; }
};

// Counts the keys that come before each query's target. The target's score is known before the walk, and has the very
// bits of the tiles.
struct CountBefore final : Epilogue {
  CountBefore(const RetrievalRanks& problem, float* scratch) : problem(problem), scratch(scratch) {}

  const RetrievalRanks& problem;
  float* scratch;
  int64_t row0 = 0, rows = 0, padded_rows = 0;
  int64_t target[kMaxRows];
  float positive[kMaxRows], tie[kMaxRows];
  float counts[kMaxRows];  // whole numbers, in the bits

  void begin_panel(int64_t first_row, int64_t count) override {
    row0 = first_row;
    rows = count;
    padded_rows = round_up(count, Vec::kLanes);
    for (int64_t r = 0; r < rows; ++r) target[r] = problem.targets != nullptr ? problem.targets[row0 + r] : row0 + r;
    std::fill(target + rows, target + padded_rows, int64_t{-1});
    std::fill(positive + rows, positive + padded_rows, 0.f);
    std::fill(counts, counts + padded_rows, 0.f);
    const ListedFeatures keys{problem.keys.data, problem.keys.dtype, target, problem.keys.row_stride};
    products_of_pairs(problem.scores.queries, row0, keys, rows, problem.scores.size, scratch, positive);
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    const int64_t key0 = problem.first_key + col0;
    // A key that ties counts if it stands before the target: here all do or none, but for targets in this very tile.
    for (int64_t r = 0; r < padded_rows; ++r) tie[r] = target[r] >= key0 + cols ? positive[r] : __builtin_nanf("");
    for (int64_t c0 = 0; c0 < cols; c0 += kRows) {
      const int64_t count = std::min<int64_t>(kRows, cols - c0);
      for (int64_t r = 0; r < padded_rows; r += Vec::kLanes) {
        const Vec score = Vec::load(positive + r), equal = Vec::load(tie + r);
        Vec before = Vec::load(counts + r);
        for (int64_t c = c0; c < c0 + count; ++c)
          before = count_beyond(before, Vec::load(s + c * kTileStride + r), score, equal);
        before.store(counts + r);
      }
    }
    if (problem.targets == nullptr && (row0 + rows <= key0 || key0 + cols <= row0)) return;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t end = target[r] - key0;
      if (end < 0 || end >= cols) continue;
      uint32_t ties = to_bits(counts[r]);
      for (int64_t c = 0; c < end; ++c) ties += s[c * kTileStride + r] == positive[r];
      counts[r] = from_bits(ties);
    }
  }

  void end_panel(int64_t) override {
    for (int64_t r = 0; r < rows; ++r)
      problem.counts[row0 + r] = positive[r] != positive[r] ? -1 : static_cast<int32_t>(to_bits(counts[r]));
  }
};

// Keeps what may be among the best of each query in a list. A full list is cut to k entries, and a key must then be
// beyond the last of them. Keys come in the order of their indices, so that one that ties with the last is behind it.
struct KeepBest final : Epilogue {
  KeepBest(const RetrievalTopk& problem, uint64_t* lists) : problem(problem), lists(lists) {}

  const RetrievalTopk& problem;
  uint64_t* lists;  // [rows, capacity]
  int64_t row0 = 0, rows = 0;
  int64_t used[kMaxRows];
  float level[kMaxRows];  // NaN until the first cut: everything is beyond it

  void begin_panel(int64_t first_row, int64_t count) override {
    row0 = first_row;
    rows = count;
    std::fill(used, used + rows, int64_t{0});
    std::fill(level, level + round_up(rows, Vec::kLanes), __builtin_nanf(""));
  }

  void tile(float* s, int64_t col0, int64_t cols) override {
    for (int64_t c = 0; c < cols; ++c) {
      const float* row = s + c * kTileStride;
      for (int64_t r = 0; r < rows; r += Vec::kLanes) {
        uint32_t lanes = lanes_beyond(Vec::load(row + r), Vec::load(level + r));
        if (rows - r < Vec::kLanes) lanes &= (1u << (rows - r)) - 1;
        for (; lanes != 0; lanes &= lanes - 1) {
          const int64_t at = r + __builtin_ctz(lanes);
          append(at, entry_of(row[at], problem.first_key + col0 + c));
        }
      }
    }
  }

  void append(int64_t r, uint64_t entry) {
    uint64_t* list = lists + r * problem.capacity;
    list[used[r]++] = entry;
    if (used[r] < problem.capacity) return;
    cut(list, r);
    const float last = score_of(list[problem.k - 1]);
    level[r] = last == last ? last : __builtin_inff();  // only a NaN is beyond it
  }

  void cut(uint64_t* list, int64_t r) {
    if (used[r] <= problem.k) return;
    std::nth_element(list, list + problem.k - 1, list + used[r], Before());
    used[r] = problem.k;
  }

  void end_panel(int64_t) override {
    for (int64_t r = 0; r < rows; ++r) {
      uint64_t *list = lists + r * problem.capacity, *best = problem.best + (row0 + r) * problem.k;
      cut(list, r);
      std::sort(list, list + used[r], Before());
      std::fill(std::copy(list, list + used[r], best), best + problem.k, uint64_t{0});
    }
  }
};

// Adds `extra` floats of scratch for the epilogue to the engine's tiling.
Tiling with_scratch(Tiling t, int64_t extra) {
  t.scratch_floats += round_up(extra, 16);
  return t;
}

Tiling ranks_tiling(const Logits& x, int64_t threads) {
  return with_scratch(tiling_of(x, false, threads), 2 * x.size * kPanel);
}

Tiling topk_tiling(const Logits& x, int64_t capacity, int64_t threads) {
  Tiling t = tiling_of(x, false, threads);
  const int64_t highest = kListBytes / static_cast<int64_t>(capacity * sizeof(uint64_t)) / kPanel * kPanel;
  t.rows = std::min(t.rows, std::max<int64_t>(highest, kPanel));
  t.panels = (x.queries.rows + t.rows - 1) / t.rows;
  t.scratch_floats = engine_floats(x, t, false);
  return with_scratch(t, 2 * t.rows * capacity);
}

void ranks(const RetrievalRanks& p, const Tiling& t, Wavefront& wave, float* scratch) {
  CountBefore epilogue(p, scratch + engine_floats(p.scores, t, false));
  forward_panels(p.scores, t, wave, scratch, epilogue);
}

void topk(const RetrievalTopk& p, const Tiling& t, Wavefront& wave, float* scratch) {
  KeepBest epilogue(p, reinterpret_cast<uint64_t*>(scratch + engine_floats(p.scores, t, false)));
  forward_panels(p.scores, t, wave, scratch, epilogue);
}

}  // namespace

extern const RetrievalKernels retrieval_kernels;
const RetrievalKernels retrieval_kernels{ranks_tiling, topk_tiling, ranks, topk};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
