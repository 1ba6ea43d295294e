// Packing of catalog tiles for the products: x86 versions of the two packing entries of Kernels.
#pragma once

#include "cpu/tile.h"

namespace alterrec {

// Kernels::pack_floats with AVX-512, and Kernels::pack_pairs on CPUs that convert to bfloat16 in one instruction.
void pack_floats_avx512(const Matrix& x, int64_t begin, int64_t count, Format precision, float* out);
void pack_pairs_bf16(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out);

}  // namespace alterrec
