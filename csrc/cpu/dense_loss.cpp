#include "cpu/dense_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/blas.h"
#include "cpu/kernels.h"
#include "cpu/loss_bf16.h"

namespace alterrec {
namespace {

constexpr int64_t kTileColumns = 512;  // columns of a tile, a multiple of 64
constexpr int64_t kBlock = 512;        // rows that meet a tile at once: kTileColumns * kBlock logits stay in cache
constexpr int64_t kWords = kTileColumns / 64;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Partial sums are over chunks of tiles. Their number must not depend on the number of threads, else results would.
constexpr int64_t kForwardChunks = 64, kBackwardChunks = 16;
constexpr int64_t kPartBytes = 64 << 20;

// Runs the tasks inside a parallel region even if there is only one: the BLAS then always uses one thread for each
// product, and rounds in the same way for any number of threads.
template <class Task>
void for_each(int64_t tasks, const Task& task) {
  parallel_for(std::max<int64_t>(tasks, 2), [&](int64_t i) {
    if (i < tasks) task(i);
  });
}

// The chunk'th of `chunks` nearly equal parts of [0, n) begins here.
int64_t part(int64_t n, int64_t chunk, int64_t chunks) { return n * chunk / chunks; }

}  // namespace

struct DenseLoss::Scratch {
  Buffer<uint64_t> masks;         // (kBlock, kWords)
  Buffer<float> logits;           // (kBlock, kTileColumns)
  Buffer<uint16_t> exponentials;  // the same in bf16
  Buffer<float> gathered, tile_copy;
  const float* tile;  // (count, d) float32
  int64_t tile_stride;
  Bf16Tile bf16;
  Buffer<float> weights, scaled_query, query_product, catalog_sum, bias_sum, row;
};

DenseLoss::DenseLoss(const LossProblem& problem, const Columns& columns, const Members& members)
    : problem_(problem),
      columns_(columns),
      members_(members),
      arithmetic_(choose_arithmetic(problem.bf16)),
      rows_(problem.query.rows),
      width_(problem.query.cols),
      padded_(arithmetic_ == Arithmetic::kBf16 ? round_up(width_, 32) : width_),
      tiles_((columns.count + kTileColumns - 1) / kTileColumns),
      query_(float_rows(problem.query, 0, rows_, problem.bf16, query_copy_, &query_stride_)),
      positives_(problem, query_, query_stride_),
      target_column_(rows_),
      ids_count_(members.form == Members::Form::kIds ? rows_ : 0) {
  if (arithmetic_ == Arithmetic::kBf16) {
    bf16_rows(problem.query, 0, rows_, padded_, query_bf16_.reserve(rows_ * padded_));
  }
  for (int64_t row = 0; row < rows_; ++row) target_column_[row] = column_of(positives_.item(row, 0));
  for (size_t row = 0; row < ids_count_.size(); ++row) {
    const int32_t* ids = members.ids + row * members.ids_width;
    ids_count_[row] = std::partition_point(ids, ids + members.ids_width, [](int32_t id) { return id >= 0; }) - ids;
  }
}

int64_t DenseLoss::column_of(int64_t item) const {
  if (item < 0 || !columns_.items) return item;
  return std::lower_bound(columns_.items, columns_.items + columns_.count, item) - columns_.items;
}

int64_t DenseLoss::saved_tile_bytes() const {
  return rows_ * (kTileColumns * (arithmetic_ == Arithmetic::kBf16 ? 2 : 4) + static_cast<int64_t>(sizeof(float)));
}

DenseLoss::Saved DenseLoss::saved(const uint8_t* bytes, int64_t size) const {
  const int64_t tiles = rows_ == 0 ? 0 : size / saved_tile_bytes();
  uint8_t* values = const_cast<uint8_t*>(bytes);
  const int64_t value_bytes = tiles * (saved_tile_bytes() - rows_ * static_cast<int64_t>(sizeof(float)));
  return {tiles, reinterpret_cast<float*>(values + value_bytes), values};
}

DenseLoss::Tile DenseLoss::tile(int64_t index) const {
  return {index, index * kTileColumns, std::min(kTileColumns, columns_.count - index * kTileColumns)};
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

// Makes the tile's rows ready for the products.
void DenseLoss::load(const Tile& tile, Scratch& scratch) const {
  Matrix rows = problem_.catalog;
  if (columns_.items) {
    const int64_t bytes = width_ * (rows.bf16 ? 2 : 4);
    char* out = reinterpret_cast<char*>(scratch.gathered.reserve(kTileColumns * width_));
    for (int64_t i = 0; i < tile.count; ++i) {
      const char* from = static_cast<const char*>(row_at(rows, columns_.items[tile.begin + i]));
      std::copy_n(from, bytes, out + i * bytes);
    }
    rows.data = out;
    rows.stride = width_;
  } else {
    rows.data = row_at(rows, tile.begin);
  }
  rows.rows = tile.count;
  if (arithmetic_ == Arithmetic::kBf16) {
    scratch.bf16.load(rows, padded_);
  } else {
    scratch.tile = float_rows(rows, 0, tile.count, problem_.bf16, scratch.tile_copy, &scratch.tile_stride);
  }
}

void DenseLoss::fill_mask(const Tile& tile, int64_t row, uint64_t* words) const {
  const int64_t used = (tile.count + 63) / 64;
  std::fill(words, words + kWords, uint64_t{0});
  if (positives_.ignored(row)) return;
  if (members_.form == Members::Form::kBits) {
    std::copy_n(members_.bits + row * members_.bits_stride + tile.begin / 8, used * 8,
                reinterpret_cast<uint8_t*>(words));
    if (tile.count % 64 != 0) words[used - 1] &= ~(~uint64_t{0} << tile.count % 64);
  } else if (members_.form == Members::Form::kIds) {
    const int32_t* ids = members_.ids + row * members_.ids_width;
    const int32_t* end = ids + ids_count_[row];
    for (const int32_t* id = std::lower_bound(ids, end, tile.begin); id < end && *id < tile.begin + tile.count; ++id) {
      if (*id < tile.begin) continue;  // where ids do not ascend, which only a check forbids, all stays within `words`
      words[(*id - tile.begin) / 64] |= uint64_t{1} << (*id - tile.begin) % 64;
    }
  } else if (members_.form == Members::Form::kShared) {
    std::copy_n(members_.shared + tile.begin / 64, used, words);
  } else {
    for (int64_t w = 0; w < used; ++w) {
      const int64_t from = std::clamp<int64_t>(problem_.first_item - tile.begin - w * 64, 0, 64);
      const int64_t to = std::min<int64_t>(tile.count - w * 64, 64);
      if (from < to) words[w] = (~uint64_t{0} << from) & (~uint64_t{0} >> (64 - to));
    }
  }
  for (int64_t w = 0; columns_.masked && w < used; ++w) words[w] &= ~columns_.masked[tile.begin / 64 + w];
  const int64_t target = target_column_[row] - tile.begin;
  if (target >= 0 && target < tile.count) words[target / 64] &= ~(uint64_t{1} << target % 64);
}

// Whether any row of the block has a negative in the tile.
bool DenseLoss::fill_masks(const Tile& tile, int64_t begin, int64_t end, Scratch& scratch) const {
  uint64_t* masks = scratch.masks.reserve(kBlock * kWords);
  uint64_t any = 0;
  for (int64_t row = begin; row < end; ++row, masks += kWords) {
    fill_mask(tile, row, masks);
    for (int64_t w = 0; w < kWords; ++w) any |= masks[w];
  }
  return any != 0;
}

// y (end - begin, kTileColumns): logits of the tile's columns, zeros beyond them up to a whole word of the mask.
void DenseLoss::logits(const Tile& tile, int64_t begin, int64_t end, float* y, Scratch& scratch) const {
  const int64_t rows = end - begin;
  if (width_ == 0) {
    std::fill(y, y + rows * kTileColumns, 0.0f);
  } else if (arithmetic_ == Arithmetic::kBf16) {
    scratch.bf16.logits(query_bf16_.get() + begin * padded_, rows, y, kTileColumns);
  } else {
    sgemm(rows, tile.count, width_, {query_ + begin * query_stride_, query_stride_},
          {scratch.tile, scratch.tile_stride, true}, y, kTileColumns, false);
  }
  const float* shift = columns_.shift ? columns_.shift + tile.begin : nullptr;
  const bool plain = problem_.temperature == 1.0f && !shift;
  if (plain && tile.count % 64 == 0) return;
  for (int64_t row = 0; row < rows; ++row, y += kTileColumns) {
    if (!plain) loss_kernels().affine(1.0f / problem_.temperature, shift, tile.count, y);
    std::fill(y + tile.count, y + round_up(tile.count, 64), 0.0f);
  }
}

void DenseLoss::forward_tile(const Tile& tile, const Saved& saved, float* top, float* sum, Fault& fault,
                             Scratch& scratch) const {
  const LossKernels& kernel = loss_kernels();
  const bool keeps = tile.index < saved.tiles, bf16 = arithmetic_ == Arithmetic::kBf16;
  const int64_t words = (tile.count + 63) / 64;
  bool loaded = false;
  for (int64_t begin = 0; begin < rows_; begin += kBlock) {
    const int64_t end = std::min(rows_, begin + kBlock);
    if (!fill_masks(tile, begin, end, scratch)) {
      if (keeps) std::fill(saved.top + tile.index * rows_ + begin, saved.top + tile.index * rows_ + end, kLowest);
      continue;
    }
    if (!loaded) load(tile, scratch);
    loaded = true;
    const int64_t place = (tile.index * rows_ + begin) * kTileColumns;  // in saved.values
    const bool in_place = keeps && !bf16;
    float* y =
        in_place ? reinterpret_cast<float*>(saved.values) + place : scratch.logits.reserve(kBlock * kTileColumns);
    logits(tile, begin, end, y, scratch);
    for (int64_t row = begin; row < end; ++row, y += kTileColumns) {
      const uint64_t* mask = scratch.masks.get() + (row - begin) * kWords;
      bool finite = true;
      const float largest = kernel.row_max(y, mask, words, &finite);
      if (!finite && !positives_.ignored(row)) {
        for (int64_t c = std::max<int64_t>(0, problem_.first_item - tile.begin); c < tile.count; ++c) {
          const bool masked = columns_.masked && columns_.masked[(tile.begin + c) / 64] >> (tile.begin + c) % 64 & 1;
          if (std::isfinite(y[c]) || masked) continue;
          fault.note(row, tile.begin + c, y[c]);
          // Where nothing is checked, such a negative shall show in the loss.
          if (mask[c / 64] >> c % 64 & 1) sum[row] = std::numeric_limits<float>::quiet_NaN();
        }
      }
      float part_sum;
      if (keeps && bf16) {
        uint16_t* out = reinterpret_cast<uint16_t*>(saved.values) + place + (row - begin) * kTileColumns;
        part_sum = kernel.row_exp_bf16(y, mask, words, largest, out);
      } else {
        part_sum = kernel.row_exp(y, mask, words, largest, y);
      }
      if (keeps) saved.top[tile.index * rows_ + row] = largest;
      if (largest == kLowest) continue;
      if (largest > top[row]) {
        sum[row] = sum[row] * std::exp(top[row] - largest) + part_sum;
        top[row] = largest;
      } else {
        sum[row] += part_sum * std::exp(largest - top[row]);
      }
    }
  }
}

void DenseLoss::forward(uint8_t* bytes, int64_t size, float* losses, float* lse) const {
  const Saved keep = saved(bytes, size);
  const int64_t chunks = std::min(tiles_, kForwardChunks);
  std::vector<float> top(chunks * rows_, kLowest), sum(chunks * rows_, 0.0f);
  std::vector<Fault> faults(chunks);
  for_each(chunks, [&](int64_t chunk) {
    Scratch scratch;
    for (int64_t t = part(tiles_, chunk, chunks); t < part(tiles_, chunk + 1, chunks); ++t) {
      forward_tile(tile(t), keep, top.data() + chunk * rows_, sum.data() + chunk * rows_, faults[chunk], scratch);
    }
  });
  Fault fault = positives_.fault();
  for (const Fault& other : faults) fault.note(other);
  if (problem_.check) fault.raise();
  for (int64_t row = 0; row < rows_; ++row) {
    float largest = kLowest;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) largest = std::max(largest, top[chunk * rows_ + row]);
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t i = chunk * rows_ + row;
      total += sum[i] == 0 ? 0.0 : sum[i] * std::exp(static_cast<double>(top[i]) - largest);
    }
    lse[row] = total == 0 ? kLowest : static_cast<float>(largest + std::log(total));
  }
  positives_.losses(lse, losses);
}

