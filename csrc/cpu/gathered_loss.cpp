#include "cpu/gathered_loss.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/blas.h"

namespace alterrec {
namespace {

constexpr int64_t kGroup = 64;  // negatives whose rows stay in cache from their logits to their mean
constexpr int64_t kRowsPerTask = 4;
constexpr int64_t kRowsPerChunk = 16;   // of the counting sort
constexpr int64_t kMostRanges = 256;    // of items; each is sorted and summed by one task
constexpr int64_t kMaxPairs = 2 << 20;  // sorted at once, 12 bytes each: what bounds the scratch memory
constexpr float kLowest = -std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

GatheredLoss::GatheredLoss(const LossProblem& problem, const Negatives& negatives)
    : problem_(problem),
      negatives_(negatives),
      rows_(problem.query.rows),
      width_(problem.query.cols),
      kind_(row_kind(problem)),
      query_(float_rows(problem.query, 0, rows_, problem.precision, query_copy_, &query_stride_)),
      positives_(problem, query_, query_stride_) {
  for (int64_t i = 0; i < rows_ * negatives.count; ++i) {
    check_id("neg", i / negatives.count, negatives.at(i), -1, 0, problem.catalog.rows);
  }
}

int64_t GatheredLoss::saved_bytes() const {
  return rows_ * (negatives_.count + width_) * static_cast<int64_t>(sizeof(float));
}

// softmax (n,) of the row's negatives, zero where there is none, and mean (d,) of their rows under it; mean may be
// null.
void GatheredLoss::forward_row(int64_t row, float* softmax, float* mean, float* lse, Fault& fault) const {
  const LossKernels& kernel = loss_kernels();
  const auto dot = kernel.dot_rows[static_cast<int>(kind_)];
  const auto add = kernel.weighted_sum[static_cast<int>(kind_)];
  const auto is_negative = negatives_of(row);
  const int64_t n = negatives_.count;
  std::vector<float> tops(ceil_div(n, kGroup));  // what each group's exponentials are over
  float top = kLowest, sum = 0;
  if (mean) std::fill(mean, mean + width_, 0.0f);
  if (positives_.ignored(row)) {
    if (softmax) std::fill(softmax, softmax + n, 0.0f);
    *lse = kLowest;
    return;
  }
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int64_t count = std::min(kGroup, n - begin);
    alignas(64) float y[kGroup] = {};
    const void* rows[kGroup];
    uint64_t mask = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t id = negatives_.at(row * n + begin + j);
      const bool negative = is_negative(id);
      mask |= uint64_t{negative} << j;
      rows[j] = negative ? problem_.catalog.row(id) : nullptr;
    }
    tops[begin / kGroup] = top;
    if (mask == 0) {
      if (softmax) std::fill_n(softmax + begin, count, 0.0f);
      continue;
    }
    if (__builtin_popcountll(mask) < count) {
      std::replace(rows, rows + count, static_cast<const void*>(nullptr), rows[__builtin_ctzll(mask)]);
    }
    dot(query_ + row * query_stride_, rows, count, width_, y);
    for (int64_t j = 0; j < count; ++j) {
      if (!(mask >> j & 1)) {
        y[j] = 0;
        continue;
      }
      const int64_t id = negatives_.at(row * n + begin + j);
      if (problem_.bias) y[j] += problem_.bias[id];
      y[j] /= problem_.temperature;
      if (problem_.log_q) y[j] -= problem_.log_q[id];
      if (std::isfinite(y[j])) continue;
      fault.note(row, begin + j, y[j]);
      sum = std::numeric_limits<float>::quiet_NaN();  // where nothing is checked, it shall show in the loss
    }
    bool finite = true;
    const float largest = std::max(top, kernel.row_max(y, &mask, 1, &finite));
    if (largest > top) {
      const float shrink = std::exp(top - largest);
      sum *= shrink;
      if (mean) kernel.scale(shrink, mean, width_, mean);
      top = largest;
    }
    sum += kernel.row_exp(y, &mask, 1, top, y);
    if (mean) add(y, rows, count, width_, mean);
    if (softmax) std::copy_n(y, count, softmax + begin);
    tops[begin / kGroup] = top;
  }
  *lse = sum == 0 ? kLowest : static_cast<float>(top + std::log(static_cast<double>(sum)));
  if (sum == 0) return;
  if (mean) kernel.scale(1.0f / sum, mean, width_, mean);
  for (int64_t begin = 0; softmax && begin < n; begin += kGroup) {
    const float factor = std::exp(tops[begin / kGroup] - top) / sum;
    kernel.scale(factor, softmax + begin, std::min(kGroup, n - begin), softmax + begin);
  }
}

