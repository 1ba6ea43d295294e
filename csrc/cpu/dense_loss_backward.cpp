// The backward pass of the dense form, and the gradients of one block of rows that it is made of.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/blas.h"
#include "cpu/dense_loss.h"
#include "cpu/kernels.h"

namespace alterrec {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int64_t kBackwardChunks = 16;
constexpr int64_t kPartBytes = 64 << 20;

}  // namespace

// Means and query's gradients are summed in so many chunks, as their memory allows.
int64_t DenseLoss::mean_chunks() const {
  const int64_t bytes = std::max<int64_t>(1, rows_ * width_ * static_cast<int64_t>(sizeof(float)));
  return std::min(tiles_, std::clamp<int64_t>(kPartBytes / bytes, 1, kBackwardChunks));
}

DenseLoss::PosByTile DenseLoss::sort_positives() const {
  const auto each = [&](const auto& visit) {  // visit(tile, entry), in the order of entries
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t k = 0; k < positives_.width(); ++k) {
        if (positives_.dlogit(row, k) == 0.0f) continue;
        visit(column_of(positives_.item(row, k)) / kTileColumns, static_cast<uint32_t>(row * positives_.width() + k));
      }
    }
  };
  PosByTile out;
  out.begin.assign(tiles_ + 1, 0);
  each([&](int64_t tile, uint32_t) { ++out.begin[tile + 1]; });
  for (int64_t tile = 0; tile < tiles_; ++tile) out.begin[tile + 1] += out.begin[tile];
  out.entries.resize(out.begin[tiles_]);
  std::vector<int64_t> next(out.begin.begin(), out.begin.end() - 1);
  each([&](int64_t tile, uint32_t entry) { out.entries[next[tile]++] = entry; });
  return out;
}

// What a tile adds to the gradients: catalog_sum (count, padded) and bias_sum (count,) are overwritten, query_sum (B,
// d) is added to. Each may be null.
void DenseLoss::tile_gradients(const Tile& tile, float* catalog_sum, float* bias_sum, float* query_sum,
                               Scratch& scratch) const {
  const auto& [saved, lse, positives] = pass_;
  const LossKernels& kernel = loss_kernels();
  const bool keeps = tile.index < saved.tiles;
  const int64_t words = (tile.count + 63) / 64;
  if (bias_sum) std::fill(bias_sum, bias_sum + tile.count, 0.0f);
  bool added = false;
  if (few_) {
    few_gradients(tile, catalog_sum, bias_sum, query_sum, scratch);
    added = true;
  } else if (!keeps || query_sum) {
    load(tile, scratch);
  }
  for (int64_t begin = 0; !few_ && begin < rows_; begin += kBlock) {
    const int64_t end = std::min(rows_, begin + kBlock);
    float* weights = scratch.weights.reserve(kBlock);
    const void* p;
    if (keeps) {
      const float* top = saved.top + tile.index * rows_;
      if (*std::max_element(top + begin, top + end) == kLowest) continue;
      for (int64_t row = begin; row < end; ++row) {
        // Rows without loss have the weight zero, and maybe no finite lse.
        const float weight = positives_.weights()[row];
        weights[row - begin] = weight == 0.0f ? 0.0f : weight * std::exp(top[row] - lse[row]);
      }
      p = saved.values + (tile.index * rows_ + begin) * kTileColumns * (bf16_ ? 2 : 4);
    } else {
      if (!fill_masks(tile, begin, end, scratch)) continue;
      float* y = scratch.logits.reserve(kBlock * kTileColumns);
      uint16_t* narrow = bf16_ ? scratch.exponentials.reserve(kBlock * kTileColumns) : nullptr;
      logits(tile, begin, end, y, scratch);
      for (int64_t i = 0; i < end - begin; ++i) {
        const uint64_t* mask = scratch.masks.get() + i * kWords;
        weights[i] = positives_.weights()[begin + i];
        if (bf16_) {
          kernel.row_exp_bf16(y + i * kTileColumns, mask, words, lse[begin + i], narrow + i * kTileColumns);
        } else {
          kernel.row_exp(y + i * kTileColumns, mask, words, lse[begin + i], y + i * kTileColumns);
        }
      }
      p = bf16_ ? static_cast<const void*>(narrow) : y;
    }
    for (int64_t i = 0; i < end - begin; ++i) weights[i] /= problem_.temperature;
    for (int64_t i = 0; bias_sum && i < end - begin; ++i) {
      const float* row = static_cast<const float*>(p) + i * kTileColumns;
      if (bf16_) {
        float* wide = scratch.row.reserve(kTileColumns);
        kernels().widen(Format::kBF16, static_cast<const uint16_t*>(p) + i * kTileColumns, tile.count, wide);
        row = wide;
      }
      kernel.add_scaled(weights[i], row, tile.count, bias_sum);
    }
    add_products(tile, begin, end, p, catalog_sum, added, query_sum, scratch);
    added = true;
  }
  if (catalog_sum && !added) std::fill(catalog_sum, catalog_sum + tile.count * padded_, 0.0f);
  for (int64_t i = positives.begin[tile.index]; i < positives.begin[tile.index + 1]; ++i) {
    const int64_t row = positives.entries[i] / positives_.width(), place = positives.entries[i] % positives_.width();
    const int64_t column = column_of(positives_.item(row, place)) - tile.begin;
    const float dlogit = positives_.dlogit(row, place) / problem_.temperature;
    if (catalog_sum) kernel.add_scaled(dlogit, query_ + row * query_stride_, width_, catalog_sum + column * padded_);
    if (bias_sum) bias_sum[column] += dlogit;
  }
}

