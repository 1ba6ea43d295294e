// The number formats of embeddings.
#pragma once

#include <cstdint>

namespace alterrec {

// How values are stored, or what they are rounded to before they are multiplied.
enum class Format { kF32, kBF16, kF16 };

inline int64_t bytes_of(Format format) { return format == Format::kF32 ? 4 : 2; }

}  // namespace alterrec
