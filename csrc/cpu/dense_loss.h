// The dense form of the losses: all columns are scored, tile by tile, and a mask says which are negatives of which row.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/loss.h"
#include "cpu/loss_bf16.h"

namespace alterrec {

// Which columns are negatives of which row, before the row's target is dropped.
struct Members {
  enum class Form { kAll, kBits, kIds, kShared };

  Form form = Form::kAll;         // all from first_item on
  const uint8_t* bits = nullptr;  // (B, bits_stride), column c is bit c % 8 of byte c / 8
  int64_t bits_stride = 0;
  const int32_t* ids = nullptr;  // (B, ids_width), ascending, -1 at the end
  int64_t ids_width = 0;
  const uint64_t* shared = nullptr;  // bits that hold for every row

  // Whether they are so few of `items` that their embeddings are multiplied one by one.
  bool few(int64_t items) const {
    constexpr int64_t kCrossover = 16;  // measured by the benchmarks of the losses
    return form == Form::kIds && ids_width * kCrossover <= items;
  }
};

// The items that are scored: all, or a list of some. Column c is item c, or items[c].
struct Columns {
  int64_t count;
  const int64_t* items = nullptr;    // ascending
  const float* shift = nullptr;      // (count,), added to the logits
  const uint64_t* masked = nullptr;  // one bit for each column that is no row's negative
};

// All items as columns, with what a bias makes of them.
struct ItemColumns {
  std::vector<float> shift;      // bias / temperature, or empty
  std::vector<uint64_t> masked;  // a bit for each item whose bias is -inf; empty where there is none
  Columns columns;

  explicit ItemColumns(const LossProblem& problem) : columns{problem.catalog.rows} {
    if (problem.bias == nullptr) return;
    shift.resize(columns.count);
    for (int64_t i = 0; i < columns.count; ++i) {
      if (!problem.masked(i)) {
        shift[i] = problem.bias[i] / problem.temperature;
        continue;
      }
      if (masked.empty()) masked.resize((columns.count + 63) / 64);
      masked[i / 64] |= uint64_t{1} << i % 64;
    }
    columns.shift = shift.data();
    if (!masked.empty()) columns.masked = masked.data();
  }
  ItemColumns(const ItemColumns&) = delete;
};

class DenseLoss {
 public:
  static constexpr int64_t kTileColumns = 512;  // columns of a tile, a multiple of 64

  // What one thread works with. Tiles come in ascending order.
  struct Scratch {
    Buffer<uint64_t> masks;         // (kBlock, kWords)
    Buffer<float> logits;           // (kBlock, kTileColumns)
    Buffer<uint16_t> exponentials;  // the same in bf16
    Buffer<float> gathered, normed, tile_copy;
    const float* tile;  // (count, d) float32
    int64_t tile_stride;
    Bf16Tile bf16;
    Buffer<float> weights, scaled_query, query_product, catalog_sum, bias_sum, row;
    std::vector<int64_t> next_id;  // (B,), each row's first id in tile `next_tile`, where ids are few
    int64_t next_tile = -1;
  };

  DenseLoss(const LossProblem& problem, const Columns& columns, const Members& members);

  // Fills `saved` with the exponentials of as many tiles as it has room for; backward() computes the others again. Ids
  // that are few have their logits saved, or none of them.
  // mean (B, d), where it is asked for: each row's negatives' mean under the softmax, zero where there is none.
  void forward(uint8_t* saved, int64_t saved_size, float* losses, float* lse, float* mean = nullptr) const;

  // The pieces of backward(). Once: the logits of targets and positives give way to their gradients.
  void differentiate(const float* grad_losses, const float* lse, const uint8_t* saved, int64_t saved_size);
  // The gradient of the queries, from the mean that forward() gave; needs no more of `differentiate` than the first
  // two.
  void query_gradient(const float* mean, const Gradients& gradients) const;
  // sum (count, d) += the gradient of the rows of tile `index`, of the block of rows [index * kTileColumns, + count).
  void add_tile_gradient(int64_t index, float* sum, Scratch& scratch) const;

  // Once, since the logits of targets and positives give way to their gradients. The gradients of catalog and bias have
  // one row for each column; with `by_item` column c's is row items[c], and other rows are left alone.
  void backward(const float* grad_losses, const float* lse, const uint8_t* saved, int64_t saved_size,
                const Gradients& gradients, bool by_item = false);

