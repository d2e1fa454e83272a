// Argument checks of the compiled backends. The public ops have checked dtypes and shapes before; these guard the
// raw pointers, and name the argument in the same way.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace hitsr_fast {

inline void check_cpu(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, ": expected device cpu, found ", tensor.device());
}

inline void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(
      tensor.is_contiguous(), name, ": expected a contiguous tensor, found strides ", tensor.strides());
}

inline void check_dtype(const at::Tensor& tensor, at::ScalarType dtype, const char* name) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == dtype, name, ": expected dtype ", dtype, ", found ", tensor.scalar_type());
}

}  // namespace hitsr_fast
