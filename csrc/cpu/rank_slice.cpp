#include "cpu/rank_slice.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "cpu/blas.h"
#include "cpu/isa.h"

namespace alterrec {
namespace {

// All sizes are the same for any number of threads, so that every product has the same shape and the same rounding.
constexpr int64_t kBlockRows = 512;              // sessions that scan together: enough for products at full speed
constexpr int64_t kSampleRows = 256;             // sessions of one task while sampling
constexpr int64_t kStoredRows = 128;             // and while whole rows of scores are stored
constexpr int64_t kSelectRows = 8;               // and while selecting
constexpr int64_t kSmallCatalog = 8192;          // items up to which whole rows of scores stay in cache
constexpr int64_t kBufferBytes = 48 << 20;       // for candidates, of each thread
constexpr int64_t kBeyond = kScanTile + kGroup;  // room of a list beyond its capacity
constexpr int64_t kPrefetch = 80;                // candidates of one tile, more or less
constexpr int64_t kBitsBytes = 16 << 20;         // for member bits that are not an output
constexpr int64_t kStoredBytes = 32 << 20;       // for whole rows of scores

std::atomic<int64_t> total_rows{0}, total_missed{0}, total_overflow{0};
std::atomic<int64_t> sample_ns{0}, scan_ns{0}, select_ns{0};
std::atomic<Fallback> forced{Fallback::kAsNeeded};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the product of one session and one item costs, in cycles.
double product_cost(const RankProblem& problem) {
  const bool bf16 = multiplies_bf16(problem.precision);
  return static_cast<double>(problem.query.cols) / (!bf16 ? 32.0 : isa() == Isa::kAmx ? 128.0 : 64.0);
}

// Adds the wall-clock time since the last phase ended to `total`. It is called a few times for a block of sessions.
class Stopwatch {
 public:
  void end_of(std::atomic<int64_t>& total) {
    const auto now = std::chrono::steady_clock::now();
    total += std::chrono::duration_cast<std::chrono::nanoseconds>(now - begun_).count();
    begun_ = now;
  }

 private:
  std::chrono::steady_clock::time_point begun_ = std::chrono::steady_clock::now();
};

class Engine {
 public:
  Engine(const RankProblem& problem, const Receive& receive)
      : problem_(problem),
        receive_(receive),
        items_(problem.catalog.rows - problem.first_item),
        base_(problem.first_item / kWord * kWord),
        words_(ceil_div(problem.catalog.rows, kWord)),
        sampled_(sample_size({problem.start, problem.stop, problem.top, problem.ranked}, product_cost(problem))) {}

  NotFinite run() {
    const int64_t rows = problem_.query.rows;
    if (rows == 0) return not_finite_;
    total_rows += rows;
    if (problem_.ranked == 0) {
      for (int64_t row = 0; row < rows; ++row) receive_(row, nullptr, RowRanks{});
      return not_finite_;
    }
    const int64_t block = block_rows();
    for (int64_t begin = 0; begin < rows && not_finite_.row < 0; begin += block) {
      const int64_t count = std::min(block, rows - begin);
      if (items_ <= kSmallCatalog) {
        rank_stored(begin, count);
      } else {
        rank_scanned(begin, count);
      }
    }
    return not_finite_;
  }

 private:
  // --- what is asked of each row ---

  Ranks ranks_of(int64_t row) const {
    const int64_t extra = problem_.extra == nullptr ? 0 : problem_.extra[row + 1] - problem_.extra[row];
    return {problem_.start, problem_.stop, std::min(problem_.top + extra, problem_.ranked), problem_.ranked};
  }

  // The plan that serves every row: that of the most best ones asked for.
  Plan plan_of(int64_t begin, int64_t count) const {
    Ranks most = ranks_of(begin);
    for (int64_t row = begin; row < begin + count; ++row) most.top = std::max(most.top, ranks_of(row).top);
    return make_plan(most, sampled_);
  }

