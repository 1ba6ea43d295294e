// Included by kernels.cpp once for each instruction set, inside a namespace that defines Floats, Ids, Mask (16 bits),
// load, store, load_f16, store_f16, splat, ge, add_zero_times, all_zero, load_ids, ids_from, splat_ids, le, append.
// Hence no include guard.

inline void clip(const TileRow& row, uint64_t* words) {
  words[0] &= row.first;
  words[row.words - 1] &= row.last;
}

inline int64_t ones(const uint64_t* words, int64_t n) {
  int64_t sum = 0;
  for (int64_t w = 0; w < n; ++w) sum += __builtin_popcountll(words[w]);
  return sum;
}

// Whether the list takes another tile, which it has room for beyond its capacity.
inline bool has_room(Candidates& out) {
  out.overflow |= out.count > out.capacity;
  return !out.overflow;
}

// Appends the items of one group whose bit is set. Groups are appended whether they hold candidates or not: where a few
// in a hundred items are candidates, no branch would foresee it.
inline void collect(const TileRow& row, int64_t i, const Floats& x, Mask taken, Candidates& out) {
  append(out.scores + out.count, x, taken);
  append(out.ids + out.count, ids_from(row.item + static_cast<int32_t>(i)), taken);
  out.count += __builtin_popcount(taken);
}

// The bits of the group at i that exist: of all but the first and the last word, all.
inline Mask existing(const TileRow& row, int64_t i) {
  uint64_t word = ~uint64_t{0};
  if (i < kWord) word &= row.first;
  if (i >= (row.words - 1) * kWord) word &= row.last;
  return static_cast<Mask>(word >> (i % kWord));
}

template <bool kAll, bool kRoom>
inline bool filter_members(const TileRow& row, const Limits& limits, Candidates& list) {
  const Floats stop_low = splat(limits.stop_low), stop_mid = splat(limits.stop_mid),
               stop_high = splat(limits.stop_high);
  const Floats start_low = splat(limits.start_low), start_mid = splat(limits.start_mid);
  const Floats start_high = splat(limits.start_high), top_low = splat(limits.top_low);
  Candidates out = list;  // in registers
  Floats sum = splat(0.0f);
  int64_t above_start = 0;
  for (int64_t w = 0; w < row.words; ++w) {
    const bool whole = w > 0 && w + 1 < row.words;
    uint64_t member = 0;
    for (int64_t i = w * kWord; i < (w + 1) * kWord; i += kGroup) {
      const Floats x = load(row.scores + i);
      const Mask real = whole ? static_cast<Mask>(0xffff) : existing(row, i);
      sum = add_zero_times(x, sum);
      const Mask above = ge(x, start_low);
      Mask take = static_cast<Mask>((ge(x, stop_low) & ~ge(x, stop_high)) | above);
      Mask marked = static_cast<Mask>(ge(x, stop_mid) & ~above);
      if (kAll) {
        const Mask over = static_cast<Mask>(ge(x, start_high) & real);
        above_start += __builtin_popcount(over);
        take = static_cast<Mask>((ge(x, stop_low) & ~ge(x, stop_high)) | (above & ~over) | ge(x, top_low));
        marked = static_cast<Mask>(ge(x, stop_mid) & ~ge(x, start_mid));
      }
      member |= static_cast<uint64_t>(static_cast<Mask>(marked & real)) << (i % kWord);
      if (kRoom) collect(row, i, x, static_cast<Mask>(take & real), out);
    }
    row.bits[w] = member;
  }
  out.above_start += above_start;
  out.marked += ones(row.bits, row.words);
  list = out;
  return all_zero(sum);
}

inline bool filter_slice(const TileRow& row, const Limits& limits, Candidates& out) {
  return has_room(out) ? filter_members<false, true>(row, limits, out) : filter_members<false, false>(row, limits, out);
}

