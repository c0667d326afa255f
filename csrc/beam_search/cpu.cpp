// Beam search on CPU tensors: rows are read in cpu_kernels.cpp and merged here; step.h has the torch side.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/dispatch.h"
#include "advance.h"
#include "cpu_kernels.h"
#include "step.h"

namespace mmkernels {

MMK_VARIANTS(BeamKernels, beam_kernels)

namespace beam_search {

using at::Tensor;

// Takes the logarithm of a softmax's sum as the reference writes it down, operation by operation.
float log_of_sum(double sum) {
  int exponent;
  double mantissa = std::frexp(sum, &exponent);
  if (mantissa < 0.7071067811865476) {
    mantissa += mantissa;
    --exponent;
  }
  const double z = (mantissa - 1.0) / (mantissa + 1.0), w = z * z;
  double p = 1.0 / 15;
  for (const int n : {13, 11, 9, 7, 5, 3, 1}) p = p * w + 1.0 / n;
  return static_cast<float>(exponent * 0.6931471805599453 + (z + z) * p);
}

// Merges the lists of one item's rows into its best candidates. A score rises with its logit, so that each list is in
// the total order.
struct Item {
  const BeamRow* rows;
  const float* scores;
  const bool* valid;  // or null
  int64_t beams, wanted;
  bool normalize;

  bool takes_part(int64_t k) const { return valid == nullptr || valid[k]; }
  bool poisoned() const {
    for (int64_t k = 0; k < beams; ++k)
      if (takes_part(k) && (rows[k].poisoned || !(scores[k] < std::numeric_limits<float>::infinity()))) return true;
    return false;
  }
  void merge(float* score, int64_t* beam, int64_t* token, bool* is_valid) const {
    struct Head {
      float score, logit, log_sum;
      int64_t next;
    };
    std::vector<Head> heads(beams);
    const auto advance = [&](int64_t k) {
      const BeamRow& row = rows[k];
      Head& head = heads[k];
      if (head.next == row.count) return;
      head.logit = row.logits[head.next];
      head.score = scores[k] + (normalize ? (head.logit - row.largest) - head.log_sum : head.logit);
    };
    for (int64_t k = 0; k < beams; ++k) {
      heads[k] = {0.f, 0.f, normalize && rows[k].count > 0 ? log_of_sum(rows[k].sum) : 0.f, 0};
      advance(k);
    }
    for (int64_t c = 0; c < wanted; ++c) {
      int64_t best = -1;
      for (int64_t k = 0; k < beams; ++k) {
        const Head &head = heads[k], &first = heads[best < 0 ? k : best];
        if (head.next == rows[k].count) continue;
        if (best < 0 || head.score > first.score || (head.score == first.score && head.logit > first.logit)) best = k;
      }
      is_valid[c] = best >= 0;
      score[c] = best < 0 ? -std::numeric_limits<float>::infinity() : heads[best].score;
      beam[c] = best < 0 ? 0 : best;
      token[c] = best < 0 ? 0 : rows[best].tokens[heads[best].next];
      if (best < 0) continue;
      ++heads[best].next;
      advance(best);
    }
  }
};

void run_step(const BeamStep& s, const Tensor&) {
  const int64_t rows = s.items * s.beams;
  BeamRows p{};
  p.logits = s.logits;
  p.dtype = s.dtype;
  p.row_stride = s.row_stride;
  p.vocabulary = s.vocabulary;
  p.forbidden = s.forbidden;
  p.forbidden_stride = s.forbidden_stride;
  p.normalize = s.normalize;
  p.mask_first = s.mask_first;
  p.keep = std::min(s.candidates, s.vocabulary);

  const auto& kernels = beam_kernels_here();
  std::vector<float> kept_logits(rows * p.keep);
  std::vector<int32_t> kept_tokens(rows * p.keep);
  std::vector<BeamRow> read(rows);
  std::vector<std::atomic<int64_t>> unread(s.items);
  for (auto& count : unread) count.store(s.beams, std::memory_order_relaxed);
  // A small problem is over before a second thread has woken up: a row of 2^15 logits takes about 10 us.
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / s.vocabulary);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(kernels.scratch_floats(s.vocabulary));
    for (int64_t i = begin; i < end; ++i) {
      read[i] = {kept_logits.data() + i * p.keep, kept_tokens.data() + i * p.keep, 0, 0, 0, false};
      if (s.valid == nullptr || s.valid[i]) kernels.row(p, i, read[i], scratch.data());
      // The thread that reads an item's last row merges the item.
      const int64_t b = i / s.beams, first = b * s.beams, at = b * s.candidates;
      if (unread[b].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      const Item item{read.data() + first, s.scores + first, s.valid ? s.valid + first : nullptr, s.beams,
                      s.candidates,        s.normalize};
      s.out_poisoned[b] = item.poisoned();
      if (s.out_poisoned[b])
        for (int64_t k = 0; k < s.beams; ++k) read[first + k].count = 0;
      item.merge(s.out_scores + at, s.out_beams + at, s.out_tokens + at, s.out_valid + at);
    }
  });
}

void run_advance(const BeamAdvance& a, const Tensor&) {
  for (int64_t item = 0; item < a.items; ++item) advance_item(a, item);
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("beam_search_step_cpu", &step<run_step>);
  library.impl("beam_search_advance_cpu", &advance<run_advance>);
}

}  // namespace beam_search
}  // namespace mmkernels
