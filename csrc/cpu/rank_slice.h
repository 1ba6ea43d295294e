// The engine behind rank_slice and top_k: sample, scan, select, and a fallback for rows whose sample misled
// (docs/native.md).
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>

#include "cpu/sample.h"
#include "cpu/select.h"
#include "cpu/tile.h"

namespace alterrec {

// A score that is not finite; row -1 where there is none.
struct NotFinite {
  int64_t row = -1;
  float score = 0.0f;
};

struct RankProblem {
  Matrix query, catalog;
  Format precision;      // what values are rounded to before they are multiplied
  const float* bias;     // (V,) or null; -inf: the item is not ranked
  int64_t first_item;    // items before it are not ranked
  int64_t ranked;        // how many items are ranked: count_ranked()
  int64_t start, stop;   // the ranks asked for as a set; none for start == stop
  int64_t top;           // how many of the first ranks are asked for in order
  const int64_t* extra;  // (B + 1,) or null: row b gets extra[b + 1] - extra[b] more of the first ranks, if there are
  bool check;            // whether to look for scores that are not finite

  // Member bits, whole words of 64 items, row after row: (B, words) or null for scratch.
  uint64_t* bits;
};

// The items from first_item on whose bias is not -inf.
int64_t count_ranked(const float* bias, int64_t first_item, int64_t items);

// Called once for each row, from many threads; bits are null where start == stop.
using Receive = std::function<void(int64_t row, uint64_t* bits, const RowRanks& selected)>;

// The first row with a score that is not finite, in which case nothing was received for some of the rows.
NotFinite rank(const RankProblem& problem, const Receive& receive);

// How often the fallback was taken, and where the time went, since the process started.
struct Counters {
  int64_t rows;      // sessions ranked
  int64_t missed;    // sessions with a bracket that missed its boundary
  int64_t overflow;  // sessions with more candidates than there was room for

  // Wall-clock nanoseconds, of catalogs that are scanned in tiles; the fallback counts as selecting.
  int64_t sample_ns, scan_ns, select_ns;
};
Counters counters();

// For tests: every bracket misses its boundary, or every list of candidates is too short.
enum class Fallback { kAsNeeded, kMissed, kOverflow };
void force_fallback(Fallback fallback);

}  // namespace alterrec
