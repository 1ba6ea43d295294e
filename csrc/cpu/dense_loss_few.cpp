// The dense form over lists of few ids: each row's ids ascend, so those of a tile lie side by side, and the tile's
// embeddings stay in cache while all rows meet theirs.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dense_loss.h"

namespace alterrec {
namespace {

constexpr int64_t kMost = 64;  // ids that are looked at together
constexpr float kLowest = -std::numeric_limits<float>::infinity();

}  // namespace

// visit(row, few) for all rows with ids in the tile, at most 64 of them at a time. Logits are those of an earlier pass,
// (B, ids_width), or computed.
template <class Visit>
void DenseLoss::each_few(const Tile& tile, const float* logits, Scratch& scratch, const Visit& visit) const {
  const auto dot = loss_kernels().dot_rows[static_cast<int>(Row::kF32)];
  const int64_t end_item = tile.begin + tile.count;
  if (scratch.next_tile != tile.index) {
    scratch.next_id.resize(rows_);
    for (int64_t row = 0; row < rows_; ++row) {
      const int32_t* ids = members_.ids + row * members_.ids_width;
      scratch.next_id[row] = std::lower_bound(ids, ids + ids_count_[row], tile.begin) - ids;
    }
  }
  scratch.next_tile = tile.index + 1;
  load(tile, scratch);
  Few few;
  for (int64_t row = 0; row < rows_; ++row) {
    const int32_t* ids = members_.ids + row * members_.ids_width;
    int64_t next = scratch.next_id[row];
    const int64_t begin = next;
    while (next < ids_count_[row] && ids[next] < end_item) ++next;
    scratch.next_id[row] = next;
    if (positives_.ignored(row)) continue;
    for (few.first = begin; few.first < next; few.first += few.count) {
      few.count = std::min(kMost, next - few.first);
      few.mask = 0;
      for (int64_t j = 0; j < few.count; ++j) {
        // An id before the tile, where ids do not ascend, which only a check forbids, is no negative.
        const int64_t column = std::max<int64_t>(ids[few.first + j] - tile.begin, 0);
        const int64_t item = tile.begin + column;
        const bool masked = columns_.masked && (columns_.masked[item / 64] >> item % 64 & 1);
        const bool negative = item == ids[few.first + j] && item != target_column_[row] && !masked;
        few.mask |= uint64_t{negative} << j;
        few.columns[j] = column;
        few.rows[j] = scratch.tile + column * scratch.tile_stride;
      }
      if (logits) {
        std::copy_n(logits + row * members_.ids_width + few.first, few.count, few.y);
      } else {
        dot(query_ + row * query_stride_, few.rows, few.count, width_, few.y);
        for (int64_t j = 0; j < few.count; ++j) {
          few.y[j] =
              few.y[j] / problem_.temperature + (columns_.shift ? columns_.shift[tile.begin + few.columns[j]] : 0);
        }
      }
      for (int64_t j = 0; j < kMost; ++j) {
        if (j >= few.count || !(few.mask >> j & 1)) few.y[j] = 0.0f;
      }
      visit(row, few);
    }
  }
}

void DenseLoss::forward_few(const Tile& tile, const Saved& saved, const Sums& sums, Fault& fault,
                            Scratch& scratch) const {
  const LossKernels& kernel = loss_kernels();
  each_few(tile, nullptr, scratch, [&](int64_t row, Few& few) {
    if (saved.logits) {
      float* out = saved.logits + row * members_.ids_width + few.first;
      for (int64_t j = 0; j < few.count; ++j) out[j] = few.mask >> j & 1 ? few.y[j] : kLowest;
    }
    bool finite = true;
    const float largest = kernel.row_max(few.y, &few.mask, 1, &finite);
    for (int64_t j = 0; j < few.count && !finite; ++j) {
      if (std::isfinite(few.y[j])) continue;
      fault.note(row, tile.begin + few.columns[j], few.y[j]);
      sums.sum[row] = std::numeric_limits<float>::quiet_NaN();  // where nothing is checked, it shall show in the loss
    }
    if (largest == kLowest) return;
    float &top = sums.top[row], &sum = sums.sum[row];
    float* mean = sums.mean ? sums.mean + row * width_ : nullptr;
    if (largest > top) {
      const float shrink = std::exp(top - largest);
      sum *= shrink;
      if (mean) kernel.scale(shrink, mean, width_, mean);
      top = largest;
    }
    sum += kernel.row_exp(few.y, &few.mask, 1, top, few.y);
    if (mean) kernel.weighted_sum[static_cast<int>(Row::kF32)](few.y, few.rows, few.count, width_, mean);
  });
}

void DenseLoss::few_gradients(const Tile& tile, float* catalog_sum, float* bias_sum, float* query_sum,
                              Scratch& scratch) const {
  const LossKernels& kernel = loss_kernels();
  if (catalog_sum) std::fill(catalog_sum, catalog_sum + tile.count * padded_, 0.0f);
  each_few(tile, pass_.saved.logits, scratch, [&](int64_t row, Few& few) {
    const float weight = positives_.weights()[row] / problem_.temperature;
    if (weight == 0.0f) return;
    kernel.row_exp(few.y, &few.mask, 1, pass_.lse[row], few.y);
    kernel.scale(weight, few.y, few.count, few.y);
    for (int64_t j = 0; j < few.count; ++j) {
      if (catalog_sum) {
        kernel.add_scaled(few.y[j], query_ + row * query_stride_, width_, catalog_sum + few.columns[j] * padded_);
      }
      if (bias_sum) bias_sum[few.columns[j]] += few.y[j];
    }
    if (query_sum) {
      float* sum = query_sum + row * width_;
      kernel.weighted_sum[static_cast<int>(Row::kF32)](few.y, few.rows, few.count, width_, sum);
    }
  });
}

}  // namespace alterrec
