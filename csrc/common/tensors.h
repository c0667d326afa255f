// What the torch side of all ops shares.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "tiles_types.h"

namespace mmkernels {

// The tensor has one of the three dtypes that the kernels take.
inline Dtype dtype_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat      ? Dtype::kFloat32
         : x.scalar_type() == at::kBFloat16 ? Dtype::kBFloat16
                                            : Dtype::kFloat16;
}

// Allocates a result. A large one asks for huge pages: to fetch it from the system in pages of 4 KiB takes as long as
// to compute it.
inline at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor result = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + result.nbytes()) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice, which may fail
#endif
  return result;
}

inline at::Tensor with_contiguous_rows(const at::Tensor& x) {
  return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
}

// Checks rows of features of one size and dtype. The public functions have checked them, but not those who call the op
// itself.
inline void check_pairs(const at::Tensor& queries, const at::Tensor& keys, const char* names = "queries, keys") {
  TORCH_CHECK_VALUE(queries.dim() == 2 && keys.dim() == 2 && queries.size(1) == keys.size(1), names,
                    ": expected [N, D] and [M, D], got ", queries.sizes(), " and ", keys.sizes());
  TORCH_CHECK_TYPE(queries.scalar_type() == keys.scalar_type() &&
                       (queries.scalar_type() == at::kFloat || queries.scalar_type() == at::kBFloat16 ||
                        queries.scalar_type() == at::kHalf),
                   names, ": expected one dtype of float32, bfloat16, float16, got ", queries.scalar_type(), " and ",
                   keys.scalar_type());
}

inline void check_scalar(const char* name, const at::Tensor& number) {
  TORCH_CHECK_TYPE(number.scalar_type() == at::kFloat && number.numel() == 1, name, ": expected one float32");
}

inline Features features_of(const at::Tensor& x) {
  return {x.const_data_ptr(), dtype_of(x), x.size(0), x.stride(0)};
}

}  // namespace mmkernels
