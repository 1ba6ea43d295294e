// The groups of 16 floats that the inner loops are written in, for each instruction set, and the choice among them.
#include "cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/half.h"
#include "cpu/isa.h"
#include "cpu/pack.h"

#ifdef ALTERREC_X86
#include <immintrin.h>
#endif

namespace alterrec {
namespace {

namespace plain {
struct Floats {
  float x[kGroup];
};
struct Ids {
  int32_t x[kGroup];
};
using Mask = uint16_t;

inline Floats load(const float* p) {
  Floats out;
  std::memcpy(out.x, p, sizeof(out.x));
  return out;
}
inline void store(float* p, const Floats& x) { std::memcpy(p, x.x, sizeof(x.x)); }
inline Floats load_f16(const uint16_t* p) {
  Floats out;
  for (int i = 0; i < kGroup; ++i) out.x[i] = from_f16(p[i]);
  return out;
}
inline void store_f16(uint16_t* p, const Floats& x) {
  for (int i = 0; i < kGroup; ++i) p[i] = to_f16(x.x[i]);
}
inline Floats smaller(const Floats& a, const Floats& b) {
  Floats out;
  for (int i = 0; i < kGroup; ++i) out.x[i] = a.x[i] < b.x[i] ? a.x[i] : b.x[i];
  return out;
}
inline Floats larger(const Floats& a, const Floats& b) {
  Floats out;
  for (int i = 0; i < kGroup; ++i) out.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
  return out;
}
inline Ids load_ids(const int32_t* p) {
  Ids out;
  std::memcpy(out.x, p, sizeof(out.x));
  return out;
}
inline Ids ids_from(int32_t first) {
  Ids out;
  for (int32_t i = 0; i < kGroup; ++i) out.x[i] = first + i;
  return out;
}
inline Floats splat(float x) {
  Floats out;
  for (float& y : out.x) y = x;
  return out;
}
inline Ids splat_ids(int32_t x) {
  Ids out;
  for (int32_t& y : out.x) y = x;
  return out;
}
inline Mask le(const Ids& a, const Ids& b) {
  uint32_t mask = 0;
  for (int i = 0; i < kGroup; ++i) mask |= static_cast<uint32_t>(a.x[i] <= b.x[i]) << i;
  return static_cast<Mask>(mask);
}
inline Mask ge(const Floats& a, const Floats& b) {
  uint32_t mask = 0;
  for (int i = 0; i < kGroup; ++i) mask |= static_cast<uint32_t>(a.x[i] >= b.x[i]) << i;
  return static_cast<Mask>(mask);
}
inline Floats add_zero_times(const Floats& x, const Floats& sum) {
  Floats out;
  for (int i = 0; i < kGroup; ++i) out.x[i] = x.x[i] * 0.0f + sum.x[i];
  return out;
}
inline bool all_zero(const Floats& x) { return ge(x, splat(0.0f)) == 0xffff; }
template <typename T, typename Group>
inline void append(T* out, const Group& group, Mask mask) {
  for (uint32_t left = mask; left != 0; left &= left - 1) *out++ = group.x[__builtin_ctz(left)];
}
#include "cpu/kernels_impl.h"
}  // namespace plain

#ifdef ALTERREC_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#endif
namespace avx2 {
struct Floats {
  __m256 low, high;
};
struct Ids {
  __m256i low, high;
};
using Mask = uint16_t;

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, const Floats& x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline Floats load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_f16(uint16_t* p, const Floats& x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats smaller(const Floats& a, const Floats& b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Floats larger(const Floats& a, const Floats& b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Ids load_ids(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline Ids ids_from(int32_t first) {
  const __m256i low = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return {low, _mm256_add_epi32(low, _mm256_set1_epi32(8))};
}
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ids splat_ids(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Mask le(const Ids& a, const Ids& b) {
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.low, b.low)));
  const int high = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.high, b.high)));
  return static_cast<Mask>(~(low | high << 8));
}
inline Mask ge(const Floats& a, const Floats& b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
  return static_cast<Mask>(low | high << 8);
}
inline Floats add_zero_times(const Floats& x, const Floats& sum) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_fmadd_ps(x.low, zero, sum.low), _mm256_fmadd_ps(x.high, zero, sum.high)};
}
inline bool all_zero(const Floats& x) { return ge(x, splat(0.0f)) == 0xffff; }
template <typename T>
inline void append_each(T* out, const T* group, Mask mask) {
  for (uint32_t left = mask; left != 0; left &= left - 1) *out++ = group[__builtin_ctz(left)];
}
inline void append(float* out, const Floats& x, Mask mask) {
  float group[kGroup];
  store(group, x);
  append_each(out, group, mask);
}
inline void append(int32_t* out, const Ids& x, Mask mask) {
  int32_t group[kGroup];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(group), x.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(group + 8), x.high);
  append_each(out, group, mask);
}
#include "cpu/kernels_impl.h"
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,avx512f,avx512bw,avx512vl,avx512dq"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
namespace avx512 {
using Floats = __m512;
using Ids = __m512i;
using Mask = __mmask16;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Ids load_ids(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Ids ids_from(int32_t first) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_set1_epi32(first), lane);
}
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Ids splat_ids(int32_t x) { return _mm512_set1_epi32(x); }
inline Mask le(Ids a, Ids b) { return _mm512_cmple_epi32_mask(a, b); }
inline Mask ge(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Floats add_zero_times(Floats x, Floats sum) { return _mm512_fmadd_ps(x, _mm512_setzero_ps(), sum); }
inline bool all_zero(Floats x) { return ge(x, splat(0.0f)) == 0xffff; }
// Whole groups are written: compressing to memory is slow on some CPUs, and lists have room beyond their end.
inline void append(float* out, Floats x, Mask mask) { _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, x)); }
inline void append(int32_t* out, Ids x, Mask mask) { _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, x)); }
#include "cpu/kernels_impl.h"
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

Kernels chosen() {
#ifdef ALTERREC_X86
  Kernels table = isa() >= Isa::kAvx512 ? avx512::kTable : isa() == Isa::kAvx2 ? avx2::kTable : plain::kTable;
  if (isa() >= Isa::kAvx512) table.pack_floats = pack_floats_avx512;
  if (isa() >= Isa::kAvx512Bf16) table.pack_pairs = pack_pairs_bf16;
  return table;
#else
  return plain::kTable;
#endif
}

}  // namespace

const Kernels& kernels() {
  static const Kernels value = chosen();
  return value;
}

}  // namespace alterrec
