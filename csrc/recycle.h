// Large tensors whose memory is used again by the next call.
#pragma once

#include <ATen/core/Tensor.h>

namespace alterrec {

// Uninitialised, like at::empty, in memory from cpu/buffer.h: for what is written and read once.
at::Tensor recycled_empty(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace alterrec
