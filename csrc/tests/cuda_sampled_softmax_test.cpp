// The CUDA kernels of sampled_softmax, run on the CPU, against plain sums in double.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/gather.cuh"

namespace {

using alterrec::Format;
using namespace alterrec::cuda;

constexpr double kBeta = 0.5, kTemperature = 0.5;

#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

struct Shape {
  int64_t rows, items;
  int width, stride;
  int64_t count;
  int positives;
  bool shared;
};

// Random values, rounded to the format that is multiplied; every buffer is as long as it must be, and no
// longer, so that AddressSanitizer sees what lies beyond it.
struct Case {
  Shape shape;
  Kind kind;
  bool wide;
  std::vector<float> query, catalog, bias, log_q, grad;
  float temperature = static_cast<float>(kTemperature);
  std::vector<__nv_bfloat16> catalog_bf16;
  std::vector<__half> catalog_f16;
  std::vector<int64_t> target, positives, negatives;
  std::vector<int32_t> narrow;
  SampledSoftmax problem;

  Case(const Shape& s, Kind kind_, bool wide_) : shape(s), kind(kind_), wide(wide_) {
    std::mt19937 generator(static_cast<unsigned>(s.rows * s.items + s.width));
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int64_t n) {
      x.reserve(n);
      for (int64_t i = 0; i < n; ++i) x.push_back(normal(generator) / std::sqrt(static_cast<float>(s.width)));
    };
    const auto draw = [&](std::vector<int64_t>& x, int64_t n) {
      x.reserve(n);
      // Few items are drawn often, so that sums of one row go over several runs.
      for (int64_t i = 0; i < n; ++i) {
        const auto item = static_cast<int64_t>(generator() % s.items);
        x.push_back(generator() % 2 ? item : item % 3);
      }
    };
    fill(query, s.rows * s.width);
    fill(catalog, (s.items - 1) * s.stride + s.width);
    fill(bias, s.items);
    fill(log_q, s.items);
    fill(grad, s.rows);
    draw(target, s.rows);
    draw(positives, s.rows * s.positives);
    draw(negatives, s.shared ? s.count : s.rows * s.count);
    if (s.rows > 1) target[1] = -100;
    if (s.positives > 0) positives[0] = -1;
    if (s.positives > 1) positives[1] = target[0];
    if (s.count > 0) negatives[0] = -1;
    if (s.count > 1) negatives[1] = target[0];
    if (s.rows > 2 && !s.shared) std::fill_n(negatives.begin() + 2 * s.count, s.count, target[2]);  // no negatives left
    narrow.assign(negatives.begin(), negatives.end());
    const bool bf16 = kind == Kind::kBFloat16 || kind == Kind::kRoundedToBFloat16;
    const auto round = [&](std::vector<float>& x) {
      for (float& value : x) {
        value = kind == Kind::kFloat ? value
                : bf16               ? to_float(from_float<__nv_bfloat16>(value))
                                     : to_float(from_float<__half>(value));
      }
    };
    round(query);
    round(catalog);
    catalog_bf16.reserve(catalog.size());
    catalog_f16.reserve(catalog.size());
    for (const float x : catalog) catalog_bf16.push_back(from_float<__nv_bfloat16>(x));
    for (const float x : catalog) catalog_f16.push_back(from_float<__half>(x));
    const void* rows = kind == Kind::kBFloat16 ? static_cast<const void*>(catalog_bf16.data())
                       : kind == Kind::kHalf   ? static_cast<const void*>(catalog_f16.data())
                                               : catalog.data();
    const int piece = rows == catalog.data() ? 4 : 8;
    problem = {query.data(),
               rows,
               s.stride,
               kind,
               s.stride % piece == 0,
               s.rows,
               s.items,
               s.width,
               target.data(),
               positives.data(),
               s.positives,
               wide ? static_cast<const void*>(negatives.data()) : narrow.data(),
               wide,
               s.shared,
               s.count,
               bias.data(),
               log_q.data(),
               static_cast<float>(kBeta),
               static_cast<float>(kTemperature),
               nullptr,
               -100};
    if (wide) {  // the temperature where the kernels must read it
      problem.temperature = 0.0f;
      problem.temperature_at = &temperature;
    }
  }
  Case(const Case&) = delete;  // the problem points into it

