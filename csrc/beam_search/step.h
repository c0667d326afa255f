// What a backend's step of beam search takes and gives, on the torch side: checked, with contiguous entries, allocated.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../common/tensors.h"

namespace mmkernels {

struct StepInputs {
  at::Tensor logits, scores, valid, forbidden;  // the last two undefined where there is none
  int64_t items, beams, vocabulary;

  StepInputs(const at::Tensor& logits_in, const at::Tensor& scores_in, const std::optional<at::Tensor>& valid_in,
             const std::optional<at::Tensor>& forbidden_in) {
    TORCH_CHECK_VALUE(logits_in.dim() == 2 && scores_in.dim() == 2 && logits_in.size(0) == scores_in.numel(),
                      "logits, scores: expected [B K, V] and [B, K], got ", logits_in.sizes(), " and ",
                      scores_in.sizes());
    TORCH_CHECK_TYPE(logits_in.scalar_type() == at::kFloat || logits_in.scalar_type() == at::kBFloat16 ||
                         logits_in.scalar_type() == at::kHalf,
                     "logits: expected float32, bfloat16 or float16, got ", logits_in.scalar_type());
    TORCH_CHECK_TYPE(scores_in.scalar_type() == at::kFloat, "scores: expected float32, got ", scores_in.scalar_type());
    TORCH_CHECK_VALUE(logits_in.size(1) <= std::numeric_limits<int32_t>::max(), "logits: expected V below 2^31, got ",
                      logits_in.size(1));
    const auto with_rows = [](const at::Tensor& x) { return x.stride(1) == 1 ? x : x.contiguous(); };
    logits = with_rows(logits_in);
    scores = scores_in.contiguous();
    if (valid_in) valid = valid_in->contiguous();
    if (forbidden_in) forbidden = with_rows(*forbidden_in);
    items = scores.size(0);
    beams = scores.size(1);
    vocabulary = logits.size(1);
  }
};

struct StepOutputs {
  at::Tensor scores, beams, tokens, valid, poisoned;

  StepOutputs(const at::Tensor& like, int64_t items, int64_t candidates)
      : scores(at::empty({items, candidates}, like.options())),
        beams(at::empty({items, candidates}, like.options().dtype(at::kLong))),
        tokens(at::empty({items, candidates}, like.options().dtype(at::kLong))),
        valid(at::empty({items, candidates}, like.options().dtype(at::kBool))),
        poisoned(at::empty({items}, like.options().dtype(at::kBool))) {}

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> tuple() const {
    return {scores, beams, tokens, valid, poisoned};
  }
};

}  // namespace mmkernels
