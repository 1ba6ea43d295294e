// Sampling: where in a session's scores the boundaries of a rank slice lie, estimated from the scores of a sample.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace alterrec {

// What is asked for every session: ranks [start, stop) as a set, and the best `top` in order, out of `items` items.
struct Ranks {
  int64_t start, stop, top, items;

  bool members() const { return start < stop; }
};

// Which compare pass serves the limits.
enum class Filter { kTop, kSlice, kAll };

// How many items to sample so that sampling and selecting together cost least; product_cost: the cycles that one
// session's score of one item takes.
int64_t sample_size(const Ranks& ranks, double product_cost);

struct Plan {
  Filter filter;
  int64_t expected;  // candidates of one session
};

// Made once for all sessions with these ranks, so that they share one compare pass.
Plan make_plan(const Ranks& ranks, int64_t sampled);

// Limits from a session's scores of `sampled` random items; `bins` is scratch for as many numbers. A bracket that
// misses its boundary costs a second pass over the session and nothing else.
Limits estimate_limits(const Ranks& ranks, const Plan& plan, const float* sample, int64_t sampled, int32_t* bins);

}  // namespace alterrec
