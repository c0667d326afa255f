// The kernels of divided attention. Compiled once for each instruction set (MMK_VARIANT).
//
// Two schedules: sequences of at most as many rows as a vector has lanes (short_sequences.h), and longer ones
// (long_sequences.h). What the sequences give to a class token that all of them share is added up afterwards
// (class_token.h).
//
// The backward pass computes the probabilities anew from the log-sum-exps. They are normalised again: a float32 holds a
// log-sum-exp of 100 to 4e-6, and that error would be in every probability. The sum of p dp comes from the
// probabilities too, so that `out` is read only for a class token whose row no single sequence holds.
#include "cpu_kernels.h"

#include "class_token.h"
#include "long_sequences.h"
#include "short_sequences.h"

namespace mmkernels {
inline namespace MMK_VARIANT {
namespace divided_attention {

// Calls with the product of the long schedule: float32 everywhere; bfloat16 as pairs where the machine multiplies them,
// else as float32.
template <class Call>
void with_product([[maybe_unused]] Dtype dtype, const Call& call) {
#ifdef MMK_HAS_BF16_PRODUCT
  if (dtype == Dtype::kBFloat16) return call(BFloat16Product{});
#endif
  call(Float32Product{});
}

bool is_short(const Clips& clips) {
  return slots_of(clips.most_rows()) > 0;
}

AttentionPlan plan(const AttentionForward& p, bool backward) {
  const Clips& clips = p.clips;
  const int64_t sequences = clips.batch * clips.sequences;
  if (is_short(clips)) return {sequences, ShortBuffers(clips, backward, nullptr).floats};
  AttentionPlan plan{sequences * clips.heads, 0};
  with_product(p.dtype, [&](auto product) {
    plan.scratch_floats = LongBuffers<decltype(product)>(clips, backward, nullptr).floats;
  });
  return plan;
}

void forward(const AttentionForward& p, int64_t begin, int64_t end, float* scratch) {
  if (is_short(p.clips)) return short_forward(p, begin, end, scratch);
  with_product(p.dtype, [&](auto product) { long_forward<decltype(product)>(p, begin, end, scratch); });
}

void backward(const AttentionBackward& p, int64_t begin, int64_t end, float* scratch) {
  if (is_short(p.forward.clips)) return short_backward(p, begin, end, scratch);
  with_product(p.forward.dtype, [&](auto product) { long_backward<decltype(product)>(p, begin, end, scratch); });
}

}  // namespace divided_attention

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels{divided_attention::plan,        divided_attention::forward,
                                         divided_attention::forward_cls, divided_attention::backward,
                                         divided_attention::prepare_cls, divided_attention::backward_cls};

}  // namespace MMK_VARIANT
}  // namespace mmkernels
