#include "cpu/pack.h"

#include "cpu/isa.h"

#ifdef ALTERREC_X86
#include <immintrin.h>

#define ALTERREC_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define ALTERREC_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")))

namespace alterrec {
namespace {

// Asks for the same place of row + kPanel, for the next panel: the catalog streams from memory, and so many rows at a
// time are more than the hardware follows.
inline void prefetch_next_panel(const Matrix& x, int64_t row, int64_t c) {
  const auto place = reinterpret_cast<uintptr_t>(x.data) + ((row + kPanel) * x.stride + c) * bytes_of(x.format);
  __builtin_prefetch(reinterpret_cast<const void*>(place), 0, 2);  // it may lie beyond the catalog: no access, no fault
}

// Elements [c, c + 32) of a row as bfloat16; `left` of them exist, the others are zero.
ALTERREC_BF16 inline __m512i load_pairs(const Matrix& x, int64_t row, int64_t c, int64_t left) {
  const uint32_t mask = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
  if (x.format == Format::kBF16) return _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x.row(row)) + c);
  const float* p = static_cast<const float*>(x.row(row)) + c;
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Elements [c, c + 16) of a row as float32, rounded to the precision (ties to even); `left` of them exist, the others
// are zero.
ALTERREC_AVX512 inline __m512i load_floats(const Matrix& x, int64_t row, int64_t c, int64_t left, Format precision) {
  const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1u);
  if (x.format != Format::kF32) {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x.row(row)) + c);
    if (x.format == Format::kF16) return _mm512_castps_si512(_mm512_cvtph_ps(bits));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
  }
  const __m512i bits = _mm512_maskz_loadu_epi32(mask, static_cast<const float*>(x.row(row)) + c);
  if (precision == Format::kF32) return bits;
  const __m512 value = _mm512_castsi512_ps(bits);
  if (precision == Format::kF16) {
    const __m256i half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_castps_si512(_mm512_cvtph_ps(half));
  }
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);  // adding would carry a NaN over to zero
  return _mm512_mask_mov_epi32(_mm512_and_si512(sum, _mm512_set1_epi32(-65536)), nan, bits);
}

// 16 x 16 transpose of 32-bit words: floats, or pairs of bfloat16.
ALTERREC_AVX512 inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

}  // namespace

ALTERREC_BF16 void pack_pairs_bf16(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out) {
  for (int64_t half = 0; half < kPanel; half += 16) {
    for (int64_t c = 0; c < width; c += 32) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t left = x.cols - c;
        prefetch_next_panel(x, begin + half + i, c);
        if (x.format == Format::kF32) prefetch_next_panel(x, begin + half + i, c + 16);
        r[i] = half + i < count && left > 0 ? load_pairs(x, begin + half + i, c, left) : _mm512_setzero_si512();
      }
      transpose(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + (c / 2 + i) * 2 * kPanel + 2 * half, r[i]);
    }
  }
}

ALTERREC_AVX512 void pack_floats_avx512(const Matrix& x, int64_t begin, int64_t count, Format precision, float* out) {
  for (int64_t half = 0; half < kPanel; half += 16) {
    for (int64_t c = 0; c < x.cols; c += 16) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        prefetch_next_panel(x, begin + half + i, c);
        r[i] = half + i < count ? load_floats(x, begin + half + i, c, x.cols - c, precision) : _mm512_setzero_si512();
      }
      transpose(r);
      const int64_t rows = x.cols - c < 16 ? x.cols - c : 16;
      for (int64_t i = 0; i < rows; ++i) _mm512_storeu_si512(out + (c + i) * kPanel + half, r[i]);
    }
  }
}

}  // namespace alterrec
#endif
