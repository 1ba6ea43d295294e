// Included by loss_kernels.cpp once for each instruction set, inside a namespace that defines widen_f16 and round_f16
// (16 values each) and under the compiler's target pragma: vectors of 16 floats, which the compiler splits where
// registers are narrower. Hence no include guard.

using F32 = float __attribute__((vector_size(64)));
using I32 = int32_t __attribute__((vector_size(64)));
using F32Memory = float __attribute__((vector_size(64), aligned(4), may_alias));
using U16 = uint16_t __attribute__((vector_size(32)));
using U16Memory = uint16_t __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int64_t kLanes = 16;
constexpr I32 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

ALTERREC_INLINE F32 splat(float x) { return x - F32{}; }
ALTERREC_INLINE F32 load(const float* p) { return *reinterpret_cast<const F32Memory*>(p); }
ALTERREC_INLINE void store(float* p, F32 x) { *reinterpret_cast<F32Memory*>(p) = x; }

ALTERREC_INLINE float total(F32 x) {
  float sums[kLanes];
  store(sums, x);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

// The nearest bfloat16, ties to even, in the low 16 bits of each lane.
ALTERREC_INLINE I32 round_bits(F32 x) {
  const I32 bits = (I32)x;
  const I32 rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
  return x == x ? rounded : 0x7fc0 - I32{};  // adding would carry a NaN over to zero
}

struct LoadF32 {
  using Element = float;
  static ALTERREC_INLINE F32 at(const void* row, int64_t i) { return load(static_cast<const float*>(row) + i); }
  static ALTERREC_INLINE float one(const void* row, int64_t i) { return static_cast<const float*>(row)[i]; }
};

struct LoadF32ToBF16 {
  using Element = float;
  static ALTERREC_INLINE F32 at(const void* row, int64_t i) { return (F32)(round_bits(LoadF32::at(row, i)) << 16); }
  static ALTERREC_INLINE float one(const void* row, int64_t i) {
    return ((F32)(round_bits(splat(LoadF32::one(row, i))) << 16))[0];
  }
};

struct LoadBF16 {
  using Element = uint16_t;
  static ALTERREC_INLINE F32 at(const void* row, int64_t i) {
    const U16 bits = *reinterpret_cast<const U16Memory*>(static_cast<const uint16_t*>(row) + i);
    return (F32)(__builtin_convertvector(bits, I32) << 16);
  }
  static ALTERREC_INLINE float one(const void* row, int64_t i) {
    return ((F32)(I32{} + (static_cast<const uint16_t*>(row)[i] << 16)))[0];
  }
};

struct LoadF16 {
  using Element = uint16_t;
  static ALTERREC_INLINE F32 at(const void* row, int64_t i) {
    alignas(64) float x[kLanes];
    widen_f16(static_cast<const uint16_t*>(row) + i, x);
    return load(x);
  }
  static ALTERREC_INLINE float one(const void* row, int64_t i) {
    return from_f16(static_cast<const uint16_t*>(row)[i]);
  }
};

struct LoadF32ToF16 {
  using Element = float;
  static ALTERREC_INLINE F32 at(const void* row, int64_t i) {
    alignas(64) float x[kLanes];
    round_f16(static_cast<const float*>(row) + i, x);
    return load(x);
  }
  static ALTERREC_INLINE float one(const void* row, int64_t i) {
    return from_f16(to_f16(static_cast<const float*>(row)[i]));
  }
};

// exp(x) within 2 ulp for x up to 88; 0 below -87, where it would be denormal.
ALTERREC_INLINE F32 exp_normal(F32 x) {
  const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const F32 shifted = x * 1.44269504f + magic;
  const F32 n = shifted - magic;
  const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, in two parts
  F32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const F32 scaled = (F32)((I32)p + ((I32)shifted << 23));
  return x < -87.0f ? F32{} : scaled;
}

ALTERREC_INLINE I32 members(uint64_t word, int64_t part) {
  return ((static_cast<int32_t>(word >> (16 * part)) - I32{}) & (1 << kLane)) != 0;
}

float row_max(const float* y, const uint64_t* mask, int64_t words, bool* finite) {
  const F32 lowest = splat(-std::numeric_limits<float>::infinity());
  F32 best[2] = {lowest, lowest};
  I32 size[2] = {};  // the largest magnitude, as bits: all that is not finite lies above all that is
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t part = 0; part < 4; ++part) {
      const F32 x = load(y + 64 * w + 16 * part);
      const I32 magnitude = (I32)x & 0x7fffffff;
      I32& s = size[part % 2];
      s = magnitude > s ? magnitude : s;
      const F32 member = members(mask[w], part) ? x : lowest;
      F32& b = best[part % 2];
      b = member > b ? member : b;
    }
  }
  const F32 top = best[0] > best[1] ? best[0] : best[1];
  const I32 largest = size[0] > size[1] ? size[0] : size[1];
  float result = top[0];
  for (int64_t i = 1; i < kLanes; ++i) result = std::max(result, top[i]);
  for (int64_t i = 0; i < kLanes; ++i) *finite &= largest[i] < 0x7f800000;
  return result;
}