  int64_t block_rows() const {
    const int64_t rows = problem_.query.rows;
    int64_t limit = kBlockRows;
    if (items_ > kSmallCatalog) {
      const int64_t expected = std::max<int64_t>(plan_of(0, rows).expected, 1);
      limit = std::min(limit, kBufferBytes / (expected * 5 / 4 * 8));
      if (problem_.start < problem_.stop && problem_.bits == nullptr)
        limit = std::min(limit, kBitsBytes / (words_ * 8));
      limit = std::max<int64_t>(limit, 1);
    }
    return ceil_div(rows, ceil_div(rows, limit));  // blocks of about one size
  }

  // The member bits of a row of the block from `begin` on.
  uint64_t* bits_of(int64_t begin, int64_t row) {
    if (problem_.start == problem_.stop) return nullptr;
    if (problem_.bits != nullptr) return problem_.bits + row * words_;
    return scratch_bits_.get() + (row - begin) * words_;
  }

  void clear_padding(uint64_t* bits) const {
    if (bits != nullptr) std::fill(bits, bits + base_ / kWord, uint64_t{0});
  }

  // --- scores that are not finite ---

  void report(int64_t row, const float* scores, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (std::isfinite(scores[i])) continue;
      const std::lock_guard<std::mutex> lock(report_mutex_);
      if (not_finite_.row < 0 || row < not_finite_.row) {
        not_finite_ = {row, std::isnan(scores[i]) ? std::numeric_limits<float>::quiet_NaN() : scores[i]};  // no -nan
      }
      return;
    }
  }

  // --- the compare pass over one row's scores of items [item, item + count); item and the scores start a word ---

  void filter(const Plan& plan, const Limits& limits, const float* scores, int64_t item, int64_t count, int64_t row,
              uint64_t* bits, Candidates& out) {
    const Kernels& k = kernels();
    const auto pass = plan.filter == Filter::kTop     ? k.filter_top
                      : plan.filter == Filter::kSlice ? k.filter_slice
                                                      : k.filter_all;
    for (int64_t done = 0; done < count; done += kScanTile) {
      const int64_t here = item + done, n = std::min(kScanTile, count - done);
      TileRow tile{scores + done, ceil_div(n, kWord),         ~uint64_t{0},
                   ~uint64_t{0},  static_cast<int32_t>(here), bits == nullptr ? nullptr : bits + here / kWord};
      if (here < problem_.first_item) tile.first <<= problem_.first_item - here;
      if (n % kWord != 0) tile.last >>= kWord - n % kWord;
      if (!pass(tile, limits, out) && problem_.check) report(row, tile.scores, n);
    }
  }

  // Adds the bias, and makes what lies beside the ranked items harmless: columns [0, count) to [0, round_up(count)).
  void finish_scores(float* scores, int64_t item, int64_t count) const {
    if (problem_.bias != nullptr) kernels().add_bias(scores, problem_.bias + item, count);
    for (int64_t i = item; i < problem_.first_item; ++i) scores[i - item] = 0.0f;
    std::fill(scores + count, scores + round_up(count, kWord), 0.0f);
  }

  // --- small catalogs: whole rows of scores in cache ---

