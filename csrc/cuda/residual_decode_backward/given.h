// What the op of the CUDA backend of `residual_decode_backward` is given, checked and put into the kernels' arguments. The
// class of the tensors is open, as in residual_quantize/given.h.
#pragma once

#include "../residual_quantize/given.h"
#include "arguments.h"

namespace hitsr_fast::residual_backward {

// All arguments but the outputs and what the kernels leave for each other; the work is cut.
template <class Tensor>
Arguments given(
    const Tensor& grad, const Tensor& grad_per_scale, const Tensor& indices, const Tensor& codes, const Tensor& order,
    const Tensor& codebook, const Tensor& phi_weight, Shape flat, Shape phi_index, double phi_ratio, int device) {
  using residual::pointer;
  constexpr auto kFloat = ScalarType::Float, kLong = ScalarType::Long;
  Arguments args = {};
  Scale scales[kMaxScales];
  args.num_scales = residual::fill_scales(flat, phi_index, scales);
  HITSR_CHECK(grad.sizes().size() == 4, "grad: expected 4 dimensions, found ", grad.sizes().size());
  const int64_t B = grad.size(0), H = grad.size(2), W = grad.size(3), S = args.num_scales;
  const int64_t K = codebook.size(0), C = codebook.size(1), P = phi_weight.size(0);
  HITSR_CHECK(
      residual::has_channels(static_cast<int>(C)), "codebook: expected 8, 16, 32 or 64 channels, found ", C);
  HITSR_CHECK(
      has_width(static_cast<int>(C), W), "grad: expected W of at most ", kStrip / (C + kPad), ", found ", W);
  for (int s = -1; s < S; ++s) {
    const int64_t height = s < 0 ? H : scales[s].height, width = s < 0 ? W : scales[s].width;
    HITSR_CHECK(
        height > 0 && width > 0 && has_sides(height, width), "sizes: expected sides from 1 on, of at most ", kMaxSides,
        " together, found ", height, " x ", width);
    if (s < 0) continue;
    HITSR_CHECK(
        scales[s].phi >= 0 && scales[s].phi < P, "phi_index: expected 0 to ", P - 1, ", found ", scales[s].phi);
    args.parts[s].scale = scales[s];
  }
  args.batch = static_cast<int>(B);
  args.height = static_cast<int>(H);
  args.width = static_cast<int>(W);
  args.phis = static_cast<int>(P);
  args.ratio = static_cast<float>(phi_ratio);
  plan(args, static_cast<int>(C));
  const int64_t N = B * args.tokens, given_scales = grad_per_scale.size(0) == 0 ? 0 : S;
  args.grad = pointer<float>(grad, {B, C, H, W}, kFloat, device, "grad");
  const auto* each = pointer<float>(grad_per_scale, {given_scales, B, C, H, W}, kFloat, device, "grad_per_scale");
  args.grad_per_scale = given_scales == 0 ? nullptr : each;
  args.indices = pointer<int64_t>(indices, {B, args.tokens}, kLong, device, "indices");
  args.codes = pointer<int32_t>(codes, {N}, ScalarType::Int, device, "codes");
  args.order = pointer<int64_t>(order, {N}, kLong, device, "order");
  args.codebook = pointer<float>(codebook, {K, C}, kFloat, device, "codebook");
  args.weight = pointer<block::Float4>(phi_weight, {P, 9, C / 4, C, 4}, kFloat, device, "phi_weight");
  return args;
}

}  // namespace hitsr_fast::residual_backward
