// One tile of the score matrix: a block of sessions times a run of catalog items, the product in cache.
#pragma once

#include <cstdint>

#include "cpu/buffer.h"
#include "format.h"

namespace alterrec {

// A LayerNorm over each row, applied when the row is read.
struct RowNorm {
  const float *weight, *bias;  // (cols,)
  float eps;
};

// A row-major matrix with unit last stride; `stride` >= `cols` elements from row to row. With a norm its rows are those
// that come out of it, in float32; they are nowhere stored.
struct Matrix {
  const void* data;
  Format format;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  const RowNorm* norm = nullptr;

  const void* row(int64_t r) const { return static_cast<const char*>(data) + r * stride * bytes_of(format); }
};

// Whether products of this precision are computed by the CPU's instructions for bfloat16. All others are in float32
// arithmetic: of bfloat16 values it differs in rounding only, and of float16 values each product is exact.
bool multiplies_bf16(Format precision);

constexpr int64_t kPanel = 32;  // items in one packed panel of a tile

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Rows [begin, begin + count) of x, whose norm is applied, in `copy`.
Matrix normalised(const Matrix& x, int64_t begin, int64_t count, Buffer<float>& copy);

// For x without a norm, as all below. Rows [begin, begin + count) of x as float32 with values of `precision`: a pointer
// into x where that changes nothing, else a copy in `copy`; *stride receives the row stride.
const float* float_rows(const Matrix& x, int64_t begin, int64_t count, Format precision, Buffer<float>& copy,
                        int64_t* stride);

// Rows [begin, begin + count) of x, float32 or bfloat16, as bfloat16, zeros from x.cols to `width`: (count, width),
// dense.
void bf16_rows(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out);

// Rows [begin, begin + count) of x, transposed, as right operands of bf16_gemm: for each panel of kPanel rows a dense
// (width, kPanel) matrix in pairs; zeros from x.cols to `width` (a multiple of 32) and beyond the last row.
void pack_panels(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out);

// A block of sessions, made ready once, and its scores against any run of catalog items.
//
//   QueryBlock queries(query, 0, 512, precision);
//   queries.scores(catalog, item, 256, out, 256, scratch);   // out[s * 256 + j] = query[s] . catalog[item + j]
//
// Sessions are rows, so that one session's scores lie side by side. No bias is added. `scores` may be called from many
// threads at once, each with its own scratch.
class QueryBlock {
 public:
  struct Scratch {
    Buffer<float> normed;    // the tile's rows, where they have a norm
    Buffer<float> floats;    // the tile, or packed panels of it, in float32
    Buffer<uint16_t> pairs;  // packed panels in bfloat16
  };

  QueryBlock(const Matrix& query, int64_t begin, int64_t count, Format precision);

  int64_t rows() const { return rows_; }

  // out (rows, ld) with ld >= round_up(count, kPanel): all of those columns may be written.
  void scores(const Matrix& catalog, int64_t item, int64_t count, float* out, int64_t ld, Scratch& scratch) const;

 private:
  Format precision_;
  int64_t rows_, width_;
  const float* floats_ = nullptr;
  int64_t stride_ = 0;
  Buffer<float> copy_;
  Buffer<uint16_t> bf16_;
};

}  // namespace alterrec
