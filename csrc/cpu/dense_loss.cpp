#include "cpu/dense_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/blas.h"
#include "cpu/kernels.h"

namespace alterrec {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int64_t kForwardChunks = 64;

}  // namespace

DenseLoss::DenseLoss(const LossProblem& problem, const Columns& columns, const Members& members)
    : problem_(problem),
      columns_(columns),
      members_(members),
      few_(members.few(columns.count)),
      bf16_(multiplies_bf16(problem.precision) && !few_),
      rows_(problem.query.rows),
      width_(problem.query.cols),
      padded_(bf16_ ? round_up(width_, 32) : width_),
      tiles_((columns.count + kTileColumns - 1) / kTileColumns),
      query_(float_rows(problem.query, 0, rows_, problem.precision, query_copy_, &query_stride_)),
      positives_(problem, query_, query_stride_),
      target_column_(rows_),
      ids_count_(members.form == Members::Form::kIds ? rows_ : 0) {
  if (bf16_) {
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
  return rows_ * (kTileColumns * (bf16_ ? 2 : 4) + static_cast<int64_t>(sizeof(float)));
}

DenseLoss::Saved DenseLoss::saved(const uint8_t* bytes, int64_t size) const {
  uint8_t* values = const_cast<uint8_t*>(bytes);
  if (few_) {
    const bool room = size > 0 && size >= rows_ * members_.ids_width * static_cast<int64_t>(sizeof(float));
    return {0, nullptr, nullptr, room ? reinterpret_cast<float*>(values) : nullptr};
  }
  const int64_t tiles = rows_ == 0 ? 0 : size / saved_tile_bytes();
  const int64_t value_bytes = tiles * (saved_tile_bytes() - rows_ * static_cast<int64_t>(sizeof(float)));
  return {tiles, reinterpret_cast<float*>(values + value_bytes), values, nullptr};
}

DenseLoss::Tile DenseLoss::tile(int64_t index) const {
  return {index, index * kTileColumns, std::min(kTileColumns, columns_.count - index * kTileColumns)};
}

// Makes the tile's rows ready for the products.
void DenseLoss::load(const Tile& tile, Scratch& scratch) const {
  Matrix rows = problem_.catalog;
  if (columns_.items) {
    const int64_t bytes = width_ * bytes_of(rows.format);
    char* out = reinterpret_cast<char*>(scratch.gathered.reserve(kTileColumns * width_));
    for (int64_t i = 0; i < tile.count; ++i) {
      const char* from = static_cast<const char*>(rows.row(columns_.items[tile.begin + i]));
      std::copy_n(from, bytes, out + i * bytes);
    }
    rows.data = out;
    rows.stride = width_;
  } else {
    rows.data = rows.row(tile.begin);
  }
  rows.rows = tile.count;
  if (rows.norm) rows = normalised(rows, 0, tile.count, scratch.normed);
  if (bf16_) {
    scratch.bf16.load(rows, padded_);
  } else {
    scratch.tile = float_rows(rows, 0, tile.count, problem_.precision, scratch.tile_copy, &scratch.tile_stride);
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
  } else if (bf16_) {
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

// Adds p (end - begin, kTileColumns), each row over its largest logit in the tile, to the means: sums.top has been
// raised to that, and scratch.weights says by what the row's exponentials are larger than they would be over sums.top.
void DenseLoss::add_to_means(const Tile& tile, int64_t begin, int64_t end, const void* p, const Sums& sums,
                             Scratch& scratch) const {
  const float* weights = scratch.weights.get();
  if (std::all_of(weights, weights + (end - begin), [](float w) { return w == 0.0f; })) return;
  add_products(tile, begin, end, p, nullptr, false, sums.mean, scratch);
}

void DenseLoss::forward_tile(const Tile& tile, const Saved& saved, const Sums& sums, Fault& fault,
                             Scratch& scratch) const {
  if (few_) return forward_few(tile, saved, sums, fault, scratch);
  const LossKernels& kernel = loss_kernels();
  const bool keeps = tile.index < saved.tiles;
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
    const bool in_place = keeps && !bf16_;
    float* const y =
        in_place ? reinterpret_cast<float*>(saved.values) + place : scratch.logits.reserve(kBlock * kTileColumns);
    uint16_t* const narrow = !bf16_      ? nullptr
                             : keeps     ? reinterpret_cast<uint16_t*>(saved.values) + place
                             : sums.mean ? scratch.exponentials.reserve(kBlock * kTileColumns)
                                         : nullptr;
    float* weights = scratch.weights.reserve(kBlock);
    logits(tile, begin, end, y, scratch);
    for (int64_t row = begin; row < end; ++row) {
      float* x = y + (row - begin) * kTileColumns;
      const uint64_t* mask = scratch.masks.get() + (row - begin) * kWords;
      bool finite = true;
      const float largest = kernel.row_max(x, mask, words, &finite);
      if (!finite && !positives_.ignored(row)) {
        for (int64_t c = std::max<int64_t>(0, problem_.first_item - tile.begin); c < tile.count; ++c) {
          const bool masked = columns_.masked && columns_.masked[(tile.begin + c) / 64] >> (tile.begin + c) % 64 & 1;
          if (std::isfinite(x[c]) || masked) continue;
          fault.note(row, tile.begin + c, x[c]);
          // Where nothing is checked, such a negative shall show in the loss.
          if (mask[c / 64] >> c % 64 & 1) sums.sum[row] = std::numeric_limits<float>::quiet_NaN();
        }
      }
      const float part_sum = narrow ? kernel.row_exp_bf16(x, mask, words, largest, narrow + (x - y))
                                    : kernel.row_exp(x, mask, words, largest, x);
      if (keeps) saved.top[tile.index * rows_ + row] = largest;
      weights[row - begin] = 0.0f;
      if (largest == kLowest) continue;
      float &top = sums.top[row], &sum = sums.sum[row];
      if (largest > top) {
        const float shrink = std::exp(top - largest);
        sum = sum * shrink + part_sum;
        if (sums.mean) kernel.scale(shrink, sums.mean + row * width_, width_, sums.mean + row * width_);
        top = largest;
        weights[row - begin] = 1.0f;
      } else {
        weights[row - begin] = std::exp(largest - top);
        sum += part_sum * weights[row - begin];
      }
    }
    if (sums.mean) add_to_means(tile, begin, end, narrow ? static_cast<const void*>(narrow) : y, sums, scratch);
  }
}

void DenseLoss::forward(uint8_t* bytes, int64_t size, float* losses, float* lse, float* mean) const {
  const Saved keep = saved(bytes, size);
  const int64_t chunks = mean ? mean_chunks() : std::min(tiles_, kForwardChunks);
  std::vector<float> top(chunks * rows_, kLowest), sum(chunks * rows_, 0.0f);
  std::vector<Fault> faults(chunks);
  Buffer<float> means;
  if (mean) means.reserve(chunks * rows_ * width_);
  for_each(chunks, [&](int64_t chunk) {
    Scratch scratch;
    float* chunk_mean = mean ? means.get() + chunk * rows_ * width_ : nullptr;
    if (chunk_mean) std::fill(chunk_mean, chunk_mean + rows_ * width_, 0.0f);
    const Sums sums{top.data() + chunk * rows_, sum.data() + chunk * rows_, chunk_mean};
    for (int64_t t = part(tiles_, chunk, chunks); t < part(tiles_, chunk + 1, chunks); ++t) {
      forward_tile(tile(t), keep, sums, faults[chunk], scratch);
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
    if (!mean) continue;
    std::fill(mean + row * width_, mean + (row + 1) * width_, 0.0f);
    for (int64_t chunk = 0; chunk < chunks && total != 0; ++chunk) {
      const int64_t i = chunk * rows_ + row;
      if (sum[i] == 0) continue;
      const auto weight = static_cast<float>(std::exp(static_cast<double>(top[i]) - largest) / total);
      loss_kernels().add_scaled(weight, means.get() + i * width_, width_, mean + row * width_);
    }
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
  if (!bf16_) {
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

}  // namespace alterrec
