// The ranking engine against a full sort, on integers, where every product is exact; what the sanitizers run.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/isa.h"
#include "cpu/rank_slice.h"

namespace {

using namespace alterrec;

std::vector<float> integers(int64_t count, int seed) {
  std::mt19937 generator(seed);
  std::vector<float> out(count);
  for (float& x : out) x = static_cast<float>(static_cast<int>(generator() % 7) - 3);
  return out;
}

std::vector<uint16_t> narrow(Format to, const std::vector<float>& x) {
  std::vector<uint16_t> out(x.size());
  kernels().narrow(to, x.data(), static_cast<int64_t>(x.size()), out.data());
  return out;
}

#define EXPECT(condition)                                                 \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (false)

struct Shape {
  int64_t rows, items, width;
};

void check(const Shape& shape, int64_t start, int64_t stop, int64_t top, int64_t first, Format precision, bool stored,
           bool with_bias) {
  const auto [rows, items, width] = shape;
  const std::vector<float> query = integers(rows * width, 1), catalog = integers(items * width, 2);
  std::vector<float> bias = integers(items, 3);
  for (int64_t item = 3; item < items; item += 11) bias[item] = -std::numeric_limits<float>::infinity();
  const Format narrowed = precision == Format::kF32 ? Format::kBF16 : precision;
  const std::vector<uint16_t> query16 = narrow(narrowed, query), catalog16 = narrow(narrowed, catalog);
  const int64_t words = (items + kWord - 1) / kWord;
  std::vector<uint64_t> bits(rows * words, ~uint64_t{0});
  RankProblem problem{};
  const auto matrix = [&](const auto& wide, const auto& narrow, int64_t count) {
    return stored ? Matrix{narrow.data(), narrowed, count, width, width}
                  : Matrix{wide.data(), Format::kF32, count, width, width};
  };
  problem.query = matrix(query, query16, rows);
  problem.catalog = matrix(catalog, catalog16, items);
  problem.precision = precision;
  problem.bias = with_bias ? bias.data() : nullptr;
  problem.first_item = first;
  problem.ranked = count_ranked(problem.bias, first, items);
  problem.start = start = std::min(start, problem.ranked);
  problem.stop = stop = std::min(stop, problem.ranked);
  problem.top = top = std::min(top, problem.ranked);
  problem.check = true;
  problem.bits = top % 2 == 0 ? bits.data() : nullptr;  // else the engine's own scratch
  std::vector<int> received(rows, 0);
  const NotFinite bad = rank(problem, [&](int64_t row, uint64_t* members, const RowRanks& selected) {
    ++received[row];
    std::vector<uint64_t> keys;
    for (int64_t item = first; item < items; ++item) {
      float score = with_bias ? bias[item] : 0.0f;
      if (std::isinf(score)) continue;
      for (int64_t i = 0; i < width; ++i) score += query[row * width + i] * catalog[item * width + i];
      keys.push_back(make_key(score, static_cast<int32_t>(item)));
    }
    std::sort(keys.begin(), keys.end(), std::greater<>());
    if (problem.ranked > 0)
      EXPECT(std::equal(selected.best.begin(), selected.best.end(), keys.begin(), keys.begin() + top));
    if (start == stop) return;
    EXPECT(selected.first.score == from_key(keys[start]).score && selected.first.id == from_key(keys[start]).id);
    EXPECT(selected.last.score == from_key(keys[stop - 1]).score && selected.last.id == from_key(keys[stop - 1]).id);
    std::vector<uint64_t> expected(words, 0);
    for (int64_t r = start; r < stop; ++r) {
      const int32_t item = from_key(keys[r]).id;
      expected[item / kWord] |= uint64_t{1} << (item % kWord);
    }
    EXPECT(std::equal(expected.begin(), expected.end(), members));
  });
  EXPECT(bad.row < 0);
  EXPECT(std::all_of(received.begin(), received.end(), [](int times) { return times == 1; }));
}

void check_not_finite(int64_t items) {
  std::vector<float> query = integers(3 * 4, 1), catalog = integers(items * 4, 2);
  query[4] = std::numeric_limits<float>::quiet_NaN();
  RankProblem problem{};
  problem.query = {query.data(), Format::kF32, 3, 4, 4};
  problem.catalog = {catalog.data(), Format::kF32, items, 4, 4};
  problem.ranked = items;
  problem.stop = items / 2;
  problem.check = true;
  EXPECT(rank(problem, [](int64_t, uint64_t*, const RowRanks&) {}).row == 1);
  bool caught = false;
  query[4] = 1.0f;
  try {
    rank(problem, [](int64_t row, uint64_t*, const RowRanks&) {
      if (row == 2) throw std::runtime_error("from the caller");
    });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  EXPECT(caught);
}

}  // namespace

int main() {
  for (const Shape& shape :
       {Shape{3, 1, 1}, Shape{5, 700, 9}, Shape{130, 257, 3}, Shape{4, 9'000, 3}, Shape{2, 8'500, 0}}) {
    for (const Fallback fallback : {Fallback::kAsNeeded, Fallback::kMissed, Fallback::kOverflow}) {
      force_fallback(fallback);
      for (const Format precision : {Format::kF32, Format::kBF16, Format::kF16}) {
        for (const int64_t first : {int64_t{0}, std::min<int64_t>(77, shape.items - 1)}) {
          const int64_t n = shape.items - first;
          for (const bool option : {false, true}) {
            check(shape, 0, n, std::min<int64_t>(n, 3), first, precision, option, !option);
            check(shape, n / 3, n / 2, std::min<int64_t>(n, 4), first, precision, !option, option);
            check(shape, std::min<int64_t>(n, 20), std::max(n / 2, std::min<int64_t>(n, 20)), 0, first, precision,
                  option, option);
            check(shape, n, n, n, first, precision, option, option);
          }
        }
      }
    }
  }
  force_fallback(Fallback::kAsNeeded);
  check_not_finite(600);
  check_not_finite(9'000);
  std::printf("ranks: right with %s\n", isa_name(isa()));
  return 0;
}
