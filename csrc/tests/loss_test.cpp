// Both forms of the losses against plain sums in double; what the sanitizers run.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cpu/dense_loss.h"
#include "cpu/gathered_loss.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/shared_negatives.h"

namespace {

using namespace alterrec;

constexpr int64_t kPositives = 2;
constexpr double kBeta = 0.5, kTemperature = 0.5;

#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

// A problem with values that 16-bit formats hold exactly, and how often each item is a negative of each row.
struct Case {
  int64_t rows, items, width;
  Format format;  // of the catalog, and the precision
  std::vector<float> query, catalog, bias, grad;
  std::vector<uint16_t> catalog16;
  std::vector<int64_t> target, positives;
  std::vector<int> counts;  // (rows, items)
  LossProblem problem;

  Case(int64_t rows_, int64_t items_, int64_t width_, Format format_)
      : rows(rows_), items(items_), width(width_), format(format_), counts(rows_ * items_) {
    std::mt19937 generator(static_cast<unsigned>(rows * items + width));
    const auto fill = [&](std::vector<float>& x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) x.push_back((static_cast<int>(generator() % 17) - 8) / 16.0f);
    };
    const auto draw = [&](std::vector<int64_t>& x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) x.push_back(static_cast<int64_t>(generator() % items));
    };
    fill(query, rows * width);
    fill(catalog, items * width);
    fill(bias, items);
    fill(grad, rows);
    draw(target, rows);
    draw(positives, rows * kPositives);
    target[0] = -100;
    positives[kPositives] = -1;
    const auto is_positive = [&](int64_t item) {
      return std::count(target.begin(), target.end(), item) + std::count(positives.begin(), positives.end(), item) > 0;
    };
    for (int64_t i = 5; i < items; i += 13) {
      if (!is_positive(i)) bias[i] = -std::numeric_limits<float>::infinity();
    }
    std::fill_n(query.begin(), width, 0.0f);  // the target of row 0 is ignored
    for (int& count : counts) count = generator() % 3 == 0;
    std::fill(counts.begin() + items * (rows - 1), counts.end(), 0);  // a row without negatives
    catalog16.resize(catalog.size());
    const bool wide = format == Format::kF32;
    if (!wide) kernels().narrow(format, catalog.data(), static_cast<int64_t>(catalog.size()), catalog16.data());
    const void* rows_of_items = wide ? static_cast<const void*>(catalog.data()) : catalog16.data();
    problem = {{query.data(), Format::kF32, rows, width, width},
               {rows_of_items, format, items, width, width},
               format,
               target.data(),
               {nullptr, positives.data()},
               kPositives,
               bias.data(),
               nullptr,
               kBeta,
               static_cast<float>(kTemperature),
               0,
               -100,
               true};
  }
  Case(const Case&) = delete;  // the problem points into it
};

struct Outputs {
  std::vector<float> losses, lse, query, catalog, bias;

  explicit Outputs(const Case& c)
      : losses(c.rows), lse(c.rows), query(c.rows * c.width), catalog(c.items * c.width), bias(c.items) {}
  Gradients gradients() { return {query.data(), catalog.data(), bias.data(), Format::kF32, Format::kF32}; }
};

void compare(const Case& c, const Outputs& out) {
  std::vector<double> losses(c.rows), query(c.rows * c.width), catalog(c.items * c.width), bias(c.items);
  std::vector<double> y(c.items), dlogit(c.items);
  for (int64_t b = 0; b < c.rows; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < c.items; ++i) {
      y[i] = c.bias[i];
      for (int64_t k = 0; k < c.width; ++k) y[i] += c.query[b * c.width + k] * c.catalog[i * c.width + k];
      y[i] /= kTemperature;
      if (i != c.target[b]) sum += c.counts[b * c.items + i] * std::exp(y[i]);
    }
    if (c.target[b] < 0 || sum == 0) continue;
    std::fill(dlogit.begin(), dlogit.end(), 0.0);
    double weight = 0;
    for (int64_t p = 0; p <= kPositives; ++p) {
      const int64_t item = p == 0 ? c.target[b] : c.positives[b * kPositives + p - 1];
      if (item < 0) continue;
      const double beta = p == 0 ? 1 : kBeta, ratio = sum / std::exp(y[item]);
      losses[b] += beta * std::log1p(ratio);
      weight += beta * ratio / (1 + ratio);
      dlogit[item] -= beta * ratio / (1 + ratio);
    }
    for (int64_t i = 0; i < c.items; ++i) {
      if (i != c.target[b]) dlogit[i] += weight * c.counts[b * c.items + i] * std::exp(y[i]) / sum;
      const double d = dlogit[i] * c.grad[b] / kTemperature;
      bias[i] += d;
      for (int64_t k = 0; k < c.width; ++k) {
        query[b * c.width + k] += d * c.catalog[i * c.width + k];
        catalog[i * c.width + k] += d * c.query[b * c.width + k];
      }
    }
  }
  const double allowed = c.format == Format::kBF16 ? 2e-2 : 1e-4;
  const auto near = [&](const std::vector<float>& got, const std::vector<double>& expected) {
    for (size_t i = 0; i < got.size(); ++i)
      EXPECT(std::abs(got[i] - expected[i]) <= allowed * (1 + std::abs(expected[i])));
  };
  near(out.losses, losses);
  near(out.query, query);
  near(out.catalog, catalog);
  near(out.bias, bias);
}

