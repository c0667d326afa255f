// Beam search on CPU tensors: the step, whose rows are read in cpu_kernels.cpp and merged here, and what follows it.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/dispatch.h"
#include "../common/tensors.h"
#include "cpu_kernels.h"

namespace mmkernels {

MMK_VARIANTS(BeamKernels, beam_kernels)

namespace {

using at::Tensor;
using std::optional;

// The logarithm of a softmax's sum as the reference writes it down, operation by operation.
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

// The best candidates of one item, merged from its rows' lists: a score rises with its logit, so each list stands in
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step(const Tensor& logits_in, const Tensor& scores_in,
                                                        const optional<Tensor>& valid_in,
                                                        const optional<Tensor>& forbidden_in, int64_t num_candidates,
                                                        bool normalize, bool mask_first) {
  TORCH_CHECK_VALUE(logits_in.dim() == 2 && scores_in.dim() == 2 && logits_in.size(0) == scores_in.numel(),
                    "logits, scores: expected [B K, V] and [B, K], got ", logits_in.sizes(), " and ",
                    scores_in.sizes());
  TORCH_CHECK_TYPE(logits_in.scalar_type() == at::kFloat || logits_in.scalar_type() == at::kBFloat16 ||
                       logits_in.scalar_type() == at::kHalf,
                   "logits: expected float32, bfloat16 or float16, got ", logits_in.scalar_type());
  TORCH_CHECK_TYPE(scores_in.scalar_type() == at::kFloat, "scores: expected float32, got ", scores_in.scalar_type());
  const Tensor logits = logits_in.stride(1) == 1 ? logits_in : logits_in.contiguous(), scores = scores_in.contiguous();
  const int64_t B = scores.size(0), K = scores.size(1), V = logits.size(1), rows = B * K, C = num_candidates;
  TORCH_CHECK_VALUE(V <= std::numeric_limits<int32_t>::max(), "logits: expected V below 2^31, got ", V);
  const Tensor valid = valid_in ? valid_in->contiguous() : Tensor();
  const Tensor forbidden = !forbidden_in                  ? Tensor()
                           : forbidden_in->stride(1) == 1 ? *forbidden_in
                                                          : forbidden_in->contiguous();

  BeamRows p{};
  p.logits = logits.const_data_ptr();
  p.dtype = dtype_of(logits);
  p.row_stride = logits.stride(0);
  p.vocabulary = V;
  p.forbidden = forbidden.defined() ? forbidden.const_data_ptr<bool>() : nullptr;
  p.forbidden_stride = forbidden.defined() ? forbidden.stride(0) : 0;
  p.normalize = normalize;
  p.mask_first = mask_first;
  p.keep = std::min(C, V);
  const float* score = scores.const_data_ptr<float>();
  const bool* is_valid = valid.defined() ? valid.const_data_ptr<bool>() : nullptr;

  const auto ints = scores.options().dtype(at::kLong), bools = scores.options().dtype(at::kBool);
  const Tensor out_scores = at::empty({B, C}, scores.options()), out_beams = at::empty({B, C}, ints),
               out_tokens = at::empty({B, C}, ints), out_valid = at::empty({B, C}, bools),
               poisoned = at::empty({B}, bools);
  float* to_score = out_scores.mutable_data_ptr<float>();
  int64_t *to_beam = out_beams.mutable_data_ptr<int64_t>(), *to_token = out_tokens.mutable_data_ptr<int64_t>();
  bool *to_valid = out_valid.mutable_data_ptr<bool>(), *to_poisoned = poisoned.mutable_data_ptr<bool>();

  const auto& kernels = beam_kernels_here();
  std::vector<float> kept_logits(rows * p.keep);
  std::vector<int32_t> kept_tokens(rows * p.keep);
  std::vector<BeamRow> read(rows);
  std::vector<std::atomic<int64_t>> unread(B);
  for (auto& count : unread) count.store(K, std::memory_order_relaxed);
  // A small problem is over before a second thread has woken up.
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / V);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(kernels.scratch_floats(V));
    for (int64_t i = begin; i < end; ++i) {
      read[i] = {kept_logits.data() + i * p.keep, kept_tokens.data() + i * p.keep, 0, 0, 0, false};
      if (is_valid == nullptr || is_valid[i]) kernels.row(p, i, read[i], scratch.data());
      // Whoever reads an item's last row merges them.
      const int64_t b = i / K, at = b * C;
      if (unread[b].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      const Item item{read.data() + b * K, score + b * K, is_valid ? is_valid + b * K : nullptr, K, C, normalize};
      to_poisoned[b] = item.poisoned();
      if (to_poisoned[b])
        for (int64_t k = 0; k < K; ++k) read[b * K + k].count = 0;
      item.merge(to_score + at, to_beam + at, to_token + at, to_valid + at);
    }
  });
  return {out_scores, out_beams, out_tokens, out_valid, poisoned};
}

