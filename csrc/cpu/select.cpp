#include "cpu/select.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

namespace alterrec {
namespace {

constexpr float kNever = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kFew = 96;   // candidates that are ordered one by one
constexpr int kMaxRounds = 6;  // of narrowing before that; ties and jumps in the scores need not give way to it

// Orders as floats do; -0 and +0 are one score.
uint32_t ordered(float x) {
  const float positive_zero = x + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float from_ordered(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// The item of the given rank among n scores of items from `first` on, digit by digit of their ordered bits.
Item item_at_rank(const float* scores, int64_t n, int32_t first, int64_t rank) {
  uint32_t prefix = 0, known = 0;  // bits of the item's key, and which of them are known
  for (const int shift : {21, 10, 0}) {
    const uint32_t digit = shift == 0 ? 0x3ffu : 0x7ffu;
    std::array<int64_t, 2048> counts{};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = ordered(scores[i]);
      counts[key >> shift & digit] += (key & known) == prefix;
    }
    uint32_t d = digit;
    while (rank >= counts[d]) rank -= counts[d--];
    prefix |= d << shift;
    known |= digit << shift;
  }
  int64_t i = 0;
  for (; ordered(scores[i]) != prefix || rank-- > 0; ++i) {
  }
  return {from_ordered(prefix), first + static_cast<int32_t>(i)};
}

void flip(const int32_t* ids, int64_t n, uint64_t* bits) {
  for (int64_t i = 0; i < n; ++i) bits[ids[i] / kWord] ^= uint64_t{1} << (ids[i] % kWord);
}

}  // namespace

uint64_t make_key(float score, int32_t id) {
  return static_cast<uint64_t>(ordered(score)) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

Item from_key(uint64_t key) {
  return {from_ordered(static_cast<uint32_t>(key >> 32)),
          static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key))};
}

void Selector::List::reserve(int64_t n) {
  scores.reserve(n + kGroup);
  ids.reserve(n + kGroup);
}

int64_t Selector::List::count_above(float low) const { return kernels().count(scores.get(), count, low); }

void Selector::gather(const Candidates* runs, int64_t count, float low, float high) {
  int64_t total = 0, above = 0;
  for (int64_t r = 0; r < count; ++r) total += runs[r].count;
  List& list = lists_[0];
  list.reserve(total);
  list.count = 0;
  for (int64_t r = 0; r < count; ++r) {
    list.count += kernels().keep(runs[r].scores, runs[r].ids, runs[r].count, low, high, list.scores.get() + list.count,
                                 list.ids.get() + list.count, &above);
  }
}

Item Selector::item_at(int64_t rank) {
  // Scores inside a bracket are nearly evenly spread, so the limits tell about where the rank lies. Candidates near
  // that place, a fraction of all, go to another list: after a wrong guess, the side that holds the rank is taken from
  // the same list again.
  int from = 0;
  float low = 0.0f, high = 0.0f;
  kernels().range(lists_[0].scores.get(), lists_[0].count, &low, &high);
  for (int round = 0; round < kMaxRounds && lists_[from].count > kFew && low < high; ++round) {
    const List& list = lists_[from];
    const int to = from == 1 ? 2 : 1;
    List& near = lists_[to];
    near.reserve(list.count);
    const double n = static_cast<double>(list.count), share = (static_cast<double>(rank) + 0.5) / n;
    const double place = high - (static_cast<double>(high) - low) * share;
    const double reach = (static_cast<double>(high) - low) * (3.0 * std::sqrt(n * share * (1.0 - share)) + 4.0) / n;
    float lower = static_cast<float>(place - reach), upper = static_cast<float>(place + reach);
    const auto take = [&](float from_score, float to_score) {
      int64_t above = 0;
      near.count = kernels().keep(list.scores.get(), list.ids.get(), list.count, from_score, to_score,
                                  near.scores.get(), near.ids.get(), &above);
      return above;
    };
    int64_t above = take(lower, upper);
    if (rank < above) {
      lower = upper;
      upper = kNever;
      above = take(lower, upper);
    } else if (rank >= above + near.count) {
      const int64_t passed = above + near.count;
      upper = lower;
      lower = -std::numeric_limits<float>::infinity();
      above = passed;
      take(lower, upper);
    }
    rank -= above;
    from = to;
    kernels().range(near.scores.get(), near.count, &low, &high);
  }
  const List& list = lists_[from];
  keys_.resize(list.count);
  for (int64_t i = 0; i < list.count; ++i) keys_[i] = make_key(list.scores.get()[i], list.ids.get()[i]);
  std::nth_element(keys_.begin(), keys_.begin() + rank, keys_.end(), std::greater<>());
  return from_key(keys_[rank]);
}

void Selector::best(int64_t n, std::vector<uint64_t>& out) {
  const List& list = lists_[0];
  const auto key = [&](int64_t i) { return make_key(list.scores.get()[i], list.ids.get()[i]); };
  out.resize(n);
  if (n <= kFew) {  // one by one into their places: after the first few, hardly any is among the best
    for (int64_t i = 0; i < list.count; ++i) {
      const uint64_t next = key(i);
      int64_t place = std::min(i, n);
      if (place == n && (n == 0 || next < out[n - 1])) continue;
      for (place = std::min(place, n - 1); place > 0 && out[place - 1] < next; --place) out[place] = out[place - 1];
      out[place] = next;
    }
    return;
  }
  out.resize(list.count);
  for (int64_t i = 0; i < list.count; ++i) out[i] = key(i);
  if (n < list.count) std::nth_element(out.begin(), out.begin() + n, out.end(), std::greater<>());
  out.resize(n);
  std::sort(out.begin(), out.end(), std::greater<>());
}

bool Selector::from_candidates(const Ranks& ranks, Filter filter, const Limits& limits, const Candidates* runs,
                               int64_t count, uint64_t* bits, RowRanks& out) {
  int64_t marked = 0, above_start = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (runs[r].overflow) return false;
    marked += runs[r].marked;
    above_start += runs[r].above_start;
  }
  out.best.clear();
  const float mid = std::fmax(limits.start_mid, limits.stop_mid);  // brackets of near ranks overlap
  int64_t above_mid = above_start;                                 // scores >= mid
  if (filter == Filter::kSlice) {
    gather(runs, count, limits.start_low, kNever);
    above_mid = lists_[0].count_above(mid);
    const int64_t zone = std::max(ranks.start + 1, ranks.top);
    if (lists_[0].count < zone) return false;
    best(zone, out.best);
    out.first = from_key(out.best[ranks.start]);
    out.best.resize(ranks.top);
  } else if (ranks.top > 0) {
    gather(runs, count, limits.top_low, kNever);
    if (lists_[0].count < ranks.top) return false;
    best(ranks.top, out.best);
  }
  if (filter == Filter::kTop) return true;
  if (filter == Filter::kAll) {
    gather(runs, count, limits.start_low, limits.start_high);
    above_mid += lists_[0].count_above(mid);
    const int64_t rank = ranks.start - above_start;
    if (rank < 0 || rank >= lists_[0].count) return false;
    out.first = item_at(rank);
  }
  gather(runs, count, limits.stop_low, limits.stop_high);
  // All scores >= stop_mid are marked or >= mid; of them those below stop_high are in the list.
  const int64_t rank = ranks.stop - 1 - (marked + above_mid - lists_[0].count_above(limits.stop_mid));
  if (rank < 0 || rank >= lists_[0].count) return false;
  out.last = item_at(rank);
  for (int64_t r = 0; r < count; ++r) {
    lists_[0].reserve(runs[r].count);
    int32_t* wrong = lists_[0].ids.get();
    flip(wrong, kernels().mistaken(runs[r].scores, runs[r].ids, runs[r].count, limits, out.first, out.last, wrong),
         bits);
  }
  return true;
}