  int64_t pos_item(int64_t b, int k) const {
    if (target[b] < 0) return -1;
    return k == 0 ? target[b] : positives[b * shape.positives + k - 1];
  }
  // Where the kernel must round, it gets values that are not rounded, to which the nearest is the one that was.
  void unround() {
    if (kind != Kind::kRoundedToBFloat16 && kind != Kind::kRoundedToHalf) return;
    for (float& x : catalog) x *= 1.0f + std::ldexp(1.0f, kind == Kind::kRoundedToHalf ? -13 : -10);
  }
};

struct Outputs {
  std::vector<double> losses, query, catalog, bias;
  explicit Outputs(const Shape& s)
      : losses(s.rows), query(s.rows * s.width), catalog(s.items * s.width), bias(s.items) {}
};

Outputs plain(const Case& c) {
  const Shape& s = c.shape;
  Outputs out(s);
  std::vector<double> y(s.items), dlogit(s.items);
  for (int64_t b = 0; b < s.rows; ++b) {
    for (int64_t i = 0; i < s.items; ++i) {
      y[i] = c.bias[i];
      for (int k = 0; k < s.width; ++k) y[i] += double{c.query[b * s.width + k]} * c.catalog[i * s.stride + k];
      y[i] = y[i] / kTemperature - c.log_q[i];
    }
    std::vector<int> times(s.items);
    for (int64_t j = 0; j < s.count; ++j) {
      const int64_t id = c.negatives[s.shared ? j : b * s.count + j];
      if (id >= 0 && id != c.target[b]) ++times[id];
    }
    double sum = 0, weight = 0;
    for (int64_t i = 0; i < s.items; ++i) sum += times[i] * std::exp(y[i]);
    if (c.target[b] < 0 || sum == 0) continue;
    std::fill(dlogit.begin(), dlogit.end(), 0.0);
    for (int k = 0; k <= s.positives; ++k) {
      const int64_t item = c.pos_item(b, k);
      if (item < 0) continue;
      const double beta = k == 0 ? 1 : kBeta, ratio = sum / std::exp(y[item]);
      out.losses[b] += beta * std::log1p(ratio);
      weight += beta * ratio / (1 + ratio);
      dlogit[item] -= beta * ratio / (1 + ratio);
    }
    for (int64_t i = 0; i < s.items; ++i) {
      const double d = (dlogit[i] + weight * times[i] * std::exp(y[i]) / sum) * c.grad[b] / kTemperature;
      out.bias[i] += d;
      for (int k = 0; k < s.width; ++k) {
        out.query[b * s.width + k] += d * c.catalog[i * s.stride + k];
        out.catalog[i * s.width + k] += d * c.query[b * s.width + k];
      }
    }
  }
  return out;
}

void expect_near(const std::vector<float>& got, const std::vector<double>& expected, double allowed) {
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT(std::abs(got[i] - expected[i]) <= allowed * (1 + std::abs(expected[i])));
  }
}

// The entries of segment_gradients(), sorted as the binding does with torch.
struct Entries {
  std::vector<int32_t> rows;
  std::vector<int64_t> order;

  explicit Entries(const Case& c) {
    const Shape& s = c.shape;
    std::vector<int64_t> keys;
    for (int64_t b = 0; b < s.rows; ++b) {
      for (int k = 0; k <= s.positives; ++k) keys.push_back(c.pos_item(b, k));
    }
    keys.insert(keys.end(), c.negatives.begin(), c.negatives.end());
    for (int64_t& key : keys) key = key < 0 ? s.items : key;
    order.resize(keys.size());
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
    for (const int64_t at : order) rows.push_back(static_cast<int32_t>(keys[at]));
  }
};

