#include "cpu/shared_negatives.h"

#include <algorithm>
#include <cmath>

namespace alterrec {

SharedNegatives::SharedNegatives(const LossProblem& problem, const Negatives& negatives) {
  const int64_t stop = problem.catalog.rows;
  std::vector<int64_t> drawn;
  for (int64_t i = 0; i < negatives.count; ++i) {
    check_id("neg", i, negatives.at(i), -1, 0, stop);
    if (negatives.at(i) >= 0) drawn.push_back(negatives.at(i));
  }
  std::sort(drawn.begin(), drawn.end());
  items_ = drawn;
  const auto add = [&](int64_t id) {
    if (id >= 0 && id < stop) items_.push_back(id);  // ids that are none or wrong are not told apart here
  };
  std::for_each(problem.target, problem.target + problem.query.rows, add);
  if (problem.positives) {
    std::for_each(problem.positives, problem.positives + problem.query.rows * problem.num_positives, add);
  }
  std::sort(items_.begin(), items_.end());
  items_.erase(std::unique(items_.begin(), items_.end()), items_.end());

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
    if (problem.bias) shift_[c] += problem.bias[items_[c]] / problem.temperature;
    if (problem.log_q) shift_[c] -= problem.log_q[items_[c]];
  }
}

}  // namespace alterrec
