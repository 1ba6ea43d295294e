// Selecting: from the candidates of a session to its exact ranks.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/sample.h"

namespace alterrec {

// The ranks of one session.
struct RowRanks {
  std::vector<uint64_t> best;  // keys of ranks [0, top), best first
  Item first, last;            // the items at ranks start and stop - 1; unset for an empty slice
};

// Orders items as ranks do: the larger key is the better item.
uint64_t make_key(float score, int32_t id);
Item from_key(uint64_t key);

// The scratch memory of one thread, which selects for its sessions one after the other.
class Selector {
 public:
  // From the candidates of `count` workers, each in ascending order; corrects the marks in `bits`. False where the
  // limits missed its boundary or a list overflowed: then `out` and `bits` are undefined.
  bool from_candidates(const Ranks& ranks, Filter filter, const Limits& limits, const Candidates* runs, int64_t count,
                       uint64_t* bits, RowRanks& out);

  // From all scores, of items [first, first + count); writes the words of `bits` from that of `first` on.
  void from_scores(const Ranks& ranks, const float* scores, int64_t count, int32_t first, uint64_t* bits,
                   RowRanks& out);

 private:
  struct List {
    Buffer<float> scores;
    Buffer<int32_t> ids;
    int64_t count = 0;

    void reserve(int64_t n);
    int64_t count_above(float low) const;  // scores at or above it
  };

  // Fills lists_[0] with the candidates in [low, high).
  void gather(const Candidates* runs, int64_t count, float low, float high);
  // The item of the given rank in lists_[0], whose contents are lost.
  Item item_at(int64_t rank);
  // The best n of lists_[0], in order.
  void best(int64_t n, std::vector<uint64_t>& out);

  List lists_[3];
  std::vector<uint64_t> keys_;
};

}  // namespace alterrec
