// The inner loops, each compiled for several instruction sets; kernels() gives those of this CPU.
#pragma once

#include <cstdint>
#include <limits>

#include "cpu/tile.h"

namespace alterrec {

constexpr int64_t kWord = 64;       // items in one word of member bits
constexpr int64_t kGroup = 16;      // items the inner loops take at once; lists have this much room beyond their end
constexpr int64_t kScanTile = 512;  // items in one tile of the scan
constexpr int64_t kScanWords = kScanTile / kWord;

// The score of an item whose bias is -inf: finite, since NaN and infinity among the scores mean a fault.
constexpr float kMasked = std::numeric_limits<float>::lowest();

// What the scan compares a session's scores x with. An item is a candidate, from which the ranks are selected later,
// where x lies in the bracket [stop_low, stop_high) or [start_low, start_high) or at or above top_low; it is marked as
// a member where x lies in [stop_mid, start_mid), which selecting corrects for the candidates. NaN as a limit is above
// every score.
struct Limits {
  float stop_low, stop_mid, stop_high;
  float start_low, start_mid, start_high;
  float top_low;
};

// Candidates of one session from one worker's tiles, in ascending order of ids, and how many scores lay above brackets.
struct Candidates {
  float* scores;
  int32_t* ids;
  int64_t capacity;  // there is room for kScanTile + kGroup more
  int64_t count;
  int64_t marked;       // items marked as members
  int64_t above_start;  // scores >= start_high
  bool overflow;        // there was no room for further candidates
};

// An item with its score for some session: better ones have a larger score, or the same and a smaller id.
struct Item {
  float score;
  int32_t id;
};

// One session's scores of one tile: `words` * 64 of them, of which the first and the last word may hold fewer items.
struct TileRow {
  const float* scores;
  int64_t words;         // at most kScanWords
  uint64_t first, last;  // which items of the first and the last word exist
  int32_t item;          // of scores[0]
  uint64_t* bits;        // receives the words of member bits; unused by filter_top
};

struct Kernels {
  // n values of either 16-bit format to float32; float32 rounded to the nearest value of one (ties to even), and kept
  // as float32 or stored as such.
  void (*widen)(Format from, const void* in, int64_t n, float* out);
  void (*round)(Format to, const float* in, int64_t n, float* out);
  void (*narrow)(Format to, const float* in, int64_t n, uint16_t* out);
  // One panel of kPanel rows, transposed: `count` of x from `begin` on, the others zero. As float32, (x.cols, kPanel),
  // values of `precision`; of an x that is float32 or bfloat16 as bfloat16, (width, kPanel) in pairs of rows (see
  // bf16_gemm), zero beyond x.cols.
  void (*pack_floats)(const Matrix& x, int64_t begin, int64_t count, Format precision, float* out);
  void (*pack_pairs)(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out);

  // The compare pass. filter_slice: where start_high and top_low are NaN and start_mid is start_low, so that all above
  // it are candidates; filter_all: any limits; filter_top: candidates at or above top_low alone, no bits. False: a
  // score is not finite, which shows in the sum of all scores times zero.
  bool (*filter_slice)(const TileRow& row, const Limits& limits, Candidates& out);
  bool (*filter_all)(const TileRow& row, const Limits& limits, Candidates& out);
  bool (*filter_top)(const TileRow& row, const Limits& limits, Candidates& out);

  // Copies those of n candidates with a score in [low, high), in order, and returns how many; *above receives the
  // number at or above high. The outputs have room for n + kGroup and may be the inputs.
  int64_t (*keep)(const float* scores, const int32_t* ids, int64_t n, float low, float high, float* out_scores,
                  int32_t* out_ids, int64_t* above);
  int64_t (*count)(const float* scores, int64_t n, float low);  // of n scores, those at or above low
  // The ids of those of n candidates whose mark (see Limits) is wrong: members run from `first` to `last`, the items at
  // ranks start and stop - 1. Returns how many; out has room for n + kGroup.
  int64_t (*mistaken)(const float* scores, const int32_t* ids, int64_t n, const Limits& limits, Item first, Item last,
                      int32_t* out);
  // out[i] = the bin of x[i] among `bins` equal ones from low on, `scale` bins to a unit; ends take what lies beyond.
  void (*bins)(const float* x, int64_t n, float low, float scale, int32_t bins, int32_t* out);
  void (*range)(const float* x, int64_t n, float* low, float* high);  // smallest and largest of n >= 1 values
  void (*add_bias)(float* x, const float* bias, int64_t n);           // x += bias; kMasked where the bias is -inf
};

const Kernels& kernels();

}  // namespace alterrec
