// The instruction sets' own versions: each call replaces the entries it does better.
#pragma once

#include "cpu/kernels.h"

namespace alterrec {

void use_avx2(Kernels& k);
void use_avx512(Kernels& k);
void use_amx(Kernels& k);

}  // namespace alterrec
