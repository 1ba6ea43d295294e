// One catalog tile of the dense loss multiplied in bfloat16 by the CPU: its three products.
#pragma once

#include <cstdint>

#include "cpu/tile.h"

namespace alterrec {

// Products of bfloat16 values, summed in float32. "In pairs" is the layout of bf16_gemm's right operand.
class Bf16Tile {
 public:
  // The tile's rows, (count, d) float32 or bfloat16; width is d rounded up to a multiple of 32.
  void load(const Matrix& rows, int64_t width);

  // y (rows, stride) = query (rows, width) . tile; whole panels of 32 columns are written.
  void logits(const uint16_t* query, int64_t rows, float* y, int64_t stride);

  // sum (count, width) = p^T query (+ sum), for p (rows, stride) and query (rows, d) float32, d apart.
  void catalog_product(const uint16_t* p, int64_t stride, int64_t rows, const float* query, int64_t d, float* sum,
                       bool accumulate);

  // out (rows, width) = p tile; p must be zero from the tile's end to the next multiple of 32.
  void query_product(const uint16_t* p, int64_t stride, int64_t rows, float* out);

 private:
  Matrix rows_{};
  int64_t count_ = 0, width_ = 0;
  bool paired_ = false, packed_ = false;
  Buffer<uint16_t> panels_, pairs_, narrow_, transposed_, query_pairs_;
};

}  // namespace alterrec
