// What the bindings take of PyTorch: its stable ABI alone, so that one build serves every torch from 2.10 on. Kernels
// see nothing of it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/vectors/floats16.h"

namespace hitsr_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::ostream& operator<<(std::ostream& out, Shape shape) {
  const char* between = "";
  out << '[';
  for (const int64_t side : shape) out << std::exchange(between, ", ") << side;
  return out << ']';
}

// Python sees a ValueError. The public ops have checked their arguments before; these checks guard the raw pointers.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}
#define HITSR_CHECK(condition, ...)                    \
  do {                                                 \
    if (!(condition)) hitsr_fast::refuse(__VA_ARGS__); \
  } while (false)

inline void check_cpu(const Tensor& tensor, const char* name) {
  HITSR_CHECK(tensor.is_cpu(), name, ": expected device cpu, found ", tensor.is_cuda() ? "cuda" : "another");
}
template <class T = Tensor>
void check_contiguous(const T& tensor, const char* name) {
  HITSR_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, found strides ", tensor.strides());
}
template <class T = Tensor>
void check_dtype(const T& tensor, ScalarType dtype, const char* name) {
  HITSR_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ", dtype, ", found ", tensor.scalar_type());
}
template <class T = Tensor>
void check_shape(const T& tensor, Shape shape, const char* name) {
  HITSR_CHECK(tensor.sizes() == shape, name, ": expected shape ", shape, ", found ", tensor.sizes());
}

// On the CPU, contiguous. Not through the dispatcher, which takes as long as a small kernel.
inline Tensor empty(Shape shape, ScalarType dtype) {
  namespace stable = torch::stable::detail;
  int64_t strides[8], stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides, stable::to<int32_t>(stable::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
// A tensor's values of some dtype, in a row; itself where it lies so.
inline Tensor in_a_row(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
  Tensor found = empty(tensor.sizes(), dtype);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(found.get(), tensor.get(), 0));
  return found;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls `run` with a value of the tensor's type.
template <typename F>
void visit_dtype(const Tensor& tensor, const char* name, const F& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(Half{});
    case ScalarType::BFloat16:
      return run(Bfloat16{});
    default:
      refuse(name, ": expected dtype float16, bfloat16 or float32, found ", tensor.scalar_type());
  }
}

// Declares a private op and gives it its one implementation: define(library, "name(...) -> ...", TORCH_BOX(&function)).
inline void define(
    torch::stable::detail::StableLibrary& library, const char* schema,
    void (*function)(StableIValue*, uint64_t, uint64_t)) {
  library.def(schema).impl(std::string(schema, std::strcspn(schema, "(")).c_str(), function);
}

}  // namespace hitsr_fast
