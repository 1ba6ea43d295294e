// Large tensors whose memory is used again by the next call.
#pragma once

#include <ATen/core/Tensor.h>

namespace alterrec {

// Uninitialised, like at::empty. The system hands out fresh memory page by page and fills it with zeros first, which for
// what is written and read once takes as long as that; so a block that is given back is kept for the next call, up to
// 256 MiB in all.
at::Tensor recycled_empty(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace alterrec
