// Binding of the CUDA backend of `residual_quantize`: checks what guards the raw pointers, allocates, launches.
#include "residual_quantize.cuh"

#include <optional>
#include <tuple>
#include <vector>

#include "residual_quantize/given.h"
#include "tensor.h"

namespace hitsr_fast {

namespace {

using residual::Arguments;
using residual::Plan;
using residual::Scale;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

Plan plan_on(int device, int64_t C, int64_t H, int64_t W, const Scale* scales, int count) {
  const int ranks = attribute(cudaDevAttrClusterLaunch, device) != 0 ? 2 : 1;
  return residual::plan_for(
      static_cast<int>(C), static_cast<int>(H), static_cast<int>(W), scales, count, residual::kMaxThreads, ranks,
      static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
}

// Blocks that would share an image on a device, and bytes of shared memory that each of them may have; 0 blocks where
// an image does not fit.
std::tuple<int64_t, int64_t> plan_op(int64_t device, int64_t C, int64_t H, int64_t W, Shape flat) {
  Scale scales[residual::kMaxScales];
  const std::vector<int64_t> no_phi(flat.size() / 2, 0);
  const int count = residual::fill_scales(flat, no_phi, scales);
  const int on = static_cast<int>(device);
  return {plan_on(on, C, H, W, scales, count).ranks, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, on)};
}

// Why the driver of a device cannot run the kernels, or nothing.
std::string unloadable_op(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const cudaError_t error = residual::load();
  cudaGetLastError();  // which else the next call would report
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// The low-level op of hitsr_fast/ops/residual_quantize.py, except that z and parts may be missing (the codes of `replay`
// are then decoded), that phi_weight is packed as `pack_phi` does, and that all is float32. parts: of
// packed_codebook.pack_triton.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_op(
    const std::optional<Tensor>& z, const Tensor& codebook, const std::vector<Tensor>& parts,
    const Tensor& phi_weight, const Tensor& phi_bias, Shape flat, Shape phi_index,
    double phi_ratio, const std::optional<Tensor>& replay, int64_t B, Shape size, bool inputs,
    bool per_scale) {
  HITSR_CHECK(codebook.is_cuda(), "codebook: expected device cuda, found another");
  const int device = codebook.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Arguments args =
      residual::given(z, codebook, parts, phi_weight, phi_bias, flat, phi_index, replay, B, size, device);
  const int64_t C = codebook.size(1), H = size[0], W = size[1], T = args.tokens;
  const int64_t first = int64_t(args.scales[0].height) * args.scales[0].width;
  const auto make = [&](Shape shape, ScalarType dtype) { return torch::stable::new_empty(codebook, shape, dtype); };
  const Tensor indices = make({B, T}, ScalarType::Long), reconstruction = make({B, C, H, W}, ScalarType::Float);
  const Tensor pooled = make({B, inputs ? T - first : 0, C}, ScalarType::Float);
  const Tensor maps = make({per_scale ? args.num_scales : 0, B, C, H, W}, ScalarType::Float);
  args.indices = data<int64_t>(indices);
  args.reconstruction = data<float>(reconstruction);
  args.inputs = inputs ? data<float>(pooled) : nullptr;
  args.reconstructions = per_scale ? data<float>(maps) : nullptr;
  args.ratio = static_cast<float>(phi_ratio);
  const Plan plan = plan_on(device, C, H, W, args.scales, args.num_scales);
  HITSR_CHECK(plan.ranks > 0, "size: an image of ", size, " does not fit into the shared memory of cuda:", device);
  args.strip = plan.strip;
  if (B > 0) {
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    STD_CUDA_CHECK(residual::launch(args, static_cast<int>(C), plan, static_cast<cudaStream_t>(stream)));
  }
  return {reconstruction, indices, pooled, maps};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(library, "_cuda_unloadable(int device) -> str", TORCH_BOX(&unloadable_op));
  define(
      library,
      "_residual_quantize_cuda_plan(int device, int C, int H, int W, int[] scales) -> (int, int)",
      TORCH_BOX(&plan_op));
  define(
      library,
      "_residual_quantize_cuda(Tensor? z, Tensor codebook, Tensor[] parts, Tensor phi_weight, Tensor phi_bias, "
      "int[] scales, int[] phi_index, float phi_ratio, Tensor? replay, int B, int[] size, bool inputs, "
      "bool per_scale) -> (Tensor, Tensor, Tensor, Tensor)",
      TORCH_BOX(&quantize_op));
}

}  // namespace hitsr_fast
