#pragma once

#include "cpu/tile.h"

namespace alterrec {

// Kernels::pack_panel on CPUs with matrix units, which convert to bfloat16 in one instruction.
void pack_panel_amx(const Matrix& x, int64_t begin, int64_t count, int64_t width, uint16_t* out);

}  // namespace alterrec
