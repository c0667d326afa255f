// Beam search on CUDA tensors: scratch and stream; step.h has the rest of the torch side, cuda.cu the kernels. No
// header of CUDA's is needed here.
//
// A call waits for nothing, and what it allocates comes from torch: it can be captured in a CUDA graph.
#include "cuda.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "step.h"

namespace mmkernels {
namespace {

// The current stream of the tensor's device.
void* stream_of(const at::Tensor& x) {
  return c10::impl::VirtualGuardImpl(at::kCUDA).getStream(x.device()).native_handle();
}

void run_step(const BeamStep& s, const at::Tensor& logits) {
  BeamDevice device{};
  const char* error = beam_device(device);
  if (error == nullptr) {
    const BeamPlan plan = plan_beam_step(s, device);
    const at::Tensor scratch = at::empty({static_cast<int64_t>(plan.scratch)}, logits.options().dtype(at::kByte));
    error = run_beam_step(s, plan, scratch.mutable_data_ptr(), stream_of(logits));
  }
  TORCH_CHECK(error == nullptr, "mmkernels.beam_search: impl='cuda': ", error);
}

void run_advance(const BeamAdvance& a, const at::Tensor& scores) {
  const char* error = run_beam_advance(a, stream_of(scores));
  TORCH_CHECK(error == nullptr, "mmkernels.beam_search: impl='cuda': ", error);
}

TORCH_LIBRARY_IMPL(mmkernels, CUDA, library) {
  library.impl("beam_search_step_cuda", &step<run_step>);
  library.impl("beam_search_advance_cuda", &advance<run_advance>);
}

}  // namespace
}  // namespace mmkernels
