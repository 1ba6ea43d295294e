// The gathered form of the losses: each row has its own list of negatives, whose embeddings are read one by one.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/loss.h"

namespace alterrec {

// Each row's negatives, (B, count) ids in any order; repeats count each time, -1 is none.
struct Negatives {
  Ids ids;
  int64_t count = 0;

  int64_t at(int64_t i) const { return ids.at(i); }
};

class GatheredLoss {
 public:
  GatheredLoss(const LossProblem& problem, const Negatives& negatives);

  // Bytes that forward() hands to backward(): the softmax of each row, and its mean embedding.
  int64_t saved_bytes() const;

  // `saved` may be null where there will be no backward pass.
  void forward(uint8_t* saved, float* losses, float* lse) const;

  // The items whose rows of the catalog get a gradient, ascending.
  std::vector<int64_t> touched() const;

  // Once, since the logits give way to their gradients. The gradients of catalog and bias have a row for each item, or
  // for each of `touched` where it is given.
  void backward(const float* grad_losses, const float* lse, const uint8_t* saved, const std::vector<int64_t>* touched,
                const Gradients& gradients);

 private:
  struct Pair {
    int32_t item;  // counted from the start of its range
    int32_t row;
    float dlogit;
  };

  // (id) -> whether it is a negative of the row. What it reads is in the closure, so that loops over ids need not load
  // it for each of them.
  auto negatives_of(int64_t row) const {
    return [target = problem_.target[row], bias = problem_.bias](int64_t id) {
      return id >= 0 && id != target && !is_masked(bias, id);
    };
  }
  void forward_row(int64_t row, float* softmax, float* mean, float* lse, Fault& fault) const;
  void query_gradient(const float* mean, const Gradients& gradients) const;
  template <class Visit>
  void each_pair(int64_t begin, int64_t end, const float* softmax, const Visit& visit) const;
  void sum_range(int64_t first, int64_t stop, const Pair* pairs, int64_t count, const std::vector<int64_t>* touched,
                 const Gradients& gradients) const;

  const LossProblem& problem_;
  const Negatives negatives_;
  const int64_t rows_, width_;  // B, d
  const Row kind_;
  Buffer<float> query_copy_;
  int64_t query_stride_ = 0;
  const float* query_;  // (B, d) float32, rounded where the products are
  Positives positives_;
};

}  // namespace alterrec