void GatheredLoss::forward(uint8_t* saved, float* losses, float* lse) const {
  float* softmax = reinterpret_cast<float*>(saved);
  float* mean = saved ? softmax + rows_ * negatives_.count : nullptr;
  std::vector<Fault> faults(ceil_div(rows_, kRowsPerTask));
  parallel_for(faults.size(), [&](int64_t task) {
    for (int64_t row = task * kRowsPerTask; row < std::min(rows_, (task + 1) * kRowsPerTask); ++row) {
      forward_row(row, saved ? softmax + row * negatives_.count : nullptr, saved ? mean + row * width_ : nullptr,
                  lse + row, faults[task]);
    }
  });
  Fault fault = positives_.fault();
  for (const Fault& other : faults) fault.note(other);
  if (problem_.check) fault.raise();
  positives_.losses(lse, losses);
}

// visit(item, row, dlogit) for all logits of rows [begin, end) with a gradient, in a fixed order.
template <class Visit>
void GatheredLoss::each_pair(int64_t begin, int64_t end, const float* softmax, const Visit& visit) const {
  const int64_t n = negatives_.count;
  for (int64_t row = begin; row < end; ++row) {
    const float weight = positives_.weights()[row];
    if (weight == 0.0f) continue;
    const auto is_negative = negatives_of(row);
    for (int64_t i = row * n; i < (row + 1) * n; ++i) {
      const int64_t id = negatives_.at(i);
      if (is_negative(id)) visit(id, row, weight * softmax[i]);
    }
    for (int64_t k = 0; k < positives_.width(); ++k) {
      if (positives_.dlogit(row, k) != 0.0f) visit(positives_.item(row, k), row, positives_.dlogit(row, k));
    }
  }
}

std::vector<int64_t> GatheredLoss::touched() const {
  std::vector<std::atomic<uint64_t>> bits(ceil_div(problem_.catalog.rows, 64));
  const auto mark = [&](int64_t id) {
    std::atomic<uint64_t>& word = bits[id / 64];
    const uint64_t bit = uint64_t{1} << id % 64;
    if (!(word.load(std::memory_order_relaxed) & bit)) word.fetch_or(bit, std::memory_order_relaxed);
  };
  const int64_t n = negatives_.count;
  parallel_for(ceil_div(rows_, kRowsPerChunk), [&](int64_t chunk) {
    for (int64_t row = chunk * kRowsPerChunk; row < std::min(rows_, (chunk + 1) * kRowsPerChunk); ++row) {
      if (positives_.ignored(row)) continue;
      for (int64_t k = 0; k < positives_.width(); ++k) {
        if (positives_.item(row, k) >= 0) mark(positives_.item(row, k));
      }
      const auto is_negative = negatives_of(row);
      for (int64_t i = row * n; i < (row + 1) * n; ++i) {
        if (is_negative(negatives_.at(i))) mark(negatives_.at(i));
      }
    }
  });
  std::vector<int64_t> out;
  for (size_t w = 0; w < bits.size(); ++w) {
    for (uint64_t word = bits[w].load(std::memory_order_relaxed); word != 0; word &= word - 1) {
      out.push_back(static_cast<int64_t>(w) * 64 + __builtin_ctzll(word));
    }
  }
  return out;
}

// Rows [first, stop) of the catalog's gradient, from the pairs that concern them.
void GatheredLoss::sum_range(int64_t first, int64_t stop, const Pair* pairs, int64_t count,
                             const std::vector<int64_t>* touched, const Gradients& gradients) const {
  std::vector<int32_t> begin(stop - first + 1);  // where each item's pairs begin, once sorted
  for (int64_t i = 0; i < count; ++i) ++begin[pairs[i].item + 1];
  for (int64_t i = 0; i < stop - first; ++i) begin[i + 1] += begin[i];
  std::vector<float> dlogits(count), sum(width_);
  std::vector<const void*> queries(count);
  std::vector<int32_t> place(begin);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t to = place[pairs[i].item]++;
    dlogits[to] = pairs[i].dlogit / problem_.temperature;
    queries[to] = query_ + pairs[i].row * query_stride_;
  }
  int64_t out = first;
  if (touched) out = std::lower_bound(touched->begin(), touched->end(), first) - touched->begin();
  for (int64_t item = first; item < stop; ++item) {
    if (touched && (out == static_cast<int64_t>(touched->size()) || (*touched)[out] != item)) continue;
    const int32_t from = begin[item - first], to = begin[item - first + 1];
    if (gradients.catalog) {
      const bool direct = gradients.catalog_format == Format::kF32;
      float* row = direct ? static_cast<float*>(gradients.catalog) + out * width_ : sum.data();
      std::fill(row, row + width_, 0.0f);
      loss_kernels().weighted_sum[static_cast<int>(Row::kF32)](dlogits.data() + from, queries.data() + from, to - from,
                                                               width_, row);
      if (!direct) write_row(row, out, width_, gradients.catalog_format, gradients.catalog);
    }
    if (gradients.bias) {
      double total = 0;
      for (int32_t i = from; i < to; ++i) total += dlogits[i];
      gradients.bias[out] = static_cast<float>(total);
    }
    ++out;
  }
}