void check(Case& c) {
  const Shape& s = c.shape;
  const Outputs truth = plain(c);
  c.unround();
  const int64_t width = 1 + s.positives;
  std::vector<float> logits(s.rows * s.count), pos_logits(s.rows * width), losses(s.rows), lse(s.rows);
  uint64_t fault = kNoFault;
  forward(c.problem, {nullptr, nullptr, losses.data(), lse.data(), nullptr}, nullptr);
  expect_near(losses, truth.losses, 1e-4);
  forward(c.problem, {logits.data(), pos_logits.data(), losses.data(), lse.data(), &fault}, nullptr);
  expect_near(losses, truth.losses, 1e-4);
  EXPECT(fault == kNoFault);

  std::vector<float> weights(s.rows), pos_dlogits(s.rows * width), query(s.rows * s.width);
  const DLogits x{logits.data(), pos_logits.data(), lse.data(), c.grad.data(), weights.data(), pos_dlogits.data()};
  dlogits(c.problem, x, nullptr);
  query_gradient(c.problem, x, query.data(), nullptr);
  expect_near(query, truth.query, 1e-4);

  std::vector<float> shared_rows(s.shared ? s.count * s.width : 0), totals(s.shared ? s.count : 0);
  if (s.shared) shared_gradient(c.problem, x, {shared_rows.data(), totals.data()}, nullptr);
  const Entries entries(c);
  const Sorted sorted{entries.rows.data(), entries.order.data(), static_cast<int64_t>(entries.order.size()),
                      static_cast<int32_t>(s.items)};
  std::vector<float> scratch(segment_scratch(sorted.count, s.width)), catalog(s.items * s.width), bias(s.items);
  const auto segments = [&](const RowGradients& out) {
    segment_gradients(c.problem, x, {s.shared ? shared_rows.data() : nullptr, totals.data()}, sorted, scratch.data(),
                      out, nullptr);
  };
  segments({catalog.data(), Format::kF32, bias.data()});
  expect_near(catalog, truth.catalog, 1e-4);
  expect_near(bias, truth.bias, 1e-4);
  const auto expect_rounded = [&]<class Element>(Element zero, Format format, double allowed) {
    std::vector<Element> rounded(s.items * s.width, zero);
    segments({rounded.data(), format, nullptr});
    std::vector<float> widened;
    for (const Element value : rounded) widened.push_back(to_float(value));
    expect_near(widened, truth.catalog, allowed);
  };
  expect_rounded(from_float<__nv_bfloat16>(0.0f), Format::kBF16, 5e-3);
  expect_rounded(from_float<__half>(0.0f), Format::kF16, 7e-4);
  if (s.shared) return;
  std::fill(catalog.begin(), catalog.end(), 0.0f);
  std::fill(bias.begin(), bias.end(), 0.0f);
  scatter_gradients(c.problem, x, catalog.data(), bias.data(), nullptr);
  expect_near(catalog, truth.catalog, 1e-4);
  expect_near(bias, truth.bias, 1e-4);
}

// A score that is not finite and an id beyond the catalog make their rows NaN, and no other.
void check_bad_values() {
  Case c({5, 40, 12, 12, 9, 2, false}, Kind::kFloat, true);
  c.query[3 * 12] = std::numeric_limits<float>::infinity();
  c.negatives[4 * 9 + 5] = 40;
  std::vector<float> losses(5), lse(5);
  uint64_t fault = kNoFault;
  forward(c.problem, {nullptr, nullptr, losses.data(), lse.data(), &fault}, nullptr);
  EXPECT(fault >> 32 == 3);
  EXPECT(!std::isnan(losses[0]) && losses[1] == 0 && losses[2] == 0 && std::isnan(losses[3]) && std::isnan(losses[4]));
}

}  // namespace

// Any argument makes it short, for builds in which every thread costs.
int main(int count, char**) {
  const std::vector<Shape> small = {{5, 50, 20, 24, 70, 2, false}, {6, 50, 20, 24, 70, 2, true}};
  std::vector<Shape> shapes = {{3, 7, 1, 1, 5, 0, false},       {4, 300, 33, 33, 700, 2, false},
                               {7, 90, 128, 128, 300, 1, true}, {2, 30, 1024, 1032, 20, 5, false},
                               {5, 30, 1100, 1104, 9, 0, true}, {2, 9, 2100, 2100, 40, 1, true},
                               {9, 60, 8, 8, 0, 1, false}};
  if (count > 1) shapes.clear();
  shapes.insert(shapes.begin(), small.begin(), small.end());
  for (const Kind kind : {Kind::kFloat, Kind::kBFloat16, Kind::kHalf, Kind::kRoundedToBFloat16, Kind::kRoundedToHalf}) {
    for (const Shape& shape : shapes) {
      Case c(shape, kind, shape.rows % 2 == 0);
      check(c);
    }
  }
  if (count == 1) check_bad_values();
  std::printf("cuda sampled_softmax: as plain sums\n");
}
