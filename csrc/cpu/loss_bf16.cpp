#include "cpu/loss_bf16.h"

#include <algorithm>

#include "cpu/blas.h"
#include "cpu/kernels.h"
#include "cpu/loss_kernels.h"

namespace alterrec {
namespace {

constexpr int64_t kDepth = 32;  // what the depth of a product in bfloat16 is a multiple of

}  // namespace

void Bf16Tile::load(const Matrix& rows, int64_t width) {
  rows_ = rows;
  count_ = rows.rows;
  width_ = width;
  packed_ = paired_ = false;
}

void Bf16Tile::logits(const uint16_t* query, int64_t rows, float* y, int64_t stride) {
  if (!packed_) pack_panels(rows_, 0, count_, width_, panels_.reserve(round_up(count_, kPanel) * width_));
  packed_ = true;
  for (int64_t panel = 0; panel < count_; panel += kPanel) {
    bf16_gemm(rows, kPanel, width_, query, width_, panels_.get() + panel * width_, kPanel, y + panel, stride, false);
  }
  bf16_release();
}

void Bf16Tile::catalog_product(const uint16_t* p, int64_t stride, int64_t rows, const float* query, int64_t d,
                               float* sum, bool accumulate) {
  const int64_t depth = round_up(rows, kDepth);
  uint16_t* pairs = query_pairs_.reserve(depth * width_);
  uint16_t* narrow = narrow_.reserve(2 * width_);
  for (int64_t r = 0; r < depth; r += 2) {
    std::fill(narrow, narrow + 2 * width_, uint16_t{0});
    for (int64_t i = 0; i < 2 && r + i < rows; ++i)
      kernels().narrow(Format::kBF16, query + (r + i) * d, d, narrow + i * width_);
    loss_kernels().interleave(narrow, narrow + width_, width_, pairs + r * width_);
  }
  uint16_t* transposed = transposed_.reserve(round_up(count_, kDepth) * depth);
  loss_kernels().transpose(p, stride, rows, count_, transposed, depth);
  bf16_gemm(count_, width_, depth, transposed, depth, pairs, width_, sum, width_, accumulate);
  bf16_release();
}

void Bf16Tile::query_product(const uint16_t* p, int64_t stride, int64_t rows, float* out) {
  const int64_t depth = round_up(count_, kDepth);
  if (!paired_) {
    uint16_t* pairs = pairs_.reserve(depth * width_);
    uint16_t* narrow = narrow_.reserve(2 * width_);
    for (int64_t r = 0; r < depth; r += 2) {
      std::fill(narrow, narrow + 2 * width_, uint16_t{0});
      if (r < count_) bf16_rows(rows_, r, std::min<int64_t>(2, count_ - r), width_, narrow);
      loss_kernels().interleave(narrow, narrow + width_, width_, pairs + r * width_);
    }
    paired_ = true;
  }
  bf16_gemm(rows, width_, depth, p, stride, pairs_.get(), width_, out, width_, false);
  bf16_release();
}

}  // namespace alterrec
