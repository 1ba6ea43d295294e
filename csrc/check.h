// Checks of what the caller handed in; messages print what was expected and what was found.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace alterrec {

inline void check_matrix(const char* name, const at::Tensor& t, int64_t width) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) == width, name, " must be (rows, ", width, "), got ", t.sizes());
  TORCH_CHECK_VALUE(t.size(1) <= 1 || t.stride(1) == 1, name, " must have unit last stride, got strides ", t.strides());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, name,
                   " must be float32 or bfloat16, got ", t.scalar_type());
}

inline void check_vector(const char* name, const at::Tensor& t, int64_t length) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == length, name, " must be (", length, "), got ", t.sizes());
}

}  // namespace alterrec
