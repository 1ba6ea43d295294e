// The inner loops of the losses, one source compiled for each instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace alterrec {

// How the elements of a row are read. Arithmetic is always in float32.
enum class Row { kF32, kF32ToBF16, kF32ToF16, kBF16, kF16 };  // stored as such; kF32To...: rounded when read

struct LossKernels {
  // The largest y among members, -inf for none. `mask` has one bit for each of 64 * words values. *finite turns false
  // where any of the values, member or not, is NaN or infinite.
  float (*row_max)(const float* y, const uint64_t* mask, int64_t words, bool* finite);
  // out = exp(y - shift) for members and 0 for others; returns the sum over the members. y may be out.
  float (*row_exp)(const float* y, const uint64_t* mask, int64_t words, float shift, float* out);
  // The same, stored rounded to bfloat16; the sum is of the values before rounding.
  float (*row_exp_bf16)(const float* y, const uint64_t* mask, int64_t words, float shift, uint16_t* out);
  // out[i] = q . rows[i], and acc += sum_i weight[i] * rows[i]; q, acc and rows are d long. Indexed by Row.
  void (*dot_rows[5])(const float* q, const void* const* rows, int64_t count, int64_t d, float* out);
  void (*weighted_sum[5])(const float* weight, const void* const* rows, int64_t count, int64_t d, float* acc);
  void (*affine)(float a, const float* shift, int64_t n, float* y);  // y = a y + shift, or a y without a shift
  void (*scale)(float a, const float* x, int64_t n, float* out);     // out = a x, with zeros for what would be denormal
  void (*add_scaled)(float a, const float* x, int64_t n, float* y);  // y += a x
  // out[2 c] = a[c] and out[2 c + 1] = b[c]: two rows of a right operand of bf16_gemm; 16 divides n.
  void (*interleave)(const uint16_t* a, const uint16_t* b, int64_t n, uint16_t* out);
  // out (cols, out_stride) = the transpose of `in` (rows, stride), with zeros up to the next multiple of 32 rows;
  // `cols` is rounded up to a multiple of 16 on both sides.
  void (*transpose)(const uint16_t* in, int64_t stride, int64_t rows, int64_t cols, uint16_t* out, int64_t out_stride);
};

// The kernels of the best instruction set that this machine has and ALTERREC_FAST_ISA allows.
const LossKernels& loss_kernels();

}  // namespace alterrec