 private:
  static constexpr int64_t kBlock = 512;  // rows that meet a tile at once: kTileColumns * kBlock logits stay in cache
  static constexpr int64_t kWords = kTileColumns / 64;

  struct Tile {
    int64_t index, begin, count;  // columns [begin, begin + count)
  };

  // The gradients of targets and positives, sorted by the tile of their column: entry row * width + place.
  struct PosByTile {
    std::vector<int64_t> begin;  // (tiles + 1,)
    std::vector<uint32_t> entries;
  };

  // The exponentials of the first tiles, each over its row's largest logit in the tile; or the logits of few ids.
  struct Saved {
    int64_t tiles = 0;
    float* top = nullptr;       // (tiles, B), the largest logits
    uint8_t* values = nullptr;  // (tiles, B, kTileColumns) float32, or bfloat16 where bf16_
    float* logits = nullptr;    // (B, ids_width), -inf for what is no negative
  };

  // What a backward pass has for all tiles.
  struct BackwardPass {
    Saved saved;
    const float* lse = nullptr;
    PosByTile positives;
  };

  // Where a forward pass sums up over the tiles of a chunk: (B,) the largest logits and the exponentials over them, and
  // (B, d) their mean's part or null.
  struct Sums {
    float *top, *sum, *mean;
  };

  // Negatives of one row in a tile: at most 64 of its ids from place `first` on.
  struct Few {
    int64_t first, count;
    uint64_t mask;  // which of them are negatives
    int64_t columns[64];
    const void* rows[64];
    float y[64];  // logits
  };

  Saved saved(const uint8_t* bytes, int64_t size) const;
  int64_t saved_tile_bytes() const;
  Tile tile(int64_t index) const;
  int64_t column_of(int64_t item) const;
  PosByTile sort_positives() const;
  void load(const Tile& tile, Scratch& scratch) const;
  bool fill_masks(const Tile& tile, int64_t begin, int64_t end, Scratch& scratch) const;
  void fill_mask(const Tile& tile, int64_t row, uint64_t* words) const;
  void logits(const Tile& tile, int64_t begin, int64_t end, float* y, Scratch& scratch) const;
  void forward_tile(const Tile& tile, const Saved& saved, const Sums& sums, Fault& fault, Scratch& scratch) const;
  void add_to_means(const Tile& tile, int64_t begin, int64_t end, const void* p, const Sums& sums,
                    Scratch& scratch) const;
  void tile_gradients(const Tile& tile, float* catalog_sum, float* bias_sum, float* query_sum, Scratch& scratch) const;
  void backward_tile(const Tile& tile, const Gradients& gradients, bool by_item, float* query_sum,
                     Scratch& scratch) const;
  void add_products(const Tile& tile, int64_t begin, int64_t end, const void* p, float* catalog_sum, bool accumulate,
                    float* query_sum, Scratch& scratch) const;
  void finish_query(const float* parts, int64_t chunks, const Gradients& gradients) const;
  int64_t mean_chunks() const;

  // Where ids are few (dense_loss_few.cpp).
  template <class Visit>
  void each_few(const Tile& tile, const float* logits, Scratch& scratch, const Visit& visit) const;
  void forward_few(const Tile& tile, const Saved& saved, const Sums& sums, Fault& fault, Scratch& scratch) const;
  void few_gradients(const Tile& tile, float* catalog_sum, float* bias_sum, float* query_sum, Scratch& scratch) const;

  const LossProblem& problem_;
  const Columns columns_;
  const Members members_;
  const bool few_;              // the members are ids and so few that embeddings are multiplied one by one
  const bool bf16_;             // whether products are by instructions for bfloat16
  const int64_t rows_, width_;  // B, d
  const int64_t padded_;        // d as the products see it: a multiple of 32 where they are in bfloat16
  const int64_t tiles_;
  Buffer<float> query_copy_;
  int64_t query_stride_ = 0;
  const float* query_;           // (B, d) float32, rounded where the products are
  Buffer<uint16_t> query_bf16_;  // (B, padded)
  Positives positives_;
  std::vector<int64_t> target_column_;  // (B,), -1 where there is none
  std::vector<int64_t> ids_count_;      // (B,), how many of members_.ids are items
  BackwardPass pass_;
};

}  // namespace alterrec
