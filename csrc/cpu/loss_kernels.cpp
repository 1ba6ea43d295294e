#include "cpu/loss_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/isa.h"
#include "cpu/table_kernels.h"

// Vectors are only passed to functions that are always inlined, so their calling convention does not matter.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define ALTERREC_INLINE inline __attribute__((always_inline))
#define ALTERREC_INLINE_LAMBDA __attribute__((always_inline))

namespace alterrec {
namespace {

namespace plain {
#include "cpu/loss_kernels_impl.h"
#include "cpu/table_kernels_impl.h"
}

#if defined(ALTERREC_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "cpu/loss_kernels_impl.h"
#include "cpu/table_kernels_impl.h"
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
#include "cpu/loss_kernels_impl.h"
#include "cpu/table_kernels_impl.h"
}
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
