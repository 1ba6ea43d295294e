#include "cpu/item_table.h"

#include <algorithm>

#include "cpu/blas.h"
#include "cpu/kernels.h"

namespace alterrec {
namespace {

constexpr int64_t kTile = DenseLoss::kTileColumns;
constexpr int64_t kChunks = 16;

// The scratch of one chunk of tiles, and what it adds to the norm's gradients.
struct Chunk {
  std::vector<DenseLoss::Scratch> losses;
  Buffer<float> grads, row;  // (kTile, d) and (d,)
  std::vector<float> tile_weight, tile_bias;
  std::vector<double> weight, bias;
};

uint32_t row_key(uint32_t key, int64_t row) {
  const auto high = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  return mix_bits(static_cast<uint32_t>(row) ^ mix_bits(high ^ key));
}

void step_row(const ItemTable& table, const TableStep& step, int64_t row, float* grad, Chunk& chunk) {
  const int64_t d = table.width;
  const TableKernels& kernel = table_kernels();
  float* x = static_cast<float*>(table.rows) + row * d;
  auto* narrow = static_cast<uint16_t*>(table.rows) + row * d;
  if (table.bf16) {
    x = chunk.row.reserve(d);
    kernels().widen(Format::kBF16, narrow, d, x);
  }
  if (table.norm) {
    kernel.normalise_backward(x, d, *table.norm, grad, chunk.tile_weight.data(), chunk.tile_bias.data());
  }
  const bool by_row = step.optimizer.kind == Optimizer::Kind::kRowwiseAdagrad;
  float* first = table.first ? table.first + row * (by_row ? 1 : d) : nullptr;
  kernel.step(step.optimizer, d, grad, x, first, table.second ? table.second + row * d : nullptr);
  if (table.bf16) kernel.round_at_random(x, d, row_key(step.key, row), narrow);
}

void step_tile(const ItemTable& table, const TableStep& step, int64_t index, Chunk& chunk) {
  const int64_t d = table.width, begin = index * kTile, end = std::min(table.count, begin + kTile);
  const int64_t* last = step.items + step.entries;
  const int64_t* first = std::lower_bound(step.items, last, begin);
  last = std::lower_bound(first, last, end);
  if (step.only_touched && first == last) return;
  float* grads = chunk.grads.reserve(kTile * d);
  std::fill(grads, grads + (end - begin) * d, 0.0f);
  for (size_t i = 0; i < step.losses.size(); ++i) step.losses[i]->add_tile_gradient(index, grads, chunk.losses[i]);
  bool touched[kTile] = {};
  for (const int64_t* item = first; item != last; ++item) {
    touched[*item - begin] = true;
    loss_kernels().add_scaled(1.0f, step.grads + (item - step.items) * d, d, grads + (*item - begin) * d);
  }
  std::fill(chunk.tile_weight.begin(), chunk.tile_weight.end(), 0.0f);
  std::fill(chunk.tile_bias.begin(), chunk.tile_bias.end(), 0.0f);
  for (int64_t i = 0; i < end - begin; ++i) {
    if (!step.only_touched || touched[i]) step_row(table, step, begin + i, grads + i * d, chunk);
  }
  for (size_t c = 0; c < chunk.weight.size(); ++c) {
    chunk.weight[c] += chunk.tile_weight[c];
    chunk.bias[c] += chunk.tile_bias[c];
  }
}

}  // namespace

void step_table(const ItemTable& table, const TableStep& step, float* weight_grad, float* bias_grad) {
  const int64_t tiles = (table.count + kTile - 1) / kTile, chunks = std::min(tiles, kChunks);
  const int64_t normed = table.norm ? table.width : 0;
  std::vector<Chunk> all(chunks);
  for_each(chunks, [&](int64_t c) {
    Chunk chunk;
    chunk.losses.resize(step.losses.size());
    chunk.tile_weight.resize(normed);
    chunk.tile_bias.resize(normed);
    chunk.weight.resize(normed);
    chunk.bias.resize(normed);
    for (int64_t t = part(tiles, c, chunks); t < part(tiles, c + 1, chunks); ++t) step_tile(table, step, t, chunk);
    all[c].weight = std::move(chunk.weight);  // the scratch is given back
    all[c].bias = std::move(chunk.bias);
  });
  for (int64_t i = 0; i < normed; ++i) {
    double weight = 0, bias = 0;
    for (const Chunk& chunk : all) {
      weight += chunk.weight[i];
      bias += chunk.bias[i];
    }
    weight_grad[i] = static_cast<float>(weight);
    bias_grad[i] = static_cast<float>(bias);
  }
}

}  // namespace alterrec