template <class Store>
ALTERREC_INLINE float row_exp_to(const float* y, const uint64_t* mask, int64_t words, float shift, Store put) {
  F32 sum[2] = {};
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t part = 0; part < 4; ++part) {
      const int64_t i = 64 * w + 16 * part;
      const F32 value = members(mask[w], part) ? exp_normal(load(y + i) - shift) : F32{};
      sum[part % 2] += value;
      put(i, value);
    }
  }
  return total(sum[0] + sum[1]);
}

float row_exp(const float* y, const uint64_t* mask, int64_t words, float shift, float* out) {
  return row_exp_to(y, mask, words, shift, [out](int64_t i, F32 x) ALTERREC_INLINE_LAMBDA { store(out + i, x); });
}

float row_exp_bf16(const float* y, const uint64_t* mask, int64_t words, float shift, uint16_t* out) {
  return row_exp_to(y, mask, words, shift, [out](int64_t i, F32 x) ALTERREC_INLINE_LAMBDA {
    *reinterpret_cast<U16Memory*>(out + i) = __builtin_convertvector(round_bits(x), U16);
  });
}

// Rows arrive in any order from all over a table, so those that come soon are fetched ahead.
template <class Load>
ALTERREC_INLINE void prefetch(const void* row, int64_t d) {
  const char* line = static_cast<const char*>(row);
  for (const char* end = line + d * sizeof(typename Load::Element); line < end; line += 64) __builtin_prefetch(line);
}

// q . row for `kGroup` rows at a time. The end of a width that 16 does not divide is read as its last 16 elements, with
// those of q that were counted before set to zero.
template <class Load, int64_t kGroup>
ALTERREC_INLINE void dot_group(const float* q, const void* const* rows, int64_t d, float* out) {
  F32 acc[kGroup] = {};
  if (d < kLanes) {
    for (int64_t j = 0; j < kGroup; ++j) {
      out[j] = 0.0f;
      for (int64_t k = 0; k < d; ++k) out[j] += q[k] * Load::one(rows[j], k);
    }
    return;
  }
  int64_t k = 0;
  for (; k + kLanes <= d; k += kLanes) {
    const F32 part = load(q + k);
    for (int64_t j = 0; j < kGroup; ++j) acc[j] += part * Load::at(rows[j], k);
  }
  if (k < d) {
    const F32 part = kLane >= (int32_t)(k + kLanes - d) ? load(q + d - kLanes) : F32{};
    for (int64_t j = 0; j < kGroup; ++j) acc[j] += part * Load::at(rows[j], d - kLanes);
  }
  for (int64_t j = 0; j < kGroup; ++j) out[j] = total(acc[j]);
}

template <class Load>
void dot_rows(const float* q, const void* const* rows, int64_t count, int64_t d, float* out) {
  constexpr int64_t kGroup = 4, kAhead = 8;
  for (int64_t i = 0; i < std::min(kAhead, count); ++i) prefetch<Load>(rows[i], d);
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    for (int64_t j = i + kAhead; j < std::min(i + kAhead + kGroup, count); ++j) prefetch<Load>(rows[j], d);
    dot_group<Load, kGroup>(q, rows + i, d, out + i);
  }
  for (; i < count; ++i) dot_group<Load, 1>(q, rows + i, d, out + i);
}

template <class Load, int64_t kVectors>
ALTERREC_INLINE void sum_columns(const float* weight, const void* const* rows, int64_t count, int64_t k, float* acc) {
  F32 sum[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) sum[v] = load(acc + k + v * kLanes);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t v = 0; v < kVectors; ++v) sum[v] += weight[i] * Load::at(rows[i], k + v * kLanes);
  for (int64_t v = 0; v < kVectors; ++v) store(acc + k + v * kLanes, sum[v]);
}

