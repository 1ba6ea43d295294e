#include "cpu/tile.h"

#include <algorithm>
#include <cstring>

#include "cpu/blas.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/table_kernels.h"

namespace alterrec {

bool multiplies_bf16(Format precision) { return precision == Format::kBF16 && isa() >= Isa::kAvx512Bf16; }

Matrix normalised(const Matrix& x, int64_t begin, int64_t count, Buffer<float>& copy) {
  float* out = copy.reserve(count * x.cols);
  for (int64_t r = 0; r < count; ++r) {
    const float* row = static_cast<const float*>(x.row(begin + r));
    if (x.format != Format::kF32) {
      kernels().widen(x.format, x.row(begin + r), x.cols, out + r * x.cols);
      row = out + r * x.cols;
    }
    table_kernels().normalise(row, x.cols, *x.norm, out + r * x.cols);
  }
  return {out, Format::kF32, count, x.cols, x.cols};
}

const float* float_rows(const Matrix& x, int64_t begin, int64_t count, Format precision, Buffer<float>& copy,
                        int64_t* stride) {
  if (x.format == Format::kF32 && precision == Format::kF32) {
    *stride = x.stride;
    return static_cast<const float*>(x.row(begin));
  }
  float* out = copy.reserve(count * x.cols);
  *stride = x.cols;
  for (int64_t r = 0; r < count; ++r) {
    if (x.format == Format::kF32) {
      kernels().round(precision, static_cast<const float*>(x.row(begin + r)), x.cols, out + r * x.cols);
    } else {
      kernels().widen(x.format, x.row(begin + r), x.cols, out + r * x.cols);
    }
  }
  return out;
}

void bf16_rows(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out) {
  for (int64_t r = 0; r < count; ++r, out += width) {
    if (x.format == Format::kBF16) {
      std::copy_n(static_cast<const uint16_t*>(x.row(begin + r)), x.cols, out);
    } else {
      kernels().narrow(Format::kBF16, static_cast<const float*>(x.row(begin + r)), x.cols, out);
    }
    std::fill(out + x.cols, out + width, uint16_t{0});
  }
}

void pack_panels(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out) {
  for (int64_t p = 0; p < count; p += kPanel, out += width * kPanel) {
    kernels().pack_pairs(x, begin + p, std::min(kPanel, count - p), width, out);
  }
}

QueryBlock::QueryBlock(const Matrix& query, int64_t begin, int64_t count, Format precision)
    : precision_(precision), rows_(count), width_(query.cols) {
  if (multiplies_bf16(precision)) {
    width_ = round_up(query.cols, 32);
    bf16_rows(query, begin, count, width_, bf16_.reserve(count * width_));
  } else {
    floats_ = float_rows(query, begin, count, precision, copy_, &stride_);
  }
}

void QueryBlock::scores(const Matrix& catalog, int64_t item, int64_t count, float* out, int64_t ld,
                        Scratch& scratch) const {
  if (width_ == 0) {
    for (int64_t r = 0; r < rows_; ++r) std::fill_n(out + r * ld, count, 0.0f);
    return;
  }
  if (catalog.norm) return scores(normalised(catalog, item, count, scratch.normed), 0, count, out, ld, scratch);
  if (multiplies_bf16(precision_)) {
    uint16_t* panel = scratch.pairs.reserve(kPanel * width_);
    for (int64_t p = 0; p < count; p += kPanel) {
      kernels().pack_pairs(catalog, item + p, std::min(kPanel, count - p), width_, panel);
      bf16_gemm(rows_, kPanel, width_, bf16_.get(), width_, panel, kPanel, out + p, ld, false);
    }
    bf16_release();
    return;
  }
  if (has_packed_product()) {
    float* panel = scratch.floats.reserve(kPanel * width_);
    for (int64_t p = 0; p < count; p += kPanel) {
      kernels().pack_floats(catalog, item + p, std::min(kPanel, count - p), precision_, panel);
      packed_gemm(rows_, kPanel, width_, floats_, stride_, panel, kPanel, out + p, ld);
    }
    return;
  }
  int64_t stride = 0;
  const float* tile = float_rows(catalog, item, count, precision_, scratch.floats, &stride);
  sgemm(rows_, count, width_, {floats_, stride_}, {tile, stride, true}, out, ld, false);
}

}  // namespace alterrec