// The numbers of the reference's POISONED, DEAD and BOUND, COUNT, COUNT_OR_TOP.
constexpr int64_t kPoisoned = 1, kDead = 2, kBound = 0, kCountOrTop = 2;

// The best k hypotheses of one item, best first.
struct Hypotheses {
  float *scores, *log_probs;
  int64_t *times, *beams, *tokens;
  bool* valid;
  int64_t k;

  // Behind its equals; what is pushed out is lost.
  void place(float score, float log_prob, int64_t time, int64_t beam, int64_t token) const {
    int64_t at = k;
    while (at > 0 && scores[at - 1] < score) --at;
    if (at == k) return;
    const auto insert = [&](auto* column, auto value) {
      std::copy_backward(column + at, column + k - 1, column + k);
      column[at] = value;
    };
    insert(scores, score);
    insert(log_probs, log_prob);
    insert(times, time);
    insert(beams, beam);
    insert(tokens, token);
    insert(valid, true);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> advance(
    const Tensor& found_scores, const Tensor& found_beams, const Tensor& found_tokens, const Tensor& found_valid,
    const Tensor& poisoned, Tensor best_scores, Tensor best_log_probs, Tensor best_times, Tensor best_beams,
    Tensor best_tokens, Tensor best_valid, Tensor counts, Tensor faults, Tensor done, Tensor missed, Tensor top_ended,
    const Tensor& eos_in, const Tensor& penalties_in, int64_t step, int64_t max_length, int64_t stop,
    int64_t bound_length, int64_t target, int64_t num_return, bool cuts, bool first_come) {
  const int64_t N = best_scores.size(0), k = best_scores.size(1), C = found_scores.size(1);
  const Tensor tensors[] = {found_scores,   found_beams, found_tokens, found_valid, poisoned,   best_scores,
                            best_log_probs, best_times,  best_beams,   best_tokens, best_valid, counts,
                            faults,         done,        missed,       top_ended};
  for (const Tensor& x : tensors)
    TORCH_CHECK_VALUE(x.is_contiguous() && x.size(0) == N, "expected contiguous tensors of ", N, " items, got ",
                      x.sizes());
  TORCH_CHECK_VALUE(0 <= step && step < max_length && penalties_in.numel() == max_length + 1,
                    "step, penalties: expected step < max_length and max_length + 1 penalties, got ", step, " and ",
                    penalties_in.numel());
  TORCH_CHECK_VALUE(0 < bound_length && bound_length <= max_length, "bound_length: expected 1 to max_length, got ",
                    bound_length);
  const auto ints = best_times.options(), floats = best_scores.options();
  const Tensor out_scores = at::empty({N, k}, floats), out_parents = at::empty({N, k}, ints),
               out_tokens = at::empty({N, k}, ints), out_valid = at::empty({N, k}, best_valid.options());
  const Tensor eos = eos_in.contiguous(), penalties = penalties_in.contiguous();
  const int64_t *eos_first = eos.const_data_ptr<int64_t>(), *eos_last = eos_first + eos.numel();
  const float* penalty = penalties.const_data_ptr<float>();
  const bool last = step == max_length - 1;
  constexpr float kNone = -std::numeric_limits<float>::infinity();

  for (int64_t n = 0; n < N; ++n) {
    const float* score = found_scores.const_data_ptr<float>() + n * C;
    const int64_t *beam = found_beams.const_data_ptr<int64_t>() + n * C,
                  *token = found_tokens.const_data_ptr<int64_t>() + n * C;
    const bool* valid = found_valid.const_data_ptr<bool>() + n * C;
    const bool is_poisoned = poisoned.const_data_ptr<bool>()[n];
    const Hypotheses best{best_scores.mutable_data_ptr<float>() + n * k,
                          best_log_probs.mutable_data_ptr<float>() + n * k,
                          best_times.mutable_data_ptr<int64_t>() + n * k,
                          best_beams.mutable_data_ptr<int64_t>() + n * k,
                          best_tokens.mutable_data_ptr<int64_t>() + n * k,
                          best_valid.mutable_data_ptr<bool>() + n * k,
                          k};
    int64_t &count = counts.mutable_data_ptr<int64_t>()[n], &fault = faults.mutable_data_ptr<int64_t>()[n];
    bool &is_done = done.mutable_data_ptr<bool>()[n], &ended = top_ended.mutable_data_ptr<bool>()[n];
    float* next_score = out_scores.mutable_data_ptr<float>() + n * k;
    int64_t *next_parent = out_parents.mutable_data_ptr<int64_t>() + n * k,
            *next_token = out_tokens.mutable_data_ptr<int64_t>() + n * k;
    bool* next_valid = out_valid.mutable_data_ptr<bool>() + n * k;

    int64_t going = 0;
    float cut_off = kNone;
    bool any_valid = false;
    for (int64_t c = 0; c < C; ++c) {
      if (!valid[c]) continue;
      any_valid = true;
      if ((last && cuts) || std::find(eos_first, eos_last, token[c]) != eos_last) {
        if (c >= k || is_done) continue;
        if (c == 0) ended = true;
        const float total = score[c] / penalty[step + 1];
        if (first_come && count >= target) {
          cut_off = std::max(cut_off, total);
        } else {
          ++count;
          best.place(total, score[c], step, beam[c], token[c]);
        }
      } else if (going < k) {
        next_score[going] = score[c];
        next_parent[going] = beam[c];
        next_token[going] = token[c];
        ++going;
      }
    }
    std::fill(next_score + going, next_score + k, kNone);
    std::fill(next_parent + going, next_parent + k, 0);
    std::fill(next_token + going, next_token + k, 0);

    if (!is_done) {
      if (is_poisoned)
        fault = kPoisoned;
      else if (!any_valid && fault == 0)
        fault = kDead;
      bool stops = is_poisoned || going == 0 || last;
      if (stop == kBound)
        stops |= count >= k && next_score[0] / penalty[bound_length] <= best.scores[k - 1];
      else
        stops |= count >= target || (stop == kCountOrTop && ended && count >= num_return);
      if (stops) {
        if (!last) {
          cut_off = std::max(cut_off, next_score[0] / penalty[step + 2]);
          cut_off = std::max(cut_off, next_score[0] / penalty[max_length]);
        }
        missed.mutable_data_ptr<float>()[n] = cut_off;
        is_done = true;
      }
    }
    for (int64_t i = 0; i < k; ++i) next_valid[i] = i < going && !is_done;
  }
  return {out_scores, out_parents, out_tokens, out_valid};
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("beam_search_step_cpu", &step);
  library.impl("beam_search_advance_cpu", &advance);
}

}  // namespace
}  // namespace mmkernels
