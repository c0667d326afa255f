// What the ops' torch side shares.
#pragma once

#include <ATen/core/Tensor.h>

#include "tiles_types.h"

namespace mmkernels {

// Of a tensor of one of the three dtypes that the kernels take.
inline Dtype dtype_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat      ? Dtype::kFloat32
         : x.scalar_type() == at::kBFloat16 ? Dtype::kBFloat16
                                            : Dtype::kFloat16;
}

}  // namespace mmkernels
