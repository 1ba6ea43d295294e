// Which instruction set the kernels use: found at run time, one binary for all CPUs.
#pragma once

namespace alterrec {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The best set of this CPU, or the one named by ALTERREC_FAST_ISA (scalar, avx2, avx512, avx512_bf16, amx) where that
// is lower. Throws std::invalid_argument for another name. The variable is read once.
//
// kAvx512Bf16 and kAmx run the same code of ours; which of the two sets of instructions multiplies is up to the BLAS
// behind bf16_gemm, which takes the best that the CPU has.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace alterrec

#if defined(__x86_64__)
#define ALTERREC_X86 1
#endif
