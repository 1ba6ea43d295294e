#include "cpu/isa.h"
#include "cpu/kernels_x86.h"

#ifdef ALTERREC_X86
#include <immintrin.h>

namespace alterrec {

void use_avx512(Kernels&) {}

}  // namespace alterrec
#endif