void Selector::from_scores(const Ranks& ranks, const float* scores, int64_t count, int32_t first, uint64_t* bits,
                           RowRanks& out) {
  out.best.clear();
  if (ranks.top > 0) {
    const uint64_t last = [&] {
      const Item cut = item_at_rank(scores, count, first, ranks.top - 1);
      return make_key(cut.score, cut.id);
    }();
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t key = make_key(scores[i], first + static_cast<int32_t>(i));
      if (key >= last) out.best.push_back(key);
    }
    std::sort(out.best.begin(), out.best.end(), std::greater<>());
  }
  if (!ranks.members()) return;
  out.first = item_at_rank(scores, count, first, ranks.start);
  out.last = item_at_rank(scores, count, first, ranks.stop - 1);
  const uint64_t most = make_key(out.first.score, out.first.id), least = make_key(out.last.score, out.last.id);
  std::fill(bits + first / kWord, bits + (first + count + kWord - 1) / kWord, uint64_t{0});
  for (int64_t i = 0; i < count; ++i) {
    const int64_t item = first + i;
    const uint64_t key = make_key(scores[i], static_cast<int32_t>(item));
    bits[item / kWord] |= static_cast<uint64_t>(key >= least && key <= most) << (item % kWord);
  }
}

}  // namespace alterrec