// With p (end - begin, kTileColumns) times the weights of these rows: catalog_sum (count, padded) = p^T q, added where
// `accumulate`, and query_sum (B, d) += p e. Either may be null. May overwrite p.
void DenseLoss::add_products(const Tile& tile, int64_t begin, int64_t end, const void* p, float* catalog_sum,
                             bool accumulate, float* query_sum, Scratch& scratch) const {
  const LossKernels& kernel = loss_kernels();
  const int64_t rows = end - begin;
  const float* weights = scratch.weights.get();
  if (arithmetic_ != Arithmetic::kBf16) {
    // The weighted copy is in cache when the products read it across rows.
    float* weighted = scratch.logits.reserve(kBlock * kTileColumns);
    for (int64_t i = 0; i < rows; ++i) {
      kernel.scale(weights[i], static_cast<const float*>(p) + i * kTileColumns, tile.count,
                   weighted + i * kTileColumns);
    }
    if (catalog_sum) {
      sgemm(tile.count, width_, rows, {weighted, kTileColumns, true}, {query_ + begin * query_stride_, query_stride_},
            catalog_sum, padded_, accumulate);
    }
    if (query_sum) {
      sgemm(rows, width_, tile.count, {weighted, kTileColumns}, {scratch.tile, scratch.tile_stride},
            query_sum + begin * width_, width_, true);
    }
    return;
  }
  // Here p is rounded, so the weights go to the other side of the products.
  const auto* rounded = static_cast<const uint16_t*>(p);
  if (catalog_sum) {
    float* scaled = scratch.scaled_query.reserve(kBlock * width_);
    for (int64_t i = 0; i < rows; ++i) {
      kernel.scale(weights[i], query_ + (begin + i) * query_stride_, width_, scaled + i * width_);
    }
    scratch.bf16.catalog_product(rounded, kTileColumns, rows, scaled, width_, catalog_sum, accumulate);
  }
  if (query_sum) {
    float* product = scratch.query_product.reserve(kBlock * padded_);
    scratch.bf16.query_product(rounded, kTileColumns, rows, product);
    for (int64_t i = 0; i < rows; ++i) {
      kernel.add_scaled(weights[i], product + i * padded_, width_, query_sum + (begin + i) * width_);
    }
  }
}

