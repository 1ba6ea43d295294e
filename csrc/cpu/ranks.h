// The engine behind rank_slice and top_k: bracket, stream, settle (docs/native.md).
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>

#include "cpu/bracket.h"
#include "cpu/settle.h"
#include "cpu/tile.h"

namespace alterrec {

// A score that is not finite; the session and the item with the lowest numbers.
struct NotFinite {
  int64_t row = -1;
  float score = 0.0f;
};

struct RankJob {
  Matrix query, catalog;
  Arithmetic arithmetic;
  const float* bias;     // (V,) or null
  int64_t first_item;    // items before it are not ranked
  int64_t start, stop;   // the set wanted; empty for start == stop
  int64_t top;           // the best ones wanted in order
  const int64_t* extra;  // (B + 1,) or null: row b gets extra[b + 1] - extra[b] best ones more, as far as there are
  bool check;            // whether to look for scores that are not finite

  // Member bits, whole words of 64 items, row after row: (B, words) or null for scratch.
  uint64_t* bits;
};

// Called once for each row, from many threads; bits are null where start == stop.
using Receive = std::function<void(int64_t row, uint64_t* bits, const Settled& settled)>;

// The first row with a score that is not finite, in which case nothing was received for some rows.
NotFinite rank(const RankJob& job, const Receive& receive);

// How often luck ran out, and where the time went, since the process started.
struct Counters {
  int64_t rows;      // sessions ranked
  int64_t missed;    // sessions whose limits did not hold
  int64_t overflow;  // sessions whose buffers were full

  // Wall-clock nanoseconds, of catalogs that are streamed; the second pass of a miss belongs to settling.
  int64_t bracket_ns, stream_ns, settle_ns;
};
Counters counters();

// For tests: limits drawn for every session are moved to where they do not hold ("miss"), or buffers are made too small
// ("overflow").
enum class Trouble { kNone, kMiss, kOverflow };
void set_trouble(Trouble trouble);

}  // namespace alterrec
