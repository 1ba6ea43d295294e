#include "cpu/shared_negatives.h"

#include <algorithm>
#include <cmath>

namespace alterrec {

SharedNegatives::SharedNegatives(const LossProblem& problem, const Negatives& negatives) {
  const int64_t stop = problem.catalog.rows;
  std::vector<uint64_t> touched((stop + 63) / 64);  // one bit for each item of the catalog
  std::vector<int64_t> drawn;
  const auto touch = [&](int64_t id) {
    if (id >= 0 && id < stop) touched[id / 64] |= uint64_t{1} << id % 64;  // Positives checks targets and positives
  };
  for (int64_t i = 0; i < negatives.count; ++i) {
    const int64_t id = negatives.at(i);
    check_id("neg", i, id, -1, 0, stop);
    if (id < 0 || problem.masked(id)) continue;
    drawn.push_back(id);
    touch(id);
  }
  std::sort(drawn.begin(), drawn.end());
  for (int64_t row = 0; row < problem.query.rows; ++row) {
    if (problem.target[row] == problem.ignore_index) continue;
    touch(problem.target[row]);
    for (int64_t k = 0; k < problem.num_positives; ++k) touch(problem.positives.at(row * problem.num_positives + k));
  }
  for (size_t w = 0; w < touched.size(); ++w) {
    for (uint64_t word = touched[w]; word != 0; word &= word - 1) {
      items_.push_back(static_cast<int64_t>(w) * 64 + __builtin_ctzll(word));
    }
  }

  shift_.assign(items_.size(), 0.0f);
  negative_.assign((items_.size() + 63) / 64, 0);
  auto next = drawn.begin();
  for (size_t c = 0; c < items_.size(); ++c) {
    const auto begin = next;
    while (next != drawn.end() && *next == items_[c]) ++next;
    if (next != begin) {
      negative_[c / 64] |= uint64_t{1} << c % 64;
      shift_[c] = static_cast<float>(std::log(static_cast<double>(next - begin)));
    }
    if (problem.masked(items_[c])) continue;  // its logits are no negative's
    if (problem.bias) shift_[c] += problem.bias[items_[c]] / problem.temperature;
    if (problem.log_q) shift_[c] -= problem.log_q[items_[c]];
  }
}

}  // namespace alterrec
