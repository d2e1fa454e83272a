// Binding of the CUDA backend of `residual_decode_backward`: checks what guards the raw pointers, allocates, launches.
#include "residual_decode_backward.cuh"

#include <tuple>

#include "residual_decode_backward/given.h"
#include "tensor.h"

namespace hitsr_fast {

namespace {

// The low-level op of hitsr_fast/ops/residual_decode_backward_cuda.py, except that phi_weight is packed as `pack_phi` does,
// outputs and inputs swapped; that all is float32; and that the indices come a second time, sorted, with `order`.
std::tuple<Tensor, Tensor, Tensor> decode_backward_op(
    const Tensor& grad, const Tensor& grad_per_scale, const Tensor& indices, const Tensor& codes, const Tensor& order,
    const Tensor& codebook, const Tensor& phi_weight, Shape flat, Shape phi_index, double phi_ratio) {
  HITSR_CHECK(grad.is_cuda(), "grad: expected device cuda, found another");
  const int device = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  residual_backward::Arguments args = residual_backward::given(
      grad, grad_per_scale, indices, codes, order, codebook, phi_weight, flat, phi_index, phi_ratio, device);
  const int64_t C = codebook.size(1), P = args.phis;
  const int channels = static_cast<int>(C);
  const bool per_scale = args.grad_per_scale != nullptr;
  const auto floats = residual_backward::workspace_of(args, channels, residual_backward::kThreads, per_scale);
  const auto make = [&](Shape shape) { return torch::stable::new_empty(grad, shape, ScalarType::Float); };
  const Tensor reached = make({floats.reached}), rows = make({floats.rows}), edges = make({floats.edges});
  const Tensor partials = make({floats.partials}), weight = make({P, C, C, 3, 3}), bias = make({P, C});
  Tensor of_codebook = make({codebook.size(0), C});
  torch::stable::zero_(of_codebook);  // for codes that no token has
  args.reached = per_scale ? data<float>(reached) : nullptr;
  args.rows = data<float>(rows);
  args.edges = data<float>(edges);
  args.partials = data<float>(partials);
  args.grad_codebook = data<float>(of_codebook);
  args.grad_weight = data<float>(weight);
  args.grad_bias = data<float>(bias);
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  STD_CUDA_CHECK(residual_backward::launch(args, channels, static_cast<cudaStream_t>(stream)));
  return {of_codebook, weight, bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library,
      "_residual_decode_backward_cuda(Tensor grad, Tensor grad_per_scale, Tensor indices, Tensor codes, Tensor order, "
      "Tensor codebook, Tensor phi_weight, int[] scales, int[] phi_index, float phi_ratio) -> (Tensor, Tensor, Tensor)",
      TORCH_BOX(&decode_backward_op));
}

}  // namespace hitsr_fast
