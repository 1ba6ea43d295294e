// The inner loops over one row of an item table: LayerNorm and its backward pass, and the optimisers. One source
// compiled for each instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "cpu/tile.h"

namespace alterrec {

// How a table's rows are updated, as torch.optim's optimiser of that name does. The step size and what follows from the
// number of steps are ready made.
struct Optimizer {
  enum class Kind { kAdam, kSparseAdam, kRowwiseAdagrad, kSgd };

  Kind kind;
  float step_size;            // Adam: lr / (1 - beta1^t); SparseAdam: the same times root_correction; else lr
  float root_correction;      // Adam: sqrt(1 - beta2^t)
  float beta2, rest1, rest2;  // rest1 = 1 - beta1 and rest2 = 1 - beta2, which lose digits in float32
  float eps;
  float weight_decay;
  float scale;  // what gradients are multiplied by first
  float clip;   // and then each element is clipped to [-clip, clip]; infinity for none
};

struct TableKernels {
  // out = the LayerNorm of x (d,); they may be one.
  void (*normalise)(const float* x, int64_t d, const RowNorm& norm, float* out);
  // g, the gradient of normalise(x), becomes that of x; weight_sum and bias_sum (d,) += those of the norm's.
  void (*normalise_backward)(const float* x, int64_t d, const RowNorm& norm, float* g, float* weight_sum,
                             float* bias_sum);
  // A row's step by its gradient g. first and second are its moments: (d,) each for Adam, one number in first for
  // row-wise Adagrad.
  void (*step)(const Optimizer& optimizer, int64_t d, const float* g, float* x, float* first, float* second);
  // out = x rounded to bfloat16, up with a probability of the part cut off; bits follow from key and place in the row.
  void (*round_at_random)(const float* x, int64_t d, uint32_t key, uint16_t* out);
};

// The 32 bits that a number is mixed to, for the counter-based draws of the rounding.
inline uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

const TableKernels& table_kernels();

}  // namespace alterrec
