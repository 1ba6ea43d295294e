// Brackets: where in a session's scores the boundaries of a rank slice lie, told from the scores of a sample.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace alterrec {

// What is asked of every session: ranks [start, stop) as a set, and the best `top` in order. Of `items` that are
// ranked.
struct Ranks {
  int64_t start, stop, top, items;

  bool members() const { return start < stop; }
};

// The compare pass that serves some limits.
enum class Filter { kTop, kSlice, kAll };

// How many items to sample for the cheapest mix of sampling and settling; product_cost: cycles for a session and an
// item.
int64_t sample_size(const Ranks& ranks, double product_cost);

struct Plan {
  Filter filter;
  int64_t expected;  // candidates of one session
};

// Decided once for all sessions with these ranks, so that they share one compare pass.
Plan make_plan(const Ranks& ranks, int64_t sampled);

// Limits from a session's scores of `sampled` random items; `bins` is scratch for as many numbers. Limits that do not
// hold cost a second pass over the session and nothing else.
Limits bracket(const Ranks& ranks, const Plan& plan, const float* sample, int64_t sampled, int32_t* bins);

}  // namespace alterrec
