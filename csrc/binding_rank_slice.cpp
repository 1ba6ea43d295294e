// rank_slice and top_k on CPU tensors, for the schemas that Python defines.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/rank_slice.h"

namespace alterrec {
namespace {

using at::Tensor;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The excluded ids of each row, checked.
struct Exclude {
  Tensor values, offsets;

  Exclude(const Tensor& values_, const Tensor& offsets_, int64_t rows, int64_t items, bool check)
      : values(values_.contiguous()), offsets(offsets_.contiguous()) {
    TORCH_CHECK_TYPE(values.scalar_type() == at::kLong && offsets.scalar_type() == at::kLong,
                     "exclude must be int64, got ", values.scalar_type(), " and ", offsets.scalar_type());
    check_sizes("exclude offsets", offsets, rows + 1);
    const int64_t *v = begin(), *o = bounds(), size = values.numel();
    TORCH_CHECK_VALUE(o[0] == 0 && o[rows] == size && std::is_sorted(o, o + rows + 1),
                      "exclude: offsets must rise from 0 to the ", size, " values, got ", offsets);
    for (int64_t row = 0; row < rows && check; ++row) {
      const int64_t* bad = std::find_if(v + o[row], v + o[row + 1], [&](int64_t id) { return id >= items; });
      TORCH_CHECK_VALUE(bad == v + o[row + 1], "exclude: row ", row, " holds ", *bad, ", expected an id below ", items);
    }
  }

  const int64_t* begin() const { return values.const_data_ptr<int64_t>(); }
  const int64_t* bounds() const { return offsets.const_data_ptr<int64_t>(); }
};

// What both ops are given, checked.
struct Inputs {
  const Tensor &query, &catalog;
  const std::optional<Tensor>& bias;
  int64_t first_item;
  c10::string_view precision;
  bool check;
  const std::optional<Tensor>&norm_weight, &norm_bias;
  double norm_eps;
};

// A problem together with the tensors that it points into. Ranks are asked for by its users.
struct Arguments {
  Tensor query, catalog, bias;
  Norm norm;
  RankProblem problem{};

  explicit Arguments(const Inputs& in) : norm(in.norm_weight, in.norm_bias, in.norm_eps, in.query.size(-1)) {
    TORCH_CHECK_VALUE(in.catalog.dim() == 2, "catalog must be (V, d), got ", in.catalog.sizes());
    catalog = matrix_of("catalog", in.catalog, in.catalog.size(1));
    query = matrix_of("query", in.query, in.catalog.size(1));
    const int64_t items = catalog.size(0);
    TORCH_CHECK_VALUE(items <= std::numeric_limits<int32_t>::max() - kScanTile,
                      "catalog must hold fewer than 2^31 items, got ", items);
    TORCH_CHECK_VALUE(in.first_item >= 0 && in.first_item <= items, "first_item must lie in [0, ", items, "], got ",
                      in.first_item);
    if (in.bias.has_value()) bias = floats_of("bias", *in.bias, items);
    problem.query = matrix(query);
    problem.catalog = matrix(catalog);
    problem.catalog.norm = norm.get();
    problem.precision = precision_of(in.precision, query, catalog);
    problem.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
    problem.first_item = in.first_item;
    problem.ranked = count_ranked(problem.bias, in.first_item, items);
    problem.check = in.check;
  }
  Arguments(const Arguments&) = delete;

  Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::empty(sizes, at::TensorOptions().dtype(dtype));
  }