template <class Load>
void weighted_sum(const float* weight, const void* const* rows, int64_t count, int64_t d, float* acc) {
  if (d < kLanes) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < d; ++k) acc[k] += weight[i] * Load::one(rows[i], k);
    return;
  }
  int64_t k = 0;
  for (; k + 8 * kLanes <= d; k += 8 * kLanes) sum_columns<Load, 8>(weight, rows, count, k, acc);
  for (; k + kLanes <= d; k += kLanes) sum_columns<Load, 1>(weight, rows, count, k, acc);
  if (k < d) {  // the last 16 elements again, less those that are done
    F32 sum = {};
    for (int64_t i = 0; i < count; ++i) sum += weight[i] * Load::at(rows[i], d - kLanes);
    store(acc + d - kLanes, load(acc + d - kLanes) + (kLane >= (int32_t)(k + kLanes - d) ? sum : F32{}));
  }
}

void affine(float a, const float* shift, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, a * load(y + i) + (shift ? load(shift + i) : F32{}));
  for (; i < n; ++i) y[i] = a * y[i] + (shift ? shift[i] : 0.0f);
}

void scale(float a, const float* x, int64_t n, float* out) {
  constexpr float kLeast = std::numeric_limits<float>::min();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32 y = a * load(x + i);
    const I32 normal = ((I32)y & 0x7fffffff) >= (I32)splat(kLeast);
    store(out + i, (F32)((I32)y & normal));
  }
  for (; i < n; ++i) out[i] = std::abs(a * x[i]) < kLeast ? 0.0f : a * x[i];
}

void add_scaled(float a, const float* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + a * load(x + i));
  for (; i < n; ++i) y[i] += a * x[i];
}

ALTERREC_INLINE I32 load_wide(const uint16_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const U16Memory*>(p), I32);
}

// Pairs of rows as 32-bit words.
ALTERREC_INLINE I32 load_pairs(const uint16_t* a, const uint16_t* b) { return load_wide(a) | (load_wide(b) << 16); }

void interleave(const uint16_t* a, const uint16_t* b, int64_t n, uint16_t* out) {
  for (int64_t c = 0; c < n; c += kLanes) {
    const I32 pairs = load_pairs(a + c, b + c);
    std::memcpy(out + 2 * c, &pairs, sizeof(pairs));
  }
}

// Lanes of a and b whose index has the bit kStep change places across the diagonal of a 2 x 2 block.
template <int kStep, int... kIndex>
ALTERREC_INLINE void swap_blocks(I32& a, I32& b, std::integer_sequence<int, kIndex...>) {
  const I32 first = __builtin_shufflevector(a, b, ((kIndex & kStep) ? 16 + kIndex - kStep : kIndex)...);
  b = __builtin_shufflevector(a, b, ((kIndex & kStep) ? 16 + kIndex : kIndex + kStep)...);
  a = first;
}

template <int kStep>
ALTERREC_INLINE void swap_all(I32* rows) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) swap_blocks<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, 16>());
}

void transpose(const uint16_t* in, int64_t stride, int64_t rows, int64_t cols, uint16_t* out, int64_t out_stride) {
  alignas(64) static constexpr uint16_t kZeros[kLanes] = {};
  for (int64_t r = 0; r < rows; r += 2 * kLanes) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      I32 block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t row = r + 2 * i;
        const uint16_t* even = row < rows ? in + row * stride + c : kZeros;
        block[i] = load_pairs(even, row + 1 < rows ? in + (row + 1) * stride + c : kZeros);
      }
      swap_all<1>(block);
      swap_all<2>(block);
      swap_all<4>(block);
      swap_all<8>(block);
      for (int64_t i = 0; i < kLanes; ++i) std::memcpy(out + (c + i) * out_stride + r, &block[i], sizeof(block[i]));
    }
  }
}

const LossKernels kernels = {
    row_max,
    row_exp,
    row_exp_bf16,
    {dot_rows<LoadF32>, dot_rows<LoadF32ToBF16>, dot_rows<LoadF32ToF16>, dot_rows<LoadBF16>, dot_rows<LoadF16>},
    {weighted_sum<LoadF32>, weighted_sum<LoadF32ToBF16>, weighted_sum<LoadF32ToF16>, weighted_sum<LoadBF16>,
     weighted_sum<LoadF16>},
    affine,
    scale,
    add_scaled,
    interleave,
    transpose,
};
