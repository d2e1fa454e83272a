// What the parts of the CPU backend of group_norm_silu share.
#pragma once

#include <cstdint>

#include "cpu/floats16.h"

namespace hitsr_fast::group_norm {

// Moments are the mean of some values, and the sum of the squares of their deviations from it. A value x becomes
// silu((x - mean) * factor + offset).
#define HITSR_GROUP_NORM_KERNELS(isa)                                                                             \
  namespace isa {                                                                                                 \
  /* Of x [pixels][groups][width], for each group. memory: [3 * groups * width] floats. */                        \
  template <typename T>                                                                                           \
  void moments_of_pixels(                                                                                         \
      const T* x, int64_t pixels, int64_t groups, int64_t width, float* memory, float* mean, float* squares);     \
  /* Of x [count]. */                                                                                             \
  template <typename T>                                                                                           \
  void moments_of_run(const T* x, int64_t count, float* mean, float* squares);                                    \
  /* Of x [pixels][C]. mean, factor, offset: [C]. */                                                              \
  template <typename T>                                                                                           \
  void apply_to_pixels(                                                                                           \
      const T* x, const float* mean, const float* factor, const float* offset, int64_t pixels, int64_t C, T* out); \
  /* Of x [count]. */                                                                                             \
  template <typename T>                                                                                           \
  void apply_to_run(const T* x, float mean, float factor, float offset, int64_t count, T* out);                   \
  }
HITSR_GROUP_NORM_KERNELS(portable)
#if defined(__x86_64__)
HITSR_GROUP_NORM_KERNELS(avx2)
HITSR_GROUP_NORM_KERNELS(avx512)
#endif
#undef HITSR_GROUP_NORM_KERNELS

}  // namespace hitsr_fast::group_norm