inline bool filter_all(const TileRow& row, const Limits& limits, Candidates& out) {
  return has_room(out) ? filter_members<true, true>(row, limits, out) : filter_members<true, false>(row, limits, out);
}

inline bool filter_top(const TileRow& row, const Limits& limits, Candidates& out) {
  const Floats top_low = splat(limits.top_low);
  uint64_t taken[kScanWords];
  Floats sum = splat(0.0f);
  for (int64_t w = 0; w < row.words; ++w) {
    uint64_t candidate = 0;
    for (int64_t g = 0; g < kWord; g += kGroup) {
      const Floats x = load(row.scores + w * kWord + g);
      sum = add_zero_times(x, sum);
      candidate |= static_cast<uint64_t>(ge(x, top_low)) << g;
    }
    taken[w] = candidate;
  }
  clip(row, taken);
  if (has_room(out)) {
    for (int64_t w = 0; w < row.words; ++w) {  // few words hold any
      int64_t i = w * kWord;
      for (uint64_t left = taken[w]; left != 0; left >>= kGroup, i += kGroup) {
        collect(row, i, load(row.scores + i), static_cast<Mask>(left & 0xffff), out);
      }
    }
  }
  return all_zero(sum);
}

inline int64_t keep(const float* scores, const int32_t* ids, int64_t n, float low, float high, float* out_scores,
                    int32_t* out_ids, int64_t* above) {
  const Floats lower = splat(low), upper = splat(high);
  int64_t kept = 0, beyond = 0;
  for (int64_t i = 0; i < n; i += kGroup) {
    const Mask exists = static_cast<Mask>(n - i >= kGroup ? 0xffff : (1u << (n - i)) - 1u);
    const Floats x = load(scores + i);
    const Ids id = load_ids(ids + i);
    const Mask over = ge(x, upper) & exists;
    const Mask mask = static_cast<Mask>(ge(x, lower) & exists & ~over);
    append(out_scores + kept, x, mask);
    append(out_ids + kept, id, mask);
    kept += __builtin_popcount(mask);
    beyond += __builtin_popcount(over);
  }
  *above = beyond;
  return kept;
}

inline int64_t count(const float* scores, int64_t n, float low) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += scores[i] >= low;
  return sum;
}

// Which candidates are no worse than the cut.
inline Mask reach(const Floats& x, const Ids& id, const Floats& score, const Ids& last_id) {
  const Mask at_least = ge(x, score), tied = at_least & ge(score, x);
  return static_cast<Mask>(at_least & (~tied | le(id, last_id)));
}

inline int64_t mistaken(const float* scores, const int32_t* ids, int64_t n, const Limits& limits, Item first, Item last,
                        int32_t* out) {
  const Floats stop_mid = splat(limits.stop_mid), start_mid = splat(limits.start_mid);
  const Floats first_score = splat(first.score), last_score = splat(last.score);
  const Ids before_first = splat_ids(first.id - 1), last_id = splat_ids(last.id);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kGroup) {
    const Mask exists = static_cast<Mask>(n - i >= kGroup ? 0xffff : (1u << (n - i)) - 1u);
    const Floats x = load(scores + i);
    const Ids id = load_ids(ids + i);
    const Mask marked = static_cast<Mask>(ge(x, stop_mid) & ~ge(x, start_mid));
    const Mask member = static_cast<Mask>(reach(x, id, last_score, last_id) & ~reach(x, id, first_score, before_first));
    const Mask wrong = static_cast<Mask>((marked ^ member) & exists);
    append(out + count, id, wrong);
    count += __builtin_popcount(wrong);
  }
  return count;
}

inline void bins(const float* x, int64_t n, float low, float scale, int32_t count, int32_t* out) {
  const float last = static_cast<float>(count - 1);
  for (int64_t i = 0; i < n; ++i) {
    float place = (x[i] - low) * scale;
    place = place > 0.0f ? place : 0.0f;  // NaN goes to 0
    out[i] = static_cast<int32_t>(place < last ? place : last);
  }
}

