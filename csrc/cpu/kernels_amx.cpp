#include "cpu/kernels_amx.h"

#include "cpu/isa.h"

#ifdef ALTERREC_X86
#include <immintrin.h>

#define ALTERREC_AMX                                                                                             \
  __attribute__((target("avx2,fma,bmi,bmi2,popcnt,lzcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-" \
                        "vector-width=512")))

namespace alterrec {
namespace {

// Elements [c, c + 32) of a row as bfloat16; `left` of them exist, the others are zero.
ALTERREC_AMX inline __m512i load_pairs(const Matrix& x, int64_t row, int64_t c, int64_t left) {
  const uint32_t mask = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
  if (x.bf16) return _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x.data) + row * x.stride + c);
  const float* p = static_cast<const float*>(x.data) + row * x.stride + c;
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// 16 x 16 transpose of 32-bit words, here pairs of bfloat16.
ALTERREC_AMX inline void transpose(__m512i r[16]) {
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

ALTERREC_AMX void pack_panel_amx(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out) {
  for (int64_t half = 0; half < kPanel; half += 16) {
    for (int64_t c = 0; c < width; c += 32) {
      __m512i r[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t left = x.cols - c;
        r[i] = half + i < count && left > 0 ? load_pairs(x, begin + half + i, c, left) : _mm512_setzero_si512();
      }
      transpose(r);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + (c / 2 + i) * 2 * kPanel + 2 * half, r[i]);
    }
  }
}

}  // namespace alterrec
#endif
