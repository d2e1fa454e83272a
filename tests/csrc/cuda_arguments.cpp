// Asks the checks of the CUDA backend's ops what they think of arguments that are described on standard input, one call a
// line, which begins with the op; prints "ok" or the error. test_cuda_arguments.py writes the lines.
#include <iostream>
#include <sstream>

#include "../../csrc/cuda/residual_decode_backward/given.h"
#include "../../csrc/cuda/residual_quantize/given.h"

namespace {

using hitsr_fast::ScalarType;
using hitsr_fast::Shape;

// What the checks ask of a tensor.
struct Described {
  int device = 0;
  ScalarType dtype{};
  uintptr_t address = 0;
  bool contiguous = false;
  std::vector<int64_t> shape;

  bool is_cuda() const { return true; }
  int get_device_index() const { return device; }
  ScalarType scalar_type() const { return dtype; }
  bool is_contiguous() const { return contiguous; }
  Shape sizes() const { return shape; }
  std::vector<int64_t> strides() const { return {}; }
  int64_t size(int64_t axis) const { return shape.at(static_cast<size_t>(axis)); }
  void* data_ptr() const { return reinterpret_cast<void*>(address); }
};

std::vector<int64_t> numbers(std::istream& line) {
  size_t count;
  line >> count;
  std::vector<int64_t> found(count);
  for (int64_t& value : found) line >> value;
  return found;
}

// "0", or "1" and the tensor.
std::optional<Described> tensor(std::istream& line) {
  int there, dtype;
  line >> there;
  if (there == 0) return std::nullopt;
  Described found;
  line >> found.device >> dtype >> found.address >> found.contiguous;
  found.dtype = static_cast<ScalarType>(dtype);
  found.shape = numbers(line);
  return found;
}

void quantize(std::istream& line) {
  const auto z = tensor(line), codebook = tensor(line), phi_weight = tensor(line), phi_bias = tensor(line);
  const auto replay = tensor(line);
  size_t count;
  line >> count;
  std::vector<Described> parts;
  while (parts.size() < count) parts.push_back(*tensor(line));
  const auto scales = numbers(line), phi_index = numbers(line), size = numbers(line);
  int64_t batch;
  line >> batch;
  if (!line) throw std::invalid_argument("the line is too short");
  hitsr_fast::residual::given(
      z, *codebook, parts, *phi_weight, *phi_bias, Shape(scales), Shape(phi_index), replay, batch, Shape(size), 0);
}

void decode_backward(std::istream& line) {
  std::vector<Described> tensors;
  while (tensors.size() < 7) tensors.push_back(*tensor(line));
  const auto scales = numbers(line), phi_index = numbers(line);
  double ratio;
  line >> ratio;
  if (!line) throw std::invalid_argument("the line is too short");
  hitsr_fast::residual_backward::given(
      tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], tensors[6], Shape(scales),
      Shape(phi_index), ratio, 0);
}

std::string answer(const std::string& text) {
  std::istringstream line(text);
  std::string op;
  line >> op;
  try {
    op == "residual_quantize" ? quantize(line) : decode_backward(line);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "ok";
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) std::cout << answer(line) << '\n';
}