inline void range(const float* x, int64_t n, float* low, float* high) {
  float lows[kGroup], highs[kGroup];
  int64_t i = 0;
  if (n >= kGroup) {
    Floats least = load(x), most = least;
    for (i = kGroup; i + kGroup <= n; i += kGroup) {
      least = smaller(load(x + i), least);
      most = larger(load(x + i), most);
    }
    store(lows, least);
    store(highs, most);
  } else {
    std::fill(lows, lows + kGroup, x[0]);
    std::fill(highs, highs + kGroup, x[0]);
  }
  *low = *std::min_element(lows, lows + kGroup);
  *high = *std::max_element(highs, highs + kGroup);
  for (; i < n; ++i) {
    *low = std::min(*low, x[i]);
    *high = std::max(*high, x[i]);
  }
}

inline void add_bias(float* x, const float* bias, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float sum = x[i] + bias[i];
    x[i] = bias[i] < kMasked ? kMasked : sum;  // -inf alone is less
  }
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);  // NaN stays NaN
}

// Runs `group` on 16 values at a time, the last ones by way of copies.
template <class In, class Out, class Group>
inline void each_group(const In* in, int64_t n, Out* out, const Group& group) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) group(in + i, out + i);
  if (i == n) return;
  In tail[kGroup] = {};
  Out result[kGroup];
  std::copy(in + i, in + n, tail);
  group(tail, result);
  std::copy_n(result, n - i, out + i);
}

inline void widen(Format from, const void* in, int64_t n, float* out) {
  const auto* bits = static_cast<const uint16_t*>(in);
  if (from == Format::kF16) {
    each_group(bits, n, out, [](const uint16_t* x, float* y) { store(y, load_f16(x)); });
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(bits[i]);
  }
}

inline void round(Format to, const float* in, int64_t n, float* out) {
  if (to == Format::kF16) {
    each_group(in, n, out, [](const float* x, float* y) {
      uint16_t half[kGroup];
      store_f16(half, load(x));
      store(y, load_f16(half));
    });
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(to_bf16(in[i]));
  }
}

inline void narrow(Format to, const float* in, int64_t n, uint16_t* out) {
  if (to == Format::kF16) {
    each_group(in, n, out, [](const float* x, uint16_t* y) { store_f16(y, load(x)); });
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(in[i]);
  }
}

inline void pack_floats(const Matrix& x, int64_t begin, int64_t count, Format precision, float* out) {
  std::fill(out, out + x.cols * kPanel, 0.0f);
  float values[kWord];
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < x.cols; c += kWord) {
      const int64_t n = std::min(kWord, x.cols - c);
      const void* place = static_cast<const char*>(x.row(begin + r)) + c * bytes_of(x.format);
      if (x.format != Format::kF32) {
        widen(x.format, place, n, values);
      } else if (precision != Format::kF32) {
        round(precision, static_cast<const float*>(place), n, values);
      } else {
        std::copy_n(static_cast<const float*>(place), n, values);
      }
      for (int64_t i = 0; i < n; ++i) out[(c + i) * kPanel + r] = values[i];
    }
  }
}

inline void pack_pairs(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out) {
  std::fill(out, out + width * kPanel, uint16_t{0});
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = (begin + r) * x.stride;
    for (int64_t c = 0; c < x.cols; ++c) {
      const uint16_t value = x.format == Format::kBF16 ? static_cast<const uint16_t*>(x.data)[row + c]
                                                       : to_bf16(static_cast<const float*>(x.data)[row + c]);
      out[c / 2 * 2 * kPanel + 2 * r + c % 2] = value;
    }
  }
}

constexpr Kernels kTable = {widen,      round, narrow, pack_floats, pack_pairs, filter_slice, filter_all,
                            filter_top, keep,  count,  mistaken,    bins,       range,        add_bias};