  void rank_stored(int64_t begin, int64_t count) {
    const int64_t end = problem_.catalog.rows, width = round_up(end - base_, kWord);
    const int64_t rows = kStoredRows;
    if (problem_.start < problem_.stop && problem_.bits == nullptr) scratch_bits_.reserve(count * words_);
    const Plan plan = plan_of(begin, count);
    std::vector<int64_t> places(sampled_);
    for (int64_t i = 0; i < sampled_; ++i) places[i] = i * problem_.ranked / sampled_;
    places = ranked_items(places);
    parallel_for(ceil_div(count, rows), [&](int64_t task) {
      const int64_t first = begin + task * rows, n = std::min(rows, begin + count - first);
      Buffer<float> scores, sample;
      Buffer<int32_t> bins;
      QueryBlock::Scratch scratch;
      Selector selector;
      RowRanks selected;
      const QueryBlock queries(problem_.query, first, n, problem_.precision);
      queries.scores(problem_.catalog, base_, end - base_, scores.reserve(n * width), width, scratch);
      sample.reserve(sampled_);
      bins.reserve(sampled_);
      Buffer<float> list_scores;
      Buffer<int32_t> list_ids;
      list_scores.reserve(items_ + kBeyond);
      list_ids.reserve(items_ + kBeyond);
      for (int64_t row = first; row < first + n; ++row) {
        float* x = scores.get() + (row - first) * width;
        finish_scores(x, base_, end - base_);
        for (int64_t i = 0; i < sampled_; ++i) sample.get()[i] = x[places[i] - base_];
        const Ranks ranks = ranks_of(row);
        const Limits limits = limits_of(ranks, plan, sample.get(), bins.get());
        uint64_t* bits = bits_of(begin, row);
        clear_padding(bits);
        Candidates list{list_scores.get(), list_ids.get(), usable(items_), 0, 0, 0, false};
        filter(plan, limits, x, base_, end - base_, row, bits, list);
        if (!selector.from_candidates(ranks, plan.filter, limits, &list, 1, bits, selected)) {
          count_fallback(list.overflow);
          selector.from_scores(ranks, x + (problem_.first_item - base_), items_,
                               static_cast<int32_t>(problem_.first_item), bits, selected);
        }
        receive_(row, bits, selected);
      }
    });
  }

  // --- large catalogs: tiles of scores in cache, limits from a sample ---

  void rank_scanned(int64_t begin, int64_t count) {
    Stopwatch stopwatch;
    const Plan plan = plan_of(begin, count);
    if (problem_.start < problem_.stop && problem_.bits == nullptr) scratch_bits_.reserve(count * words_);
    const QueryBlock queries(problem_.query, begin, count, problem_.precision);
    const std::vector<Limits> limits = sample_limits(begin, count, plan);
    stopwatch.end_of(sample_ns);

    // Each worker has a list for every session, long enough for all of its candidates: they may lie in the tiles that
    // one worker takes.
    const int64_t workers = num_threads(), capacity = usable(list_capacity(plan, count));
    std::vector<Buffer<float>> list_scores(workers);
    std::vector<Buffer<int32_t>> list_ids(workers);
    std::vector<Candidates> lists(count * workers);  // (count, workers)
    for (int64_t worker = 0; worker < workers; ++worker) {
      const int64_t room = capacity + kBeyond;
      float* scores = list_scores[worker].reserve(count * room);
      int32_t* ids = list_ids[worker].reserve(count * room);
      for (int64_t r = 0; r < count; ++r) {
        lists[r * workers + worker] = {scores + r * room, ids + r * room, capacity, 0, 0, 0, false};
      }
    }

    // Where there are few candidates, short tiles stay nearer to the core; long ones spread the cost of touching a
    // list.
    const int64_t step = plan.filter == Filter::kTop ? kScanTile / 2 : kScanTile;
    const int64_t tiles = ceil_div(problem_.catalog.rows - base_, step);
    std::atomic<int64_t> next{0};
    parallel_for(workers, [&](int64_t worker) {
      Buffer<float> scores;
      QueryBlock::Scratch scratch;
      scores.reserve(count * step);
      for (int64_t tile = next++; tile < tiles; tile = next++) {
        const int64_t item = base_ + tile * step, n = std::min(step, problem_.catalog.rows - item);
        queries.scores(problem_.catalog, item, n, scores.get(), step, scratch);
        for (int64_t r = 0; r < count; ++r) {
          float* x = scores.get() + r * step;
          finish_scores(x, item, n);
          if (r + 1 < count) prefetch(lists[(r + 1) * workers + worker]);
          filter(plan, limits[r], x, item, n, begin + r, bits_of(begin, begin + r), lists[r * workers + worker]);
        }
      }
    });
    stopwatch.end_of(scan_ns);
    if (not_finite_.row >= 0) return;

    std::vector<char> missed(count, 0);
    parallel_for(ceil_div(count, kSelectRows), [&](int64_t task) {
      Selector selector;
      RowRanks selected;
      for (int64_t r = task * kSelectRows; r < std::min(count, (task + 1) * kSelectRows); ++r) {
        uint64_t* bits = bits_of(begin, begin + r);
        clear_padding(bits);
        const Candidates* runs = &lists[r * workers];
        // Counted over all workers, so that it does not depend on which worker took which tile.
        const bool overflow = std::any_of(runs, runs + workers, [](const Candidates& list) { return list.overflow; }) ||
                              total_count(runs, workers) > capacity;
        if (!overflow &&
            selector.from_candidates(ranks_of(begin + r), plan.filter, limits[r], runs, workers, bits, selected)) {
          receive_(begin + r, bits, selected);
        } else {
          missed[r] = 1;
          count_fallback(overflow);
        }
      }
    });
    std::vector<int64_t> again;
    for (int64_t r = 0; r < count; ++r) {
      if (missed[r]) again.push_back(begin + r);
    }
    fallback(begin, again);
    stopwatch.end_of(select_ns);
  }

