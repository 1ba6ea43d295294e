#include "cpu/sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace alterrec {
namespace {

constexpr float kNever = std::numeric_limits<float>::quiet_NaN();
constexpr float kAlways = std::numeric_limits<float>::lowest() * 0.99999994f;  // below every score but kMasked
constexpr double kDeviations = 4.0;  // a boundary lies outside its bracket once in 16,000 times
constexpr double kSlack = 3.0;       // and what a Poisson tail near the first and the last rank needs on top
constexpr double kSelectCost = 2.5;  // cycles to store a candidate and select from it

// How many of the sample lie above the item of `rank`: at least `few`, probably `mid`, at most `many`.
struct Places {
  double few, mid, many;
};

Places places(int64_t rank, int64_t items, int64_t sampled) {
  const double share = (static_cast<double>(rank) + 0.5) / static_cast<double>(items);
  const double mid = share * static_cast<double>(sampled);
  const double spread = kDeviations * std::sqrt(mid * (1.0 - share)) + kSlack;
  return {mid - spread, mid, mid + spread};
}

// Candidates in the two-sided bracket around a rank ...
double bracket_items(int64_t rank, const Ranks& ranks, int64_t sampled) {
  const Places p = places(rank, ranks.items, sampled);
  const double low = std::max(p.few, 0.0), high = std::min(p.many, static_cast<double>(sampled));
  return (high - low) * static_cast<double>(ranks.items) / static_cast<double>(sampled);
}

// ... and among the first `count` ranks, down to the lower end of the last one's bracket.
double zone_items(int64_t count, const Ranks& ranks, int64_t sampled) {
  if (count == 0) return 0.0;
  const double high = std::min(places(count - 1, ranks.items, sampled).many, static_cast<double>(sampled));
  return high * static_cast<double>(ranks.items) / static_cast<double>(sampled);
}

// Order statistics of a sample through a histogram: how close its answers are decides nothing but the speed.
class Histogram {
 public:
  Histogram(const float* x, int64_t n, int32_t* place) : n_(n) {
    kernels().range(x, n, &low_, &high_);
    const float width = high_ - low_;
    scale_ = width > 0.0f && std::isfinite(width) ? static_cast<float>(kBins) / width : 0.0f;
    kernels().bins(x, n, low_, scale_, kBins, place);
    std::array<std::array<uint32_t, kBins>, 2> counts{};  // two, so that equal neighbours do not wait for each other
    int64_t i = 0;
    for (; i + 1 < n; i += 2) {
      ++counts[0][place[i]];
      ++counts[1][place[i + 1]];
    }
    if (i < n) ++counts[0][place[i]];
    uint32_t sum = 0;
    for (int b = kBins - 1; b >= 0; --b) above_[b] = sum += counts[0][b] + counts[1][b];
  }

  // A score with at least `count` of the sample at or above it; one with hardly more.
  float with_at_least(double count) const {
    if (count > static_cast<double>(n_)) return kAlways;
    return edge(last_with(count));
  }
  // A score with at most `count` of the sample at or above it; NaN where even the largest has more.
  float with_at_most(double count) const {
    if (count < 1.0) return kNever;
    const int b = last_with(count) + 1;
    return b == kBins ? high_ : edge(b);
  }

 private:
  static constexpr int kBins = 512;

  // The last bin with `count` at or above its lower edge.
  int last_with(double count) const {
    const auto* place = std::partition_point(above_.begin(), above_.end(),
                                             [&](uint32_t above) { return static_cast<double>(above) >= count; });
    return std::max<int>(0, static_cast<int>(place - above_.begin()) - 1);
  }
  float edge(int b) const { return scale_ > 0.0f ? low_ + static_cast<float>(b) / scale_ : low_; }

  int64_t n_;
  float low_, high_, scale_;
  std::array<uint32_t, kBins> above_;
};

}  // namespace

int64_t sample_size(const Ranks& ranks, double product_cost) {
  if (ranks.items == 0) return 0;
  // Sampling s items costs s products and leaves 2 * kDeviations * sqrt(f (1 - f) / s) of the catalog as candidates.
  const double items = static_cast<double>(ranks.items);
  const auto spread = [&](int64_t rank) {
    const double share = static_cast<double>(rank) / items;
    return std::sqrt(share * (1.0 - share));
  };
  const double widest = std::max(spread(ranks.stop), std::max(spread(ranks.start), spread(ranks.top)));
  const double best = std::pow(kDeviations * kSelectCost * items * widest / product_cost, 2.0 / 3.0);
  const auto least = std::clamp<int64_t>(ranks.items / 64, 256, 1024);  // for the zone of the first ranks
  return std::min(ranks.items, round_up(std::max(static_cast<int64_t>(best), least), kPanel));
}

Plan make_plan(const Ranks& ranks, int64_t sampled) {
  if (!ranks.members()) return {Filter::kTop, static_cast<int64_t>(zone_items(ranks.top, ranks, sampled))};
  const double stop = bracket_items(ranks.stop - 1, ranks, sampled);
  const double zone = zone_items(std::max(ranks.start + 1, ranks.top), ranks, sampled);
  const double apart = bracket_items(ranks.start, ranks, sampled) + zone_items(ranks.top, ranks, sampled);
  const Filter filter = zone <= apart ? Filter::kSlice : Filter::kAll;
  return {filter, static_cast<int64_t>(stop + std::min(zone, apart))};
}

Limits estimate_limits(const Ranks& ranks, const Plan& plan, const float* sample, int64_t sampled, int32_t* bins) {
  Limits limits{kNever, kNever, kNever, kNever, kNever, kNever, kNever};
  const Histogram histogram(sample, sampled, bins);
  if (plan.filter != Filter::kSlice && ranks.top > 0) {
    limits.top_low = histogram.with_at_least(places(ranks.top - 1, ranks.items, sampled).many);
  }
  if (plan.filter == Filter::kTop) return limits;

  const Places stop = places(ranks.stop - 1, ranks.items, sampled);
  limits.stop_low = histogram.with_at_least(stop.many);
  limits.stop_high = histogram.with_at_most(stop.few);
  limits.stop_mid = histogram.with_at_least(stop.mid);
  if (plan.filter == Filter::kSlice) {
    const int64_t zone = std::max(ranks.start + 1, ranks.top);
    limits.start_low = histogram.with_at_least(places(zone - 1, ranks.items, sampled).many);
    limits.start_mid = limits.start_low;
  } else {
    const Places start = places(ranks.start, ranks.items, sampled);
    limits.start_low = histogram.with_at_least(start.many);
    limits.start_high = histogram.with_at_most(start.few);
    limits.start_mid = histogram.with_at_least(start.mid);
  }
  return limits;
}

}  // namespace alterrec
