// Negatives that all rows share, as columns of the dense loss.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dense_loss.h"
#include "cpu/gathered_loss.h"
#include "cpu/loss.h"

namespace alterrec {

// The distinct ids among negatives, targets and positives, so that every gradient has its column. A negative that was
// drawn c times has log c added to its logits.
class SharedNegatives {
 public:
  SharedNegatives(const LossProblem& problem, const Negatives& negatives);

  const std::vector<int64_t>& items() const { return items_; }
  Columns columns() const { return {static_cast<int64_t>(items_.size()), items_.data(), shift_.data()}; }
  Members members() const {
    Members out;
    out.form = Members::Form::kShared;
    out.shared = negative_.data();
    return out;
  }

 private:
  std::vector<int64_t> items_;      // ascending
  std::vector<float> shift_;        // what each item's logit is besides its dot product
  std::vector<uint64_t> negative_;  // one bit for each item: whether it is a negative
};

}  // namespace alterrec
