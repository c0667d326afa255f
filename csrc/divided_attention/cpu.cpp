// Divided attention on CPU tensors: allocation and threads; the arithmetic is in cpu_kernels.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/dispatch.h"
#include "../common/tensors.h"
#include "cpu_kernels.h"

namespace mmkernels {

MMK_VARIANTS(AttentionKernels, attention_kernels)

namespace divided_attention {

using at::Tensor;
using std::optional;

// 2^14 elements of the output take some 15 us (1.2 million take 1.1 ms along time): such a call is over before a second
// thread has woken up.
constexpr int64_t kElementsOfAThread = 1 << 14;

// Features of a token side by side; any strides of clips and tokens.
Tensor with_contiguous_features(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous();
}

void check_inputs(const Tensor& qkv, const optional<Tensor>& seed, int64_t num_heads) {
  TORCH_CHECK_VALUE(qkv.dim() == 3 && num_heads > 0 && qkv.size(2) % (3 * num_heads) == 0 && qkv.size(2) > 0,
                    "qkv: expected [B, L, 3 * num_heads * D], got ", qkv.sizes());
  TORCH_CHECK_TYPE(
      qkv.scalar_type() == at::kFloat || qkv.scalar_type() == at::kBFloat16 || qkv.scalar_type() == at::kHalf,
      "qkv: expected float32, bfloat16 or float16, got ", qkv.scalar_type());
  TORCH_CHECK_VALUE(!seed || (seed->scalar_type() == at::kLong && seed->numel() == 1), "seed: expected one int64");
}

// `layout`: the numbers of a Layout, in the order of mmkernels/divided_attention/layout.py.
Clips clips_of(const Tensor& qkv, const optional<Tensor>& frame_mask, at::IntArrayRef layout, int64_t num_heads) {
  TORCH_CHECK_VALUE(layout.size() == 8, "layout: expected 8 numbers, got ", layout.size());
  Clips clips{};
  clips.batch = qkv.size(0);
  clips.tokens = qkv.size(1);
  clips.heads = num_heads;
  clips.head_size = qkv.size(2) / (3 * num_heads);
  clips.sequences = layout[0];
  clips.length = layout[1];
  clips.sequence_step = layout[2];
  clips.patch_step = layout[3];
  clips.has_cls = layout[4];
  clips.cls = static_cast<ClassToken>(layout[5]);
  clips.frames = layout[6];
  clips.frame_step = layout[7];
  const bool has_patches = clips.sequences > 0 && clips.length > 0 && clips.frames > 0 && clips.frame_step > 0;
  const bool knows_cls = layout[5] >= 0 && layout[5] <= 2 * clips.has_cls && clips.has_cls <= 1;
  TORCH_CHECK_VALUE(has_patches && knows_cls && clips.sequence_step >= 0 && clips.patch_step >= 0 &&
                        clips.has_cls + clips.sequences * clips.length == clips.tokens &&
                        clips.token(clips.sequences - 1, clips.length - 1) == clips.tokens - 1,
                    "layout: ", layout, " are not the numbers of ", clips.tokens, " tokens");
  TORCH_CHECK_VALUE(!frame_mask || (frame_mask->scalar_type() == at::kBool && frame_mask->dim() == 2 &&
                                    frame_mask->size(0) == clips.batch && frame_mask->size(1) == clips.frames),
                    "frame_mask: expected bool [B, T]");
  clips.frame_mask = frame_mask ? frame_mask->const_data_ptr<bool>() : nullptr;
  return clips;
}

Dropout dropout_of(const optional<Tensor>& seed, double p) {
  Dropout d{};
  if (!seed || p <= 0) return d;
  const uint64_t bits = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  d.threshold = static_cast<uint64_t>(p * 4294967296.);
  d.key[0] = static_cast<uint32_t>(bits);
  d.key[1] = static_cast<uint32_t>(bits >> 32);
  d.growth = static_cast<float>(1 / (1 - p));
  return d;
}

AttentionForward problem_of(const Tensor& qkv, const Clips& clips, const optional<Tensor>& seed, double scale,
                            double dropout_p) {
  AttentionForward p{};
  p.clips = clips;
  p.qkv = qkv.const_data_ptr();
  p.dtype = dtype_of(qkv);
  p.batch_stride = qkv.stride(0);
  p.token_stride = qkv.stride(1);
  p.scale = static_cast<float>(scale);
  p.dropout = dropout_of(seed, dropout_p);
  return p;
}

// Both passes over the tasks: the sequences in equal shares, then the class token of each clip and head.
template <class Pass, class ClsPass, class Problem>
void run(Pass pass, ClsPass cls_pass, const Problem& problem, const Clips& clips, const AttentionPlan& plan,
         const at::TensorOptions& floats) {
  const int64_t elements = clips.batch * clips.tokens * clips.heads * clips.head_size;
  const int64_t threads = std::clamp<int64_t>(
      elements / kElementsOfAThread, 1, std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(plan.tasks, 1)));
  const Tensor scratch = at::empty({threads * plan.scratch_floats}, floats);
  float* parts = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pass(problem, plan.tasks * i / threads, plan.tasks * (i + 1) / threads, parts + i * plan.scratch_floats);
  });
  if (!clips.has_cls) return;
  at::parallel_for(0, clips.batch * clips.heads, threads > 1 ? 1 : clips.batch * clips.heads,
                   [&](int64_t begin, int64_t end) { cls_pass(problem, begin, end); });
}

