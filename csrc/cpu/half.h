// float16 without instructions for it.
#pragma once

#include <cstdint>
#include <cstring>

namespace alterrec {

inline float from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  uint32_t bits = (magnitude << 13) + (112u << 23);  // the exponents' biases are 15 and 127
  if (magnitude >= 0x7c00u) {                        // infinity or NaN
    bits = (magnitude << 13) | 0x7f800000u;
  } else if (magnitude < 0x400u) {  // denormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// The nearest float16, ties to even; infinity from 65520 on.
inline uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // infinity
  if (magnitude < 0x38800000u) {  // denormal: the spacing of floats at 1/2 is 2^-24, so that adding 1/2 rounds
    float value;
    std::memcpy(&value, &magnitude, 4);
    value += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &value, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

}  // namespace alterrec
