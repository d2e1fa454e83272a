// The 16-bit floats as they lie in memory, and to and from them, without a branch, for loops that the compiler turns
// into vectors. Rounding is to the nearest, ties to even; NaN stays NaN. Always inlined: compiled for whatever
// instruction set their user is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

namespace hitsr_fast {

// Upper half of a float.
struct Bfloat16 {
  uint16_t bits;
};

// A sign, five bits of exponent, ten of fraction.
struct Half {
  uint16_t bits;
};

#define HITSR_INLINE __attribute__((always_inline)) inline

HITSR_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

HITSR_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// In place of `?:`, which keeps a compiler that minds floating-point exceptions from computing both.
HITSR_INLINE uint32_t either(bool first, uint32_t a, uint32_t b) {
  const uint32_t mask = -static_cast<uint32_t>(first);
  return (a & mask) | (b & ~mask);
}

HITSR_INLINE float wide(float value) { return value; }
HITSR_INLINE float wide(Bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
HITSR_INLINE float wide(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu, shifted = magnitude << 13;
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = either(magnitude < 0x400, subnormal, shifted + (112u << 23));
  return float_of(sign | either(magnitude < 0x7c00, finite, shifted | 0x7f800000));
}

HITSR_INLINE void narrow(float value, float* to) { *to = value; }
HITSR_INLINE void narrow(float value, Bfloat16* to) {
  const uint32_t bits = bits_of(value), rounded = bits + 0x7fff + ((bits >> 16) & 1);
  // The magnitude of NaN is past infinity's; it is kept, with a bit set.
  to->bits = static_cast<uint16_t>(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16);
}
HITSR_INLINE void narrow(float value, Half* to) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Neighbours of 0.5 are 2^-24 apart, as are subnormal numbers: the sum rounds to one of them.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = either(magnitude < 0x38800000, subnormal, normal);  // 2^-14
  const uint32_t special = either(magnitude > 0x7f800000, 0x7e00, 0x7c00);
  to->bits = static_cast<uint16_t>(sign | either(magnitude < 0x477ff000, finite, special));  // halfway to 2^16
}

}  // namespace hitsr_fast