void run_dense(const Case& c, const Columns& columns, const Members& members, int64_t keep, bool by_item) {
  Outputs out(c);
  DenseLoss loss(c.problem, columns, members);
  std::vector<uint8_t> saved(std::min(keep, c.rows * ((c.items + 511) / 512) * 513 * 4));
  const auto size = static_cast<int64_t>(saved.size());
  loss.forward(saved.data(), size, out.losses.data(), out.lse.data());
  loss.backward(c.grad.data(), out.lse.data(), saved.data(), size, out.gradients(), by_item);
  compare(c, out);
}

void check(const Case& c, int64_t keep) {
  const ItemColumns all(c.problem);

  const int64_t words = (c.items + 63) / 64;
  std::vector<uint64_t> bits(c.rows * words);
  std::vector<int32_t> ids(c.rows * c.items, -1);
  for (int64_t b = 0; b < c.rows; ++b) {
    int32_t* next = ids.data() + b * c.items;
    for (int64_t i = 0; i < c.items; ++i) {
      if (c.counts[b * c.items + i] == 0) continue;
      bits[b * words + i / 64] |= uint64_t{1} << i % 64;
      *next++ = static_cast<int32_t>(i);
    }
  }
  Members as_bits;
  as_bits.form = Members::Form::kBits;
  as_bits.bits = reinterpret_cast<const uint8_t*>(bits.data());
  as_bits.bits_stride = words * 8;
  run_dense(c, all.columns, as_bits, keep, false);
  Members as_ids;
  as_ids.form = Members::Form::kIds;
  as_ids.ids = ids.data();
  as_ids.ids_width = c.items;
  run_dense(c, all.columns, as_ids, keep, false);

  Negatives negatives;
  negatives.ids.narrow = ids.data();
  negatives.count = c.items;
  GatheredLoss gathered(c.problem, negatives);
  std::vector<uint8_t> saved(gathered.saved_bytes());
  Outputs out(c);
  gathered.forward(saved.data(), out.losses.data(), out.lse.data());
  gathered.backward(c.grad.data(), out.lse.data(), saved.data(), nullptr, out.gradients());
  compare(c, out);
  Outputs sparse(c);
  const std::vector<int64_t> touched = gathered.touched();
  GatheredLoss again(c.problem, negatives);
  again.backward(c.grad.data(), out.lse.data(), saved.data(), &touched, sparse.gradients());
  for (size_t i = 0; i < touched.size(); ++i) EXPECT(sparse.bias[i] == out.bias[touched[i]]);
}

void check_all_and_shared(Case& c, int64_t keep) {
  std::fill(c.counts.begin(), c.counts.end(), 1);
  run_dense(c, ItemColumns(c.problem).columns, {}, keep, false);

  std::vector<int64_t> drawn;
  std::fill(c.counts.begin(), c.counts.end(), 0);
  for (int64_t i = 0; i < c.items; i += 3) {
    for (int64_t repeat = 0; repeat <= i % 2; ++repeat) drawn.push_back(i);
    for (int64_t b = 0; b < c.rows; ++b) c.counts[b * c.items + i] = 1 + static_cast<int>(i % 2);
  }
  drawn.push_back(-1);
  Negatives negatives;
  negatives.ids.wide = drawn.data();
  negatives.count = static_cast<int64_t>(drawn.size());
  const SharedNegatives shared(c.problem, negatives);
  run_dense(c, shared.columns(), shared.members(), keep, true);
}

}  // namespace

int main() {
  for (const Format format : {Format::kF32, Format::kBF16, Format::kF16}) {
    for (const auto& [rows, items, width] :
         {std::array<int64_t, 3>{3, 70, 5}, {9, 1100, 33}, {40, 600, 16}, {530, 40, 2}}) {
      for (const int64_t keep : {int64_t{0}, rows * 2100, int64_t{1} << 30}) {
        Case c(rows, items, width, format);
        check(c, keep);
        Case again(rows, items, width, format);
        check_all_and_shared(again, keep);
      }
    }
  }
  std::printf("losses: %s\n", isa_name(isa()));
}
