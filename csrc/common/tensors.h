// What the ops' torch side shares.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "tiles_types.h"

namespace mmkernels {

// Of a tensor of one of the three dtypes that the kernels take.
inline Dtype dtype_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat      ? Dtype::kFloat32
         : x.scalar_type() == at::kBFloat16 ? Dtype::kBFloat16
                                            : Dtype::kFloat16;
}

// Memory for a result. A large one comes in huge pages where the system gives them: to fetch it 4 KiB at a time takes
// as long as to compute it.
inline at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor result = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + result.nbytes()) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: it may fail
#endif
  return result;
}

inline at::Tensor with_contiguous_rows(const at::Tensor& x) {
  return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
}

inline Features features_of(const at::Tensor& x) {
  return {x.const_data_ptr(), dtype_of(x), x.size(0), x.stride(0)};
}

}  // namespace mmkernels
