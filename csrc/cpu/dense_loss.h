// The dense form of the losses: all columns are scored, tile by tile, and a mask says which are negatives of which row.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/loss.h"

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
  DenseLoss(const LossProblem& problem, const Columns& columns, const Members& members);

  // Fills `saved` with the exponentials of as many tiles as it has room for; backward() computes the others again.
  void forward(uint8_t* saved, int64_t saved_size, float* losses, float* lse) const;

  // Once, since the logits of targets and positives give way to their gradients. The gradients of catalog and bias have
  // one row for each column; with `by_item` column c's is row items[c], and other rows are left alone.
  void backward(const float* grad_losses, const float* lse, const uint8_t* saved, int64_t saved_size,
                const Gradients& gradients, bool by_item = false);

 private:
  struct Scratch;

  struct Tile {
    int64_t index, begin, count;  // columns [begin, begin + count)
  };

  // The gradients of targets and positives, sorted by the tile of their column: entry row * width + place.
  struct PosByTile {
    std::vector<int64_t> begin;  // (tiles + 1,)
    std::vector<uint32_t> entries;
  };

  // The exponentials of the first tiles, each over its row's largest logit in the tile.
  struct Saved {
    int64_t tiles;
    float* top;       // (tiles, B), the largest logits
    uint8_t* values;  // (tiles, B, kTileColumns) float32, or bfloat16 in bf16 arithmetic
  };

  // What a backward pass has for all tiles.
  struct BackwardPass {
    Saved saved;
    const float* lse;
    PosByTile positives;
    const Gradients& gradients;
    bool by_item;
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
  void forward_tile(const Tile& tile, const Saved& saved, float* top, float* sum, Fault& fault, Scratch& scratch) const;
  void backward_tile(const Tile& tile, const BackwardPass& pass, float* query_sum, Scratch& scratch) const;
  void add_products(const Tile& tile, int64_t begin, int64_t end, const void* p, float* catalog_sum, bool accumulate,
                    float* query_sum, Scratch& scratch) const;
  void finish_query(const float* parts, int64_t chunks, const Gradients& gradients) const;

  const LossProblem& problem_;
  const Columns columns_;
  const Members members_;
  const Arithmetic arithmetic_;
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
};

}  // namespace alterrec