void DenseLoss::add_tile_gradient(int64_t index, float* sum, Scratch& scratch) const {
  const Tile block = tile(index);
  float* catalog_sum = scratch.catalog_sum.reserve(kTileColumns * padded_);
  tile_gradients(block, catalog_sum, nullptr, nullptr, scratch);
  for (int64_t i = 0; i < block.count; ++i) {
    loss_kernels().add_scaled(1.0f, catalog_sum + i * padded_, width_, sum + i * width_);
  }
}

void DenseLoss::backward_tile(const Tile& tile, const Gradients& gradients, bool by_item, float* query_sum,
                              Scratch& scratch) const {
  // A float32 gradient is summed where it belongs, unless its rows are padded or scattered.
  const bool direct = gradients.catalog && gradients.catalog_format == Format::kF32 && padded_ == width_ && !by_item;
  float* catalog_sum = direct              ? static_cast<float*>(gradients.catalog) + tile.begin * width_
                       : gradients.catalog ? scratch.catalog_sum.reserve(kTileColumns * padded_)
                                           : nullptr;
  float* bias_sum = gradients.bias ? scratch.bias_sum.reserve(kTileColumns) : nullptr;
  tile_gradients(tile, catalog_sum, bias_sum, query_sum, scratch);
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t row = by_item ? columns_.items[tile.begin + i] : tile.begin + i;
    if (bias_sum) gradients.bias[row] = bias_sum[i];
    if (!catalog_sum || direct) continue;
    write_row(catalog_sum + i * padded_, row, width_, gradients.catalog_format, gradients.catalog);
  }
}

// Adds the chunks' parts in their order, and what targets and positives add.
void DenseLoss::finish_query(const float* parts, int64_t chunks, const Gradients& gradients) const {
  constexpr int64_t kRowsPerTask = 32;
  for_each((rows_ + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    std::vector<float> sum(width_), of_positives(width_);
    for (int64_t row = task * kRowsPerTask; row < std::min(rows_, (task + 1) * kRowsPerTask); ++row) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      std::fill(of_positives.begin(), of_positives.end(), 0.0f);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        loss_kernels().add_scaled(1.0f, parts + (chunk * rows_ + row) * width_, width_, sum.data());
      }
      positives_.add_to_query_gradient(row, of_positives.data());
      loss_kernels().add_scaled(1.0f / problem_.temperature, of_positives.data(), width_, sum.data());
      write_row(sum.data(), row, width_, gradients.query_format, gradients.query);
    }
  });
}

void DenseLoss::query_gradient(const float* mean, const Gradients& gradients) const {
  Buffer<float> memory;
  float* part = memory.reserve(rows_ * width_);
  for (int64_t row = 0; row < rows_; ++row) {
    const float weight = positives_.weights()[row] / problem_.temperature;
    loss_kernels().scale(weight, mean + row * width_, width_, part + row * width_);
  }
  finish_query(part, 1, gradients);
}

void DenseLoss::differentiate(const float* grad_losses, const float* lse, const uint8_t* bytes, int64_t size) {
  positives_.differentiate(grad_losses, lse);
  pass_ = {saved(bytes, size), lse, sort_positives()};
}

void DenseLoss::backward(const float* grad_losses, const float* lse, const uint8_t* bytes, int64_t size,
                         const Gradients& gradients, bool by_item) {
  differentiate(grad_losses, lse, bytes, size);
  const int64_t chunks = mean_chunks();
  Buffer<float> parts_memory;
  float* parts = gradients.query ? parts_memory.reserve(chunks * rows_ * width_) : nullptr;
  for_each(chunks, [&](int64_t chunk) {
    Scratch scratch;
    float* query_sum = gradients.query ? parts + chunk * rows_ * width_ : nullptr;
    if (query_sum) std::fill(query_sum, query_sum + rows_ * width_, 0.0f);
    for (int64_t t = part(tiles_, chunk, chunks); t < part(tiles_, chunk + 1, chunks); ++t) {
      backward_tile(tile(t), gradients, by_item, query_sum, scratch);
    }
  });
  if (gradients.query) finish_query(parts, chunks, gradients);
}

}  // namespace alterrec
