#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/blas.h"

namespace alterrec {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

Isa best() {
#ifdef ALTERREC_X86
  // Every CPU with AVX2 has F16C too, whose name not every compiler knows.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && has_bf16_product()) return __builtin_cpu_supports("amx-bf16") ? Isa::kAmx : Isa::kAvx512Bf16;
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

Isa chosen() {
  const Isa top = best();
  const char* asked = std::getenv("ALTERREC_FAST_ISA");
  if (asked == nullptr || *asked == '\0') return top;
  for (int i = 0; i <= static_cast<int>(Isa::kAmx); ++i) {
    if (std::string(asked) == kNames[i]) return std::min(top, static_cast<Isa>(i));
  }
  throw std::invalid_argument(std::string("ALTERREC_FAST_ISA must be scalar, avx2, avx512, avx512_bf16 or amx, got ") +
                              asked);
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace alterrec
