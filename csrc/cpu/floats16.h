// The 16-bit floats as they lie in memory.
#pragma once

#include <cstdint>

namespace hitsr_fast {

// Upper half of a float.
struct Bfloat16 {
  uint16_t bits;
};

// A sign, five bits of exponent, ten of fraction.
struct Half {
  uint16_t bits;
};

}  // namespace hitsr_fast