void GatheredLoss::query_gradient(const float* mean, const Gradients& gradients) const {
  parallel_for(ceil_div(rows_, kRowsPerChunk), [&](int64_t chunk) {
    std::vector<float> sum(width_);
    for (int64_t row = chunk * kRowsPerChunk; row < std::min(rows_, (chunk + 1) * kRowsPerChunk); ++row) {
      const float weight = positives_.weights()[row];
      std::fill(sum.begin(), sum.end(), 0.0f);
      if (weight != 0.0f) loss_kernels().add_scaled(weight, mean + row * width_, width_, sum.data());
      positives_.add_to_query_gradient(row, sum.data());
      loss_kernels().scale(1.0f / problem_.temperature, sum.data(), width_, sum.data());
      write_row(sum.data(), row, width_, gradients.query_format, gradients.query);
    }
  });
}

// Pairs (item, row) are sorted by item in two steps, into ranges of items and then within each; both keep the order of
// the rows, so that every sum has one order whatever the number of threads. Where there are more pairs than the scratch
// may hold, the ranges take turns.
void GatheredLoss::backward(const float* grad_losses, const float* lse, const uint8_t* saved,
                            const std::vector<int64_t>* touched, const Gradients& gradients) {
  positives_.differentiate(grad_losses, lse);
  const float* softmax = reinterpret_cast<const float*>(saved);
  if (gradients.query) query_gradient(softmax + rows_ * negatives_.count, gradients);
  if (!gradients.catalog && !gradients.bias) return;

  const int64_t items = problem_.catalog.rows;
  int shift = 0;  // a range is 2^shift items
  while (items >> shift >= kMostRanges) ++shift;
  const int64_t ranges = ceil_div(items, int64_t{1} << shift), chunks = ceil_div(rows_, kRowsPerChunk);
  const auto each_in_chunk = [&](int64_t chunk, const auto& visit) {
    each_pair(chunk * kRowsPerChunk, std::min(rows_, (chunk + 1) * kRowsPerChunk), softmax, visit);
  };
  std::vector<int64_t> place(ranges * chunks);  // how many pairs, then where they go
  parallel_for(chunks, [&](int64_t chunk) {
    std::vector<int64_t> counts(ranges);
    each_in_chunk(chunk, [&](int64_t item, int64_t, float) { ++counts[item >> shift]; });
    for (int64_t range = 0; range < ranges; ++range) place[range * chunks + chunk] = counts[range];
  });
  std::vector<int64_t> range_begin(ranges + 1);
  for (int64_t range = 0; range < ranges; ++range) {
    int64_t next = range_begin[range];
    for (int64_t chunk = 0; chunk < chunks; ++chunk) next += std::exchange(place[range * chunks + chunk], next);
    range_begin[range + 1] = next;
  }

  Buffer<Pair> buffer;
  for (int64_t first = 0, stop; first < ranges; first = stop) {
    stop = first + 1;
    while (stop < ranges && range_begin[stop + 1] - range_begin[first] <= kMaxPairs) ++stop;
    const int64_t base = range_begin[first];
    Pair* pairs = buffer.reserve(range_begin[stop] - base);
    parallel_for(chunks, [&](int64_t chunk) {
      std::vector<int64_t> next(stop - first);
      for (int64_t range = first; range < stop; ++range) next[range - first] = place[range * chunks + chunk] - base;
      each_in_chunk(chunk, [&](int64_t item, int64_t row, float dlogit) {
        const int64_t range = item >> shift;
        if (range < first || range >= stop) return;
        const auto local = static_cast<int32_t>(item - (range << shift));
        pairs[next[range - first]++] = {local, static_cast<int32_t>(row), dlogit};
      });
    });
    parallel_for(stop - first, [&](int64_t i) {
      const int64_t range = first + i;
      sum_range(range << shift, std::min(items, (range + 1) << shift), pairs + range_begin[range] - base,
                range_begin[range + 1] - range_begin[range], touched, gradients);
    });
  }
}

}  // namespace alterrec