  void run(const Receive& receive) const {
    const NotFinite bad = rank(problem, receive);
    TORCH_CHECK_VALUE(bad.row < 0, "scores: row ", bad.row, " has a score of ", bad.score, ", expected a finite one");
  }
};

void check_rank(const char* name, int64_t first, int64_t last, int64_t items) {
  TORCH_CHECK_VALUE(0 <= first && first <= last && last <= items, name, ": expected ranks in [0, ", items, "], got ",
                    first, " to ", last);
}

void clear_bits(uint64_t* bits, const int64_t* ids, const int64_t* end, int64_t items) {
  for (; ids < end; ++ids) {
    if (*ids >= 0 && *ids < items) bits[*ids / kWord] &= ~(uint64_t{1} << (*ids % kWord));
  }
}

// The items whose bits are set, ascending, with -1 behind them: `size` numbers.
void write_ids(const uint64_t* bits, int64_t words, int32_t* out, int64_t size) {
  int32_t* const end = out + size;
  for (int64_t w = 0; w < words; ++w) {
    for (uint64_t left = bits[w]; left != 0; left &= left - 1) {
      *out++ = static_cast<int32_t>(w * kWord + __builtin_ctzll(left));
    }
  }
  std::fill(out, end, -1);
}

// Ranks count the items whose bias is not -inf; a rank beyond them stays empty: no bit, an id of -1, a score of -inf.
std::tuple<Tensor, Tensor, Tensor> rank_slice(const Tensor& query, const Tensor& catalog, int64_t start, int64_t stop,
                                              int64_t top, const Tensor& exclude_values, const Tensor& exclude_offsets,
                                              const std::optional<Tensor>& bias, int64_t first_item,
                                              c10::string_view precision, bool check,
                                              const std::optional<Tensor>& norm_weight,
                                              const std::optional<Tensor>& norm_bias, double norm_eps) {
  Arguments arguments({query, catalog, bias, first_item, precision, check, norm_weight, norm_bias, norm_eps});
  RankProblem& problem = arguments.problem;
  const int64_t rows = query.size(0), items = catalog.size(0), size = stop - start;
  check_rank("start, stop", start, stop, items - first_item);
  check_rank("top", 0, top, items - first_item);
  const Exclude exclude(exclude_values, exclude_offsets, rows, items, check);
  problem.start = std::min(start, problem.ranked);
  problem.stop = std::min(stop, problem.ranked);
  problem.top = std::min(top, problem.ranked);
  const bool empty = problem.start == problem.stop;

  const int64_t words = (items + kWord - 1) / kWord;
  const bool as_bits = words * 8 <= 4 * size;  // as uses_bits in ops/slices.py
  Tensor members = arguments.empty({rows, as_bits ? words * 8 : size}, as_bits ? at::kByte : at::kInt);
  Tensor best = arguments.empty({rows, top}, at::kLong);
  Tensor thresholds = arguments.empty({rows, 2}, at::kFloat);
  if (empty) members.fill_(as_bits ? 0 : -1);
  problem.bits = as_bits && !empty ? reinterpret_cast<uint64_t*>(members.mutable_data_ptr<uint8_t>()) : nullptr;
  int32_t* ids = as_bits ? nullptr : members.mutable_data_ptr<int32_t>();
  int64_t* best_items = best.mutable_data_ptr<int64_t>();
  float* limits = thresholds.mutable_data_ptr<float>();

  arguments.run([&](int64_t row, uint64_t* bits, const RowRanks& selected) {
    int64_t* next = std::transform(selected.best.begin(), selected.best.end(), best_items + row * top,
                                   [](uint64_t key) { return int64_t{from_key(key).id}; });
    std::fill(next, best_items + (row + 1) * top, int64_t{-1});
    limits[2 * row] = size == 0 ? kInfinity : empty ? -kInfinity : selected.first.score;
    limits[2 * row + 1] = stop > problem.stop || empty ? -kInfinity : selected.last.score;
    if (bits == nullptr) return;
    clear_bits(bits, exclude.begin() + exclude.bounds()[row], exclude.begin() + exclude.bounds()[row + 1], items);
    if (ids != nullptr) write_ids(bits, words, ids + row * size, size);
  });
  return {members, best, thresholds};
}

std::tuple<Tensor, Tensor> top_k(const Tensor& query, const Tensor& catalog, int64_t k, const Tensor& exclude_values,
                                 const Tensor& exclude_offsets, const std::optional<Tensor>& bias, int64_t first_item,
                                 c10::string_view precision, bool check, const std::optional<Tensor>& norm_weight,
                                 const std::optional<Tensor>& norm_bias, double norm_eps) {
  Arguments arguments({query, catalog, bias, first_item, precision, check, norm_weight, norm_bias, norm_eps});
  RankProblem& problem = arguments.problem;
  const int64_t rows = query.size(0), items = catalog.size(0);
  check_rank("k", 0, k, items - first_item);
  const Exclude exclude(exclude_values, exclude_offsets, rows, items, check);
  problem.top = std::min(k, problem.ranked);
  problem.extra = exclude.bounds();

  Tensor scores = arguments.empty({rows, k}, at::kFloat);
  Tensor best = arguments.empty({rows, k}, at::kLong);
  float* score = scores.mutable_data_ptr<float>();
  int64_t* item = best.mutable_data_ptr<int64_t>();
  arguments.run([&](int64_t row, uint64_t*, const RowRanks& selected) {
    std::vector<int64_t> excluded(exclude.begin() + exclude.bounds()[row], exclude.begin() + exclude.bounds()[row + 1]);
    std::sort(excluded.begin(), excluded.end());
    int64_t place = row * k;
    const int64_t end = place + k;
    for (auto key = selected.best.begin(); key != selected.best.end() && place < end; ++key) {
      const Item next = from_key(*key);
      if (std::binary_search(excluded.begin(), excluded.end(), int64_t{next.id})) continue;
      score[place] = next.score;
      item[place++] = next.id;
    }
    std::fill(score + place, score + end, -kInfinity);
    std::fill(item + place, item + end, int64_t{-1});
  });
  return {scores, best};
}

}  // namespace
}  // namespace alterrec

TORCH_LIBRARY_IMPL(alterrec_fast, CPU, m) {
  m.impl("native_rank_slice", alterrec::rank_slice);
  m.impl("native_top_k", alterrec::top_k);
}
