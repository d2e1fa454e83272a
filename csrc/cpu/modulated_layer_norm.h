// What the parts of the CPU backend of modulated_layer_norm and gated_residual share.
#pragma once

#include <cstdint>

#include "cpu/floats16.h"

namespace hitsr_fast::adaln {

// Rows of one image, [rows][C]; vectors of C floats belong to the image. What is summed over rows is added to, so that the
// caller decides in which order.
#define HITSR_ADALN_KERNELS(isa)                                                                                      \
  namespace isa {                                                                                                     \
  /* memory: [C] floats. mean, rstd: [rows]. */                                                                       \
  template <typename T, typename R>                                                                                   \
  void norm(                                                                                                          \
      const T* x, const float* scale, const float* shift, float eps, int64_t rows, int64_t C, float* memory, R* out,  \
      float* mean, float* rstd);                                                                                      \
  /* memory: [2 * C] floats. */                                                                                       \
  template <typename T>                                                                                               \
  void norm_backward(                                                                                                 \
      const T* grad, const T* x, const float* scale, const float* mean, const float* rstd, int64_t rows, int64_t C,   \
      float* memory, T* grad_x, float* grad_scale, float* grad_shift);                                                \
  template <typename T, typename R>                                                                                   \
  void residual(const T* x, const R* y, const float* gate, int64_t rows, int64_t C, T* out);                          \
  template <typename T>                                                                                               \
  void residual_backward(                                                                                             \
      const T* grad, const T* y, const float* gate, int64_t rows, int64_t C, T* grad_y, float* grad_gate);            \
  }
HITSR_ADALN_KERNELS(portable)
#if defined(__x86_64__)
HITSR_ADALN_KERNELS(avx2)
HITSR_ADALN_KERNELS(avx512)
#endif
#undef HITSR_ADALN_KERNELS

}  // namespace hitsr_fast::adaln
