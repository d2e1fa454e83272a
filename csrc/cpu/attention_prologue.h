// What the parts of the CPU backend of attention_prologue share.
#pragma once

#include <cstdint>

#include "cpu/floats16.h"

namespace hitsr_fast::prologue {

// What happens to q, k or v of one token.
struct Steps {
  const float* bias;    // [heads * D], or null
  bool norm;            // each head is brought to length one,
  const float* scale;   // and then multiplied: [heads], or null
  const float* rotary;  // [D / 2][2], or null
};

// from: [heads][D]. Head h goes to `to + h * stride`. memory: [heads * (D + 1)] floats.
#define HITSR_PROLOGUE_KERNELS(isa)                                                                             \
  namespace isa {                                                                                               \
  template <typename T, typename U>                                                                             \
  void part(const T* from, const Steps& steps, int64_t heads, int64_t D, float* memory, U* to, int64_t stride); \
  }
HITSR_PROLOGUE_KERNELS(portable)
#if defined(__x86_64__)
HITSR_PROLOGUE_KERNELS(avx2)
HITSR_PROLOGUE_KERNELS(avx512)
#endif
#undef HITSR_PROLOGUE_KERNELS

}  // namespace hitsr_fast::prologue
