// The torch side of beam search, for every backend: checks, allocation, and the plain data that the backend runs on.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../common/tensors.h"
#include "step_types.h"

namespace mmkernels {

// The op beam_search_step: kRun fills in the results on the device of `logits`.
template <void (*kRun)(const BeamStep&, const at::Tensor& logits)>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> step(
    const at::Tensor& logits_in, const at::Tensor& scores_in, const std::optional<at::Tensor>& valid_in,
    const std::optional<at::Tensor>& forbidden_in, int64_t num_candidates, bool normalize, bool mask_first) {
  TORCH_CHECK_VALUE(logits_in.dim() == 2 && scores_in.dim() == 2 && logits_in.size(0) == scores_in.numel(),
                    "logits, scores: expected [B K, V] and [B, K], got ", logits_in.sizes(), " and ",
                    scores_in.sizes());
  TORCH_CHECK_TYPE(logits_in.scalar_type() == at::kFloat || logits_in.scalar_type() == at::kBFloat16 ||
                       logits_in.scalar_type() == at::kHalf,
                   "logits: expected float32, bfloat16 or float16, got ", logits_in.scalar_type());
  TORCH_CHECK_TYPE(scores_in.scalar_type() == at::kFloat, "scores: expected float32, got ", scores_in.scalar_type());
  TORCH_CHECK_VALUE(logits_in.size(1) <= std::numeric_limits<int32_t>::max(), "logits: expected V below 2^31, got ",
                    logits_in.size(1));
  TORCH_CHECK_VALUE(!valid_in || valid_in->sizes() == scores_in.sizes(), "valid: expected the shape of scores, ",
                    scores_in.sizes(), ", got ", valid_in->sizes());
  TORCH_CHECK_VALUE(!forbidden_in || forbidden_in->sizes() == logits_in.sizes(),
                    "forbidden: expected the shape of logits, ", logits_in.sizes(), ", got ", forbidden_in->sizes());
  TORCH_CHECK_VALUE(num_candidates >= 0, "num_candidates: expected at least 0, got ", num_candidates);
  for (const at::Tensor& x : {scores_in, valid_in.value_or(logits_in), forbidden_in.value_or(logits_in)})
    TORCH_CHECK_VALUE(x.device() == logits_in.device(), "expected tensors on ", logits_in.device(),
                      " as of logits, got ", x.device());
  const c10::DeviceGuard guard(logits_in.device());
  const at::Tensor logits = with_contiguous_rows(logits_in), scores = scores_in.contiguous();
  const at::Tensor valid = valid_in ? valid_in->contiguous() : at::Tensor();
  const at::Tensor forbidden = forbidden_in ? with_contiguous_rows(*forbidden_in) : at::Tensor();
  const int64_t items = scores.size(0);
  const auto floats = scores.options(), ints = floats.dtype(at::kLong), bools = floats.dtype(at::kBool);
  const at::Tensor out_scores = at::empty({items, num_candidates}, floats),
                   out_beams = at::empty({items, num_candidates}, ints),
                   out_tokens = at::empty({items, num_candidates}, ints),
                   out_valid = at::empty({items, num_candidates}, bools), out_poisoned = at::empty({items}, bools);

  BeamStep s{};
  s.logits = logits.const_data_ptr();
  s.dtype = dtype_of(logits);
  s.row_stride = logits.stride(0);
  s.forbidden = forbidden.defined() ? forbidden.const_data_ptr<bool>() : nullptr;
  s.forbidden_stride = forbidden.defined() ? forbidden.stride(0) : 0;
  s.scores = scores.const_data_ptr<float>();
  s.valid = valid.defined() ? valid.const_data_ptr<bool>() : nullptr;
  s.items = items;
  s.beams = scores.size(1);
  s.vocabulary = logits.size(1);
  s.candidates = num_candidates;
  s.normalize = normalize;
  s.mask_first = mask_first;
  s.out_scores = out_scores.mutable_data_ptr<float>();
  s.out_beams = out_beams.mutable_data_ptr<int64_t>();
  s.out_tokens = out_tokens.mutable_data_ptr<int64_t>();
  s.out_valid = out_valid.mutable_data_ptr<bool>();
  s.out_poisoned = out_poisoned.mutable_data_ptr<bool>();
  if (scores.numel() > 0) kRun(s, logits);
  return {out_scores, out_beams, out_tokens, out_valid, out_poisoned};
}

// The op beam_search_advance: kRun advances the items on the device of `scores`.
template <void (*kRun)(const BeamAdvance&, const at::Tensor& scores)>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> advance(
    const at::Tensor& found_scores, const at::Tensor& found_beams, const at::Tensor& found_tokens,
    const at::Tensor& found_valid, const at::Tensor& poisoned, at::Tensor best_scores, at::Tensor best_log_probs,
    at::Tensor best_times, at::Tensor best_beams, at::Tensor best_tokens, at::Tensor best_valid, at::Tensor counts,
    at::Tensor faults, at::Tensor done, at::Tensor missed, at::Tensor top_ended, const at::Tensor& eos,
    const at::Tensor& penalties, int64_t step, int64_t max_length, int64_t stop, int64_t bound_length, int64_t target,
    int64_t num_return, bool cuts, bool first_come) {
  TORCH_CHECK_VALUE(found_scores.dim() == 2 && best_scores.dim() == 2,
                    "expected candidates [N, C] and hypotheses [N, k], got ", found_scores.sizes(), " and ",
                    best_scores.sizes());
  const int64_t items = best_scores.size(0), beams = best_scores.size(1), candidates = found_scores.size(1);
  const auto check = [&](at::IntArrayRef expected, std::initializer_list<at::Tensor> tensors) {
    for (const at::Tensor& x : tensors)
      TORCH_CHECK_VALUE(x.is_contiguous() && x.sizes() == expected && x.device() == found_scores.device(),
                        "expected a contiguous tensor ", expected, " on ", found_scores.device(), ", got ", x.sizes(),
                        " on ", x.device());
  };
  check({items, candidates}, {found_scores, found_beams, found_tokens, found_valid});
  check({items, beams}, {best_scores, best_log_probs, best_times, best_beams, best_tokens, best_valid});
  check({items}, {poisoned, counts, faults, done, missed, top_ended});
  check({eos.numel()}, {eos});
  check({max_length + 1}, {penalties});
  TORCH_CHECK_VALUE(0 <= step && step < max_length, "step: expected 0 to max_length - 1, got ", step);
  TORCH_CHECK_VALUE(0 < bound_length && bound_length <= max_length, "bound_length: expected 1 to max_length, got ",
                    bound_length);
  const c10::DeviceGuard guard(found_scores.device());
  const at::Tensor next_scores = at::empty({items, beams}, best_scores.options()),
                   next_parents = at::empty({items, beams}, best_times.options()),
                   next_tokens = at::empty({items, beams}, best_times.options()),
                   next_valid = at::empty({items, beams}, best_valid.options());

  BeamAdvance a{};
  a.items = items;
  a.beams = beams;
  a.candidates = candidates;
  a.scores = found_scores.const_data_ptr<float>();
  a.found_beams = found_beams.const_data_ptr<int64_t>();
  a.tokens = found_tokens.const_data_ptr<int64_t>();
  a.valid = found_valid.const_data_ptr<bool>();
  a.poisoned = poisoned.const_data_ptr<bool>();
  a.best_scores = best_scores.mutable_data_ptr<float>();
  a.best_log_probs = best_log_probs.mutable_data_ptr<float>();
  a.best_times = best_times.mutable_data_ptr<int64_t>();
  a.best_beams = best_beams.mutable_data_ptr<int64_t>();
  a.best_tokens = best_tokens.mutable_data_ptr<int64_t>();
  a.best_valid = best_valid.mutable_data_ptr<bool>();
  a.counts = counts.mutable_data_ptr<int64_t>();
  a.faults = faults.mutable_data_ptr<int64_t>();
  a.done = done.mutable_data_ptr<bool>();
  a.missed = missed.mutable_data_ptr<float>();
  a.top_ended = top_ended.mutable_data_ptr<bool>();
  a.eos = eos.const_data_ptr<int64_t>();
  a.num_eos = eos.numel();
  a.penalties = penalties.const_data_ptr<float>();
  a.step = step;
  a.max_length = max_length;
  a.stop = stop;
  a.bound_length = bound_length;
  a.target = target;
  a.num_return = num_return;
  a.cuts = cuts;
  a.first_come = first_come;
  a.next_scores = next_scores.mutable_data_ptr<float>();
  a.next_parents = next_parents.mutable_data_ptr<int64_t>();
  a.next_tokens = next_tokens.mutable_data_ptr<int64_t>();
  a.next_valid = next_valid.mutable_data_ptr<bool>();
  if (items > 0) kRun(a, found_scores);
  return {next_scores, next_parents, next_tokens, next_valid};
}

}  // namespace mmkernels
