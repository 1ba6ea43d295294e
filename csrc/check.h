// Checks of what the caller handed in; messages print what was expected and what was found.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>
#include <optional>

#include "cpu/tile.h"

namespace alterrec {

// (rows, width) float32, bfloat16 or float16 as the kernels read it: unit last stride, rows that do not overlap. A
// tensor that is not laid out like that is copied.
inline at::Tensor matrix_of(const char* name, const at::Tensor& t, int64_t width) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) == width, name, " must be (rows, ", width, "), got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf,
                   name, " must be float32, bfloat16 or float16, got ", t.scalar_type());
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();  // what a BLAS takes
  const bool unit = t.size(1) <= 1 || t.stride(1) == 1;
  const bool apart = t.size(0) <= 1 || (t.stride(0) >= t.size(1) && t.stride(0) <= kLargest);
  return unit && apart ? t.detach() : t.detach().contiguous();
}

// Of the dtypes that matrix_of() lets through.
inline Format format_of(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat ? Format::kF32 : t.scalar_type() == at::kHalf ? Format::kF16 : Format::kBF16;
}

constexpr c10::string_view kPrecisions[] = {"fp32", "bf16", "fp16"};  // the names, by Format

// What values are rounded to before they are multiplied: "fp32" for nothing, or "bf16" or "fp16", where each matrix is
// in float32 or already in that format.
inline Format precision_of(c10::string_view name, const at::Tensor& query, const at::Tensor& catalog) {
  TORCH_CHECK_VALUE(name == "fp32" || name == "bf16" || name == "fp16", "precision must be fp32, bf16 or fp16, got ",
                    name);
  if (name == "fp32") return Format::kF32;
  const Format precision = name == "bf16" ? Format::kBF16 : Format::kF16;
  for (const at::Tensor* t : {&query, &catalog}) {
    TORCH_CHECK_TYPE(format_of(*t) == Format::kF32 || format_of(*t) == precision, "precision ", name, " does not take ",
                     t->scalar_type());
  }
  return precision;
}

// A tensor of matrix_of(); the kernels need not know of odd strides over a single row.
inline Matrix matrix(const at::Tensor& t) {
  return {t.const_data_ptr(), format_of(t), t.size(0), t.size(1), t.size(0) > 1 ? t.stride(0) : t.size(1)};
}

inline void check_sizes(const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be ", sizes, ", got ", t.sizes());
}

// (length,) of any kind of float, as dense float32.
inline at::Tensor floats_of(const char* name, const at::Tensor& t, int64_t length) {
  check_sizes(name, t, length);
  TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), name, " must be float32, bfloat16 or float16, got ",
                   t.scalar_type());
  return t.detach().to(at::kFloat).contiguous();
}

// The LayerNorm over a catalog's rows together with its tensors, or none.
struct Norm {
  at::Tensor weight, bias;
  RowNorm norm{};

  Norm(const std::optional<at::Tensor>& weight_, const std::optional<at::Tensor>& bias_, double eps, int64_t width) {
    if (!weight_) return;
    weight = floats_of("norm_weight", *weight_, width);
    bias = floats_of("norm_bias", *bias_, width);
    norm = {weight.const_data_ptr<float>(), bias.const_data_ptr<float>(), static_cast<float>(eps)};
  }
  Norm(const Norm&) = delete;

  const RowNorm* get() const { return weight.defined() ? &norm : nullptr; }
};

// int32 or int64 ids of any shape, dense.
inline at::Tensor ids_of(const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt || t.scalar_type() == at::kLong, name, " must be int32 or int64, got ",
                   t.scalar_type());
  return t.contiguous();
}

}  // namespace alterrec
