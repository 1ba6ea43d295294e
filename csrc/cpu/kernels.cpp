// Plain C++ versions of the inner loops, and the choice among all versions.
#include "cpu/kernels.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/kernels_x86.h"

namespace alterrec {
namespace {

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

void widen(const uint16_t* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(in[i]);
}

void round(const float* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(to_bf16(in[i]));
}

void narrow(const float* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(in[i]);
}

void pack_panel(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out) {
  std::fill(out, out + width * kPanel, uint16_t{0});
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = (begin + r) * x.stride;
    for (int64_t c = 0; c < x.cols; ++c) {
      const uint16_t value = x.bf16 ? static_cast<const uint16_t*>(x.data)[row + c]
                                    : to_bf16(static_cast<const float*>(x.data)[row + c]);
      out[c / 2 * 2 * kPanel + 2 * r + c % 2] = value;
    }
  }
}

Kernels chosen() {
  Kernels k{widen, round, narrow, pack_panel};
#ifdef ALTERREC_X86
  if (isa() >= Isa::kAvx2) use_avx2(k);
  if (isa() >= Isa::kAvx512) use_avx512(k);
  if (isa() >= Isa::kAmx) use_amx(k);
#endif
  return k;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels value = chosen();
  return value;
}

}  // namespace alterrec
