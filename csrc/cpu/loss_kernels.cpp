#include "cpu/loss_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/half.h"
#include "cpu/isa.h"
#include "cpu/table_kernels.h"

#ifdef ALTERREC_X86
#include <immintrin.h>
#endif

// Vectors are only passed to functions that are always inlined, so their calling convention does not matter.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define ALTERREC_INLINE inline __attribute__((always_inline))
#define ALTERREC_INLINE_LAMBDA __attribute__((always_inline))

namespace alterrec {
namespace {

namespace plain {
ALTERREC_INLINE void widen_f16(const uint16_t* in, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = from_f16(in[i]);
}
ALTERREC_INLINE void round_f16(const float* in, float* out) {
  for (int i = 0; i < 16; ++i) out[i] = from_f16(to_f16(in[i]));
}
#include "cpu/loss_kernels_impl.h"
#include "cpu/table_kernels_impl.h"
}  // namespace plain

#if defined(ALTERREC_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
ALTERREC_INLINE void widen_f16(const uint16_t* in, float* out) {
  for (int i = 0; i < 16; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
}
ALTERREC_INLINE void round_f16(const float* in, float* out) {
  for (int i = 0; i < 16; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
}
#include "cpu/loss_kernels_impl.h"
#include "cpu/table_kernels_impl.h"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
namespace avx512 {
ALTERREC_INLINE void widen_f16(const uint16_t* in, float* out) {
  _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in))));
}
ALTERREC_INLINE void round_f16(const float* in, float* out) {
  const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm512_storeu_ps(out, _mm512_cvtph_ps(half));
}
#include "cpu/loss_kernels_impl.h"
#include "cpu/table_kernels_impl.h"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

}  // namespace

const LossKernels& loss_kernels() {
#if defined(ALTERREC_X86)
  if (isa() >= Isa::kAvx512) return avx512::kernels;
  if (isa() == Isa::kAvx2) return avx2::kernels;
#endif
  return plain::kernels;
}

const TableKernels& table_kernels() {
#if defined(ALTERREC_X86)
  if (isa() >= Isa::kAvx512) return avx512::for_tables;
  if (isa() == Isa::kAvx2) return avx2::for_tables;
#endif
  return plain::for_tables;
}

}  // namespace alterrec
