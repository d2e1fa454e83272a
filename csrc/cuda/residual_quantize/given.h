// What the op of the CUDA backend of `residual_quantize` is given, checked and put into the kernel's arguments. The class
// of the tensors is open: tests ask with ones of their own, on machines without a GPU.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "arguments.h"
#include "tensor.h"

namespace hitsr_fast::residual {

// h0, w0, h1, w1, ... and a phi each, into `scales`.
inline int fill_scales(Shape flat, Shape phi_index, Scale* scales) {
  const size_t count = flat.size() / 2;
  HITSR_CHECK(
      count <= kMaxScales, "scales: expected at most ", kMaxScales, ", found ", count);
  HITSR_CHECK(phi_index.size() == count, "phi_index: expected ", count, " entries, found ", phi_index.size());
  for (size_t s = 0; s < count; ++s) {
    scales[s] = {static_cast<int>(flat[2 * s]), static_cast<int>(flat[2 * s + 1]), static_cast<int>(phi_index[s])};
  }
  return static_cast<int>(count);
}

// The values of a contiguous tensor on a device, at an address that suits what the kernel reads at once.
template <class T, class Tensor>
const T* pointer(const Tensor& tensor, Shape shape, ScalarType dtype, int device, const char* name) {
  HITSR_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == device, name, ": expected device cuda:", device, ", found ",
      tensor.is_cuda() ? "cuda:" : "another, ", tensor.get_device_index());
  check_dtype(tensor, dtype, name);
  check_contiguous(tensor, name);
  check_shape(tensor, shape, name);
  const void* first = tensor.data_ptr();
  HITSR_CHECK(
      reinterpret_cast<uintptr_t>(first) % alignof(T) == 0, name, ": expected data aligned to ", alignof(T), " bytes");
  return static_cast<const T*>(first);
}

// All arguments but the outputs, the plan's and phi's ratio. z and parts may be missing: the codes of `replay` are then
// decoded. parts: as packed_codebook.pack_triton makes them; phi_weight: as residual_quantize_cuda.pack_phi does.
template <class Tensor>
Arguments given(
    const std::optional<Tensor>& z, const Tensor& codebook, const std::vector<Tensor>& parts,
    const Tensor& phi_weight, const Tensor& phi_bias, Shape flat, Shape phi_index,
    const std::optional<Tensor>& replay, int64_t B, Shape size, int device) {
  Arguments args = {};
  args.num_scales = fill_scales(flat, phi_index, args.scales);
  int64_t T = 0;
  for (int s = 0; s < args.num_scales; ++s) T += int64_t(args.scales[s].height) * args.scales[s].width;
  const int64_t K = codebook.size(0), C = codebook.size(1), H = size[0], W = size[1], P = phi_bias.size(0);
  const int64_t CP = std::max<int64_t>(C, 16), T0 = replay.has_value() ? replay->size(1) : 0;
  HITSR_CHECK(has_channels(static_cast<int>(C)), "codebook: expected 8, 16, 32 or 64 channels, found ", C);
  HITSR_CHECK(z.has_value() || T0 == T, "replay: expected ", T, " tokens to decode, found ", T0);
  for (int64_t phi : phi_index) {
    HITSR_CHECK(phi >= 0 && phi < P, "phi_index: expected 0 to ", P - 1, ", found ", phi);
  }

  const int64_t tiles = (K + kTile - 1) / kTile, codes = tiles * kTile;
  constexpr auto kFloat = ScalarType::Float;
  if (z.has_value()) {
    HITSR_CHECK(parts.size() == 5, "parts: expected 5 tensors, found ", parts.size());
    args.z = pointer<float>(*z, {B, C, H, W}, kFloat, device, "z");
    args.mean = pointer<float>(parts[0], {1, C}, kFloat, device, "mean");
    args.codes = pointer<block::Word4>(parts[1], {1, codes, CP}, ScalarType::Half, device, "codes");
    args.half_norms = pointer<block::Float4>(parts[2], {1, codes}, kFloat, device, "half_norms");
    args.exact = pointer<block::Float4>(parts[3], {1, tiles * kClasses, C, kMembers}, kFloat, device, "exact");
    args.bounds = pointer<float>(parts[4], {1, 5}, kFloat, device, "bounds");
  }
  args.codebook = pointer<float>(codebook, {K, C}, kFloat, device, "codebook");
  args.weight = pointer<block::Float4>(phi_weight, {P, 9, C / 4, C, 4}, kFloat, device, "phi_weight");
  args.bias = pointer<float>(phi_bias, {P, C}, kFloat, device, "phi_bias");
  if (T0 > 0) args.replay = pointer<int64_t>(*replay, {B, T0}, ScalarType::Long, device, "replay");
  args.batch = static_cast<int>(B);
  args.height = static_cast<int>(H);
  args.width = static_cast<int>(W);
  args.size = static_cast<int>(K);
  args.tiles = static_cast<int>(tiles);
  args.tokens = static_cast<int>(T);
  args.replayed = static_cast<int>(T0);
  return args;
}

}  // namespace hitsr_fast::residual