std::tuple<Tensor, Tensor> forward(const Tensor& qkv_in, const optional<Tensor>& frame_mask_in,
                                   const optional<Tensor>& seed, at::IntArrayRef layout, int64_t num_heads,
                                   double scale, double dropout_p) {
  check_inputs(qkv_in, seed, num_heads);
  const Tensor qkv = with_contiguous_features(qkv_in);
  const optional<Tensor> frame_mask = frame_mask_in ? optional(frame_mask_in->contiguous()) : std::nullopt;
  const Clips clips = clips_of(qkv, frame_mask, layout, num_heads);
  const auto floats = qkv.options().dtype(at::kFloat);
  const int64_t B = clips.batch, H = clips.heads, D = clips.head_size;

  const Tensor out = empty_result({B, clips.tokens, H * D}, qkv.options());
  const Tensor lse = at::empty({B, H, clips.rows()}, floats);
  if (B == 0) return {out, lse};
  const Tensor cls = at::empty({clips.cls_takes_part() ? B * H * clips.sequences * (D + 2) : 0}, floats);
  AttentionForward p = problem_of(qkv, clips, seed, scale, dropout_p);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  p.cls_out = cls.mutable_data_ptr<float>();
  p.cls_largest = p.cls_out + B * H * clips.sequences * D;
  p.cls_sums = p.cls_largest + B * H * clips.sequences;
  const AttentionKernels& kernels = attention_kernels_here();
  run(kernels.forward, kernels.forward_cls, p, clips, kernels.plan(p, false), floats);
  return {out, lse};
}

Tensor backward(const Tensor& grad_out_in, const Tensor& qkv_in, const Tensor& out_in, const Tensor& lse_in,
                const optional<Tensor>& frame_mask_in, const optional<Tensor>& seed, at::IntArrayRef layout,
                int64_t num_heads, double scale, double dropout_p) {
  check_inputs(qkv_in, seed, num_heads);
  const Tensor qkv = with_contiguous_features(qkv_in), grad_out = with_contiguous_features(grad_out_in);
  const Tensor out = out_in.contiguous(), lse = lse_in.contiguous();
  const optional<Tensor> frame_mask = frame_mask_in ? optional(frame_mask_in->contiguous()) : std::nullopt;
  const Clips clips = clips_of(qkv, frame_mask, layout, num_heads);
  const int64_t B = clips.batch, H = clips.heads, D = clips.head_size;
  TORCH_CHECK_VALUE(grad_out.sizes() == out.sizes() && out.dim() == 3 && out.size(0) == B &&
                        out.size(1) == clips.tokens && out.size(2) == H * D && lse.numel() == B * H * clips.rows(),
                    "grad_out, out: expected [B, L, C], got ", grad_out.sizes(), " and ", out.sizes());
  TORCH_CHECK_TYPE(grad_out.scalar_type() == qkv.scalar_type() && out.scalar_type() == qkv.scalar_type(),
                   "grad_out, out: expected the dtype of qkv");
  const auto floats = qkv.options().dtype(at::kFloat);

  const Tensor grad_qkv = empty_result(qkv.sizes(), qkv.options().memory_format(at::MemoryFormat::Contiguous));
  if (B == 0) return grad_qkv;
  const Tensor cls = at::empty({clips.cls_takes_part() ? B * H * clips.sequences * 3 * D : 0}, floats);
  AttentionBackward p{};
  p.forward = problem_of(qkv, clips, seed, scale, dropout_p);
  p.forward.out = const_cast<void*>(out.const_data_ptr());
  p.forward.lse = const_cast<float*>(lse.const_data_ptr<float>());
  p.grad_out = grad_out.const_data_ptr();
  p.grad_batch_stride = grad_out.stride(0);
  p.grad_token_stride = grad_out.stride(1);
  p.grad_qkv = grad_qkv.mutable_data_ptr();
  p.cls_grads = cls.mutable_data_ptr<float>();
  const Tensor shares = at::empty({B * H}, floats);
  p.cls_shares = shares.mutable_data_ptr<float>();
  const AttentionKernels& kernels = attention_kernels_here();
  if (clips.cls_is_global() && clips.sequences > 1)
    at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) { kernels.prepare_cls(p, begin, end); });
  run(kernels.backward, kernels.backward_cls, p, clips, kernels.plan(p.forward, true), floats);
  return grad_qkv;
}

TORCH_LIBRARY_IMPL(mmkernels, CPU, library) {
  library.impl("divided_attention_cpu_forward", &forward);
  library.impl("divided_attention_cpu_backward", &backward);
}

}  // namespace divided_attention
}  // namespace mmkernels