  // Rows with a bracket that missed or a list that overflowed: all their scores are stored and selected from.
  void fallback(int64_t begin, const std::vector<int64_t>& rows) {
    const int64_t end = problem_.catalog.rows, width = round_up(end - base_, kScanTile), tiles = width / kScanTile;
    const int64_t group = std::clamp<int64_t>(kStoredBytes / (4 * width), 1, kBlockRows);
    const int64_t total = static_cast<int64_t>(rows.size()),
                  bytes = problem_.query.cols * bytes_of(problem_.query.format);
    Buffer<float> scores;
    Buffer<char> gathered;
    for (int64_t done = 0; done < total; done += group) {
      const int64_t n = std::min(group, total - done);
      gathered.reserve(n * bytes);
      for (int64_t r = 0; r < n; ++r) {
        std::copy_n(static_cast<const char*>(problem_.query.row(rows[done + r])), bytes, gathered.get() + r * bytes);
      }
      const Matrix query{gathered.get(), problem_.query.format, n, problem_.query.cols, problem_.query.cols};
      const QueryBlock queries(query, 0, n, problem_.precision);
      scores.reserve(n * width);
      parallel_for(tiles, [&](int64_t tile) {
        QueryBlock::Scratch scratch;
        const int64_t item = base_ + tile * kScanTile;
        queries.scores(problem_.catalog, item, std::min(kScanTile, end - item), scores.get() + tile * kScanTile, width,
                       scratch);
      });
      parallel_for(n, [&](int64_t r) {
        Selector selector;
        RowRanks selected;
        float* x = scores.get() + r * width;
        const int64_t row = rows[done + r];
        finish_scores(x, base_, end - base_);
        selector.from_scores(ranks_of(row), x + (problem_.first_item - base_), items_,
                             static_cast<int32_t>(problem_.first_item), bits_of(begin, row), selected);
        receive_(row, bits_of(begin, row), selected);
      });
    }
  }

  std::vector<Limits> sample_limits(int64_t begin, int64_t count, const Plan& plan) {
    std::vector<int64_t> items(sampled_);
    uint64_t state = 0x9e3779b97f4a7c15u;  // one random item from each of `sampled_` runs of the ranked ones
    for (int64_t i = 0; i < sampled_; ++i) {
      const int64_t low = problem_.ranked * i / sampled_, high = problem_.ranked * (i + 1) / sampled_;
      state = state * 6364136223846793005u + 1442695040888963407u;
      items[i] = low + static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(std::max<int64_t>(1, high - low)));
    }
    items = ranked_items(items);
    const int64_t bytes = problem_.catalog.cols * bytes_of(problem_.catalog.format);
    Buffer<char> gathered;
    gathered.reserve(sampled_ * bytes);
    for (int64_t i = 0; i < sampled_; ++i) {
      std::copy_n(static_cast<const char*>(problem_.catalog.row(items[i])), bytes, gathered.get() + i * bytes);
    }
    const Matrix sample{gathered.get(),        problem_.catalog.format, sampled_,
                        problem_.catalog.cols, problem_.catalog.cols,   problem_.catalog.norm};

