// Row kernels of the losses, compiled for each instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace alterrec {

// How the elements of a row are read. Arithmetic is always in float32.
enum class Row { kF32, kF32Rounded, kBF16 };  // float32; float32 rounded to bfloat16; bfloat16

struct Vec {
  // The largest y among members, -inf for none. `mask` has one bit for each of 64 * words values. *finite turns false
  // where any of the values, member or not, is NaN or infinite.
  float (*row_max)(const float* y, const uint64_t* mask, int64_t words, bool* finite);
  // out = exp(y - shift) for members and 0 for others; returns the sum over the members. y may be out.
  float (*row_exp)(const float* y, const uint64_t* mask, int64_t words, float shift, float* out);
  // The same, stored rounded to bfloat16; the sum is of what was rounded.
  float (*row_exp_bf16)(const float* y, const uint64_t* mask, int64_t words, float shift, uint16_t* out);
  // out[i] = q . rows[i], and acc += sum_i weight[i] * rows[i]; q, acc and rows are d long. Indexed by Row.
  void (*dot_rows[3])(const float* q, const void* const* rows, int64_t count, int64_t d, float* out);
  void (*weighted_sum[3])(const float* weight, const void* const* rows, int64_t count, int64_t d, float* acc);
  // out = row as float32, and its inverse: float32 rounded to bfloat16.
  void (*widen[3])(const void* row, int64_t n, float* out);
  void (*narrow)(const float* row, int64_t n, uint16_t* out);
  void (*scale)(float a, const float* x, int64_t n, float* out);     // out = a x
  void (*add_scaled)(float a, const float* x, int64_t n, float* y);  // y += a x
};

// The kernels of the best instruction set that this machine has and ALTERREC_FAST_ISA allows.
const Vec& vec();

}  // namespace alterrec