void DenseLoss::backward_tile(const Tile& tile, const BackwardPass& pass, float* query_sum, Scratch& scratch) const {
  const auto& [saved, lse, positives, gradients, by_item] = pass;
  const LossKernels& kernel = loss_kernels();
  const bool keeps = tile.index < saved.tiles, bf16 = arithmetic_ == Arithmetic::kBf16;
  const int64_t words = (tile.count + 63) / 64;
  // A float32 gradient is summed where it belongs, unless its rows are padded or scattered.
  const bool direct = gradients.catalog && !gradients.catalog_bf16 && padded_ == width_ && !by_item;
  float* catalog_sum = direct              ? static_cast<float*>(gradients.catalog) + tile.begin * width_
                       : gradients.catalog ? scratch.catalog_sum.reserve(kTileColumns * padded_)
                                           : nullptr;
  float* bias_sum = gradients.bias ? scratch.bias_sum.reserve(kTileColumns) : nullptr;
  if (bias_sum) std::fill(bias_sum, bias_sum + tile.count, 0.0f);
  load(tile, scratch);
  bool added = false;
  for (int64_t begin = 0; begin < rows_; begin += kBlock) {
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
      p = saved.values + (tile.index * rows_ + begin) * kTileColumns * (bf16 ? 2 : 4);
    } else {
      if (!fill_masks(tile, begin, end, scratch)) continue;
      float* y = scratch.logits.reserve(kBlock * kTileColumns);
      uint16_t* narrow = bf16 ? scratch.exponentials.reserve(kBlock * kTileColumns) : nullptr;
      logits(tile, begin, end, y, scratch);
      for (int64_t i = 0; i < end - begin; ++i) {
        const uint64_t* mask = scratch.masks.get() + i * kWords;
        weights[i] = positives_.weights()[begin + i];
        if (bf16) {
          kernel.row_exp_bf16(y + i * kTileColumns, mask, words, lse[begin + i], narrow + i * kTileColumns);
        } else {
          kernel.row_exp(y + i * kTileColumns, mask, words, lse[begin + i], y + i * kTileColumns);
        }
      }
      p = bf16 ? static_cast<const void*>(narrow) : y;
    }
    for (int64_t i = 0; i < end - begin; ++i) weights[i] /= problem_.temperature;
    for (int64_t i = 0; bias_sum && i < end - begin; ++i) {
      const float* row = static_cast<const float*>(p) + i * kTileColumns;
      if (bf16) {
        float* wide = scratch.row.reserve(kTileColumns);
        kernels().widen(static_cast<const uint16_t*>(p) + i * kTileColumns, tile.count, wide);
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
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t row = by_item ? columns_.items[tile.begin + i] : tile.begin + i;
    if (bias_sum) gradients.bias[row] = bias_sum[i];
    if (!catalog_sum || direct) continue;
    write_row(catalog_sum + i * padded_, row, width_, gradients.catalog_bf16, gradients.catalog);
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
      write_row(sum.data(), row, width_, gradients.query_bf16, gradients.query);
    }
  });
}

