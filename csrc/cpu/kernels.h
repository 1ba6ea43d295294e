// The inner loops, each written for several instruction sets; kernels() gives those of this CPU.
#pragma once

#include <cstdint>

#include "cpu/tile.h"

namespace alterrec {

struct Kernels {
  // n bfloat16 values to float32, float32 rounded to the nearest bfloat16 (ties to even) and kept as float32, or
  // stored as bfloat16.
  void (*widen)(const uint16_t* in, int64_t n, float* out);
  void (*round)(const float* in, int64_t n, float* out);
  void (*narrow)(const float* in, int64_t n, uint16_t* out);
  // One panel of pack_panels: `count` <= kPanel rows of x from `begin` on.
  void (*pack_panel)(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out);
};

const Kernels& kernels();

}  // namespace alterrec