    std::vector<Limits> limits(count);
    const int64_t rows = kSampleRows;
    const int64_t width = round_up(sampled_, kWord);
    parallel_for(ceil_div(count, rows), [&](int64_t task) {
      const int64_t first = task * rows, n = std::min(rows, count - first);
      Buffer<float> scores;
      Buffer<int32_t> bins;
      QueryBlock::Scratch scratch;
      const QueryBlock queries(problem_.query, begin + first, n, problem_.precision);
      queries.scores(sample, 0, sampled_, scores.reserve(n * width), width, scratch);
      bins.reserve(sampled_);
      for (int64_t r = 0; r < n; ++r) {
        float* x = scores.get() + r * width;
        if (problem_.bias != nullptr) {
          for (int64_t i = 0; i < sampled_; ++i) x[i] += problem_.bias[items[i]];
        }
        limits[first + r] = limits_of(ranks_of(begin + first + r), plan, x, bins.get());
      }
    });
    return limits;
  }

  // The items at these places among the ranked ones; both ascend.
  std::vector<int64_t> ranked_items(std::vector<int64_t> places) const {
    int64_t item = problem_.first_item, seen = 0;  // `seen` ranked items lie before `item`
    for (int64_t& place : places) {
      if (problem_.ranked == items_) {
        place += problem_.first_item;
        continue;
      }
      for (; seen < place || problem_.bias[item] < kMasked; ++item) seen += !(problem_.bias[item] < kMasked);
      place = item;
    }
    return places;
  }

  // --- limits, candidates, and when the fallback is taken ---

  Limits limits_of(const Ranks& ranks, const Plan& plan, const float* sample, int32_t* bins) const {
    Limits limits = estimate_limits(ranks, plan, sample, sampled_, bins);
    if (forced == Fallback::kMissed) {
      const float never = std::numeric_limits<float>::quiet_NaN();
      limits = {never, never, never, never, never, never, never};
    }
    return limits;
  }

  // The end of a list, which has left the cache since the last tile.
  static void prefetch(const Candidates& list) {
    for (int64_t i = 0; i < kPrefetch; i += 64 / 4) {
      __builtin_prefetch(list.scores + list.count + i, 1);
      __builtin_prefetch(list.ids + list.count + i, 1);
    }
  }

  static int64_t total_count(const Candidates* lists, int64_t n) {
    return std::accumulate(lists, lists + n, int64_t{0},
                           [](int64_t sum, const Candidates& list) { return sum + list.count; });
  }

  static int64_t list_capacity(const Plan& plan, int64_t rows) {
    const int64_t ample = plan.expected * 3 / 2 + 1024, affordable = kBufferBytes / (rows * 8);
    return std::max<int64_t>(std::min(ample, affordable - kBeyond), 1);
  }

  static int64_t usable(int64_t capacity) { return forced == Fallback::kOverflow ? -1 : capacity; }

  static void count_fallback(bool overflow) { ++(overflow ? total_overflow : total_missed); }

  const RankProblem& problem_;
  const Receive& receive_;
  const int64_t items_;    // from first_item on, whatever their bias
  const int64_t base_;     // first_item, down to a whole word: scores of a tile and words of bits begin together
  const int64_t words_;    // member bits of a row, from item 0 on
  const int64_t sampled_;  // items in the sample
  Buffer<uint64_t> scratch_bits_;
  std::mutex report_mutex_;
  NotFinite not_finite_;
};

}  // namespace

int64_t count_ranked(const float* bias, int64_t first_item, int64_t items) {
  if (bias == nullptr) return items - first_item;
  return std::count_if(bias + first_item, bias + items, [](float x) { return !(x < kMasked); });
}

NotFinite rank(const RankProblem& problem, const Receive& receive) { return Engine(problem, receive).run(); }

Counters counters() { return {total_rows, total_missed, total_overflow, sample_ns, scan_ns, select_ns}; }

void force_fallback(Fallback fallback) { forced = fallback; }

}  // namespace alterrec