void DenseLoss::backward(const float* grad_losses, const float* lse, const uint8_t* bytes, int64_t size,
                         const Gradients& gradients, bool by_item) {
  positives_.differentiate(grad_losses, lse);
  const BackwardPass pass{saved(bytes, size), lse, sort_positives(), gradients, by_item};
  const int64_t part_bytes = std::max<int64_t>(1, rows_ * width_ * static_cast<int64_t>(sizeof(float)));
  const int64_t chunks = std::min(tiles_, std::clamp<int64_t>(kPartBytes / part_bytes, 1, kBackwardChunks));
  Buffer<float> parts_memory;
  float* parts = gradients.query ? parts_memory.reserve(chunks * rows_ * width_) : nullptr;
  for_each(chunks, [&](int64_t chunk) {
    Scratch scratch;
    float* query_sum = gradients.query ? parts + chunk * rows_ * width_ : nullptr;
    if (query_sum) std::fill(query_sum, query_sum + rows_ * width_, 0.0f);
    for (int64_t t = part(tiles_, chunk, chunks); t < part(tiles_, chunk + 1, chunks); ++t) {
      backward_tile(tile(t), pass, query_sum, scratch);
    }
  });
  if (gradients.query) finish_query(parts, chunks, gradients);
}

}  // namespace alterrec
