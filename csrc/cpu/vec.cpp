#include "vec.h"

#include <algorithm>
#include <limits>

#include "isa.h"

#define ALTERREC_INLINE inline __attribute__((always_inline))
#define ALTERREC_INLINE_LAMBDA __attribute__((always_inline))

namespace alterrec {
namespace {

namespace plain {
#include "vec_kernels.inc"
}

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "vec_kernels.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
namespace avx512 {
#include "vec_kernels.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

}  // namespace

const Vec& vec() {
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return avx512::kernels;
  if (isa() == Isa::kAvx2) return avx2::kernels;
#endif
  return plain::kernels;
}

}  // namespace alterrec
