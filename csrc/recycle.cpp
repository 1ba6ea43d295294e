#include "recycle.h"

#include <ATen/ATen.h>

#include "cpu/buffer.h"

namespace alterrec {

at::Tensor recycled_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  std::size_t bytes = c10::elementSize(dtype);
  for (const int64_t size : sizes) bytes *= size;
  const Block block = take_block(bytes);
  return at::from_blob(block.data, sizes, [block](void*) { give_back(block); }, at::TensorOptions().dtype(dtype));
}

}  // namespace alterrec
