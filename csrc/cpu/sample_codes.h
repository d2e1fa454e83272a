// What the parts of the CPU backend of sample_codes share. docs/ops/sample_codes.md has the definition.
#pragma once

#include <cstdint>

namespace hitsr_fast::sampling {

// Of 2^-62: a share of a sum of weights.
struct Fraction {
  int64_t high, low;  // 31 bits each
};

struct Options {
  float cond, uncond;  // factors of the two logits: 1 + guidance and guidance
  float scale;         // log2(e) / temperature
  int64_t top_k;       // 0: all
  bool top_p;
  Fraction dropped;    // 1 - top_p
};

// Memory of one thread, [V] each.
struct Workspace {
  int32_t* keys;
  int32_t* places;
  int32_t* weights;
};

#define HITSR_SAMPLING_KERNELS(isa)                                                                                   \
  namespace isa {                                                                                                     \
  /* Index of the first of the largest logits of a row. uncond_logits: null without guidance. */                      \
  int64_t largest(const Options&, const float* logits, const float* uncond_logits, int64_t V, const Workspace&);      \
  /* Index that a random fraction draws from a row. */                                                                \
  int64_t draw(                                                                                                       \
      const Options&, const float* logits, const float* uncond_logits, int64_t V, const Fraction& random,             \
      const Workspace&);                                                                                              \
  }
HITSR_SAMPLING_KERNELS(portable)
#if defined(__x86_64__)
HITSR_SAMPLING_KERNELS(avx2)
HITSR_SAMPLING_KERNELS(avx512)
#endif
#undef HITSR_SAMPLING_KERNELS

}  // namespace hitsr_fast::sampling
