// Which instruction set the kernels use: found at run time, one binary for all CPUs.
#pragma once

namespace alterrec {

enum class Isa { kScalar, kAvx2, kAvx512, kAmx };

// The best set of this CPU, or the one named by ALTERREC_FAST_ISA (scalar, avx2, avx512, amx) where that is lower.
// Throws std::invalid_argument for another name. The variable is read once.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace alterrec

// Marks a function compiled for more than the baseline; only code behind a check of isa() may call it.
#if defined(__x86_64__)
#define ALTERREC_X86 1
#define ALTERREC_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt,lzcnt")))
#define ALTERREC_AVX512 \
  __attribute__((target("avx2,fma,bmi,bmi2,popcnt,lzcnt,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#endif
