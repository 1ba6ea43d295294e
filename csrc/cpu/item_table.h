// A step of an item table: the gradient of each tile of its rows goes straight into the optimiser and is nowhere
// stored.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dense_loss.h"
#include "cpu/table_kernels.h"

namespace alterrec {

struct ItemTable {
  void* rows;  // (V, d) dense, float32 or bfloat16
  bool bf16;
  int64_t count, width;
  float *first, *second;  // moments: (V, d) each for Adam, (V,) and none for row-wise Adagrad, none for SGD
  const RowNorm* norm;    // or null: what the losses and look-ups see are the rows themselves
};

struct TableStep {
  std::vector<const DenseLoss*> losses;  // over the table's rows, after DenseLoss::differentiate
  const int64_t* items;                  // (entries,) ascending: rows that were looked up,
  const float* grads;                    // (entries, d) and the gradients of what was looked up
  int64_t entries;
  Optimizer optimizer;
  bool only_touched;  // whether rows that were not looked up stay as they are
  uint32_t key;       // of the draws that round to bfloat16
};

// weight_grad and bias_grad (d,) receive the gradients of the norm's, or are null without one.
void step_table(const ItemTable& table, const TableStep& step, float* weight_grad, float* bias_grad);

}  // namespace alterrec
