// Beam search on CUDA tensors, the step and what follows it: allocation and stream; the kernels are in cuda.cu. No
// header of CUDA's is needed here.
//
// A call waits for nothing, and what it allocates comes from torch: it can be captured in a CUDA graph.
#include "cuda.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "step.h"

namespace mmkernels {
namespace {

// The current stream of the tensor's device.
void* stream_of(const at::Tensor& x) {
  return c10::impl::VirtualGuardImpl(at::kCUDA).getStream(x.device()).native_handle();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> step(
    const at::Tensor& logits, const at::Tensor& scores, const std::optional<at::Tensor>& valid,
    const std::optional<at::Tensor>& forbidden, int64_t num_candidates, bool normalize, bool mask_first) {
  const c10::DeviceGuard guard(logits.device());
  const StepInputs in(logits, scores, valid, forbidden);
  const StepOutputs out(in.scores, in.items, num_candidates);
  if (in.scores.numel() == 0) return out.tuple();

  BeamStep s{};
  s.logits = in.logits.const_data_ptr();
  s.dtype = dtype_of(in.logits);
  s.row_stride = in.logits.stride(0);
  s.forbidden = in.forbidden.defined() ? in.forbidden.const_data_ptr<bool>() : nullptr;
  s.forbidden_stride = in.forbidden.defined() ? in.forbidden.stride(0) : 0;
  s.scores = in.scores.const_data_ptr<float>();
  s.valid = in.valid.defined() ? in.valid.const_data_ptr<bool>() : nullptr;
  s.items = in.items;
  s.beams = in.beams;
  s.vocabulary = in.vocabulary;
  s.candidates = num_candidates;
  s.normalize = normalize;
  s.mask_first = mask_first;
  s.out_scores = out.scores.mutable_data_ptr<float>();
  s.out_beams = out.beams.mutable_data_ptr<int64_t>();
  s.out_tokens = out.tokens.mutable_data_ptr<int64_t>();
  s.out_valid = out.valid.mutable_data_ptr<bool>();
  s.out_poisoned = out.poisoned.mutable_data_ptr<bool>();

  BeamDevice device{};
  const char* error = beam_device(device);
  if (error == nullptr) {
    const BeamPlan plan = plan_beam_step(s, device);
    const at::Tensor scratch = at::empty({static_cast<int64_t>(plan.scratch)}, in.scores.options().dtype(at::kByte));
    error = run_beam_step(s, plan, scratch.mutable_data_ptr(), stream_of(logits));
  }
  TORCH_CHECK(error == nullptr, "mmkernels.beam_search: impl='cuda': ", error);
  return out.tuple();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> advance(
    const at::Tensor& found_scores, const at::Tensor& found_beams, const at::Tensor& found_tokens,
    const at::Tensor& found_valid, const at::Tensor& poisoned, at::Tensor best_scores, at::Tensor best_log_probs,
    at::Tensor best_times, at::Tensor best_beams, at::Tensor best_tokens, at::Tensor best_valid, at::Tensor counts,
    at::Tensor faults, at::Tensor done, at::Tensor missed, at::Tensor top_ended, const at::Tensor& eos_in,
    const at::Tensor& penalties_in, int64_t step, int64_t max_length, int64_t stop, int64_t bound_length,
    int64_t target, int64_t num_return, bool cuts, bool first_come) {
  const c10::DeviceGuard guard(found_scores.device());
  const int64_t N = best_scores.size(0), k = best_scores.size(1);
  for (const at::Tensor& x :
       {found_scores, found_beams, found_tokens, found_valid, poisoned, best_scores, best_log_probs, best_times,
        best_beams, best_tokens, best_valid, counts, faults, done, missed, top_ended})
    TORCH_CHECK_VALUE(x.is_contiguous() && x.size(0) == N, "expected contiguous tensors of ", N, " items, got ",
                      x.sizes());
  TORCH_CHECK_VALUE(0 <= step && step < max_length && penalties_in.numel() == max_length + 1,
                    "step, penalties: expected step < max_length and max_length + 1 penalties, got ", step, " and ",
                    penalties_in.numel());
  TORCH_CHECK_VALUE(0 < bound_length && bound_length <= max_length, "bound_length: expected 1 to max_length, got ",
                    bound_length);
  const at::Tensor next_scores = at::empty({N, k}, best_scores.options()),
                   next_parents = at::empty({N, k}, best_times.options()),
                   next_tokens = at::empty({N, k}, best_times.options()),
                   next_valid = at::empty({N, k}, best_valid.options());
  if (N == 0) return {next_scores, next_parents, next_tokens, next_valid};
  const at::Tensor eos = eos_in.contiguous(), penalties = penalties_in.contiguous();
  BeamAdvance a{};
  a.items = N;
  a.beams = k;
  a.candidates = found_scores.size(1);
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
  const char* error = run_beam_advance(a, stream_of(found_scores));
  TORCH_CHECK(error == nullptr, "mmkernels.beam_search: impl='cuda': ", error);
  return {next_scores, next_parents, next_tokens, next_valid};
}

TORCH_LIBRARY_IMPL(mmkernels, CUDA, library) {
  library.impl("beam_search_step_cuda", &step);
  library.impl("beam_search_advance_cuda", &advance);
}

}  // namespace
}  // namespace mmkernels
