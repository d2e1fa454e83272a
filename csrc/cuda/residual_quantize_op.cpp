// Binding of the CUDA backend of `residual_quantize`: checks what guards the raw pointers, allocates, launches.
#include "residual_quantize.cuh"

#include <optional>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace hitsr_fast {

namespace {

using residual::Arguments;
using residual::Plan;
using residual::Scale;

constexpr const char* kPartNames[] = {"mean", "codes", "half_norms", "exact", "bounds"};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// h0, w0, h1, w1, ... and a phi each, into `scales`.
int fill_scales(Shape flat, Shape phi_index, Scale* scales) {
  const size_t count = flat.size() / 2;
  HITSR_CHECK(
      count <= residual::kMaxScales, "scales: expected at most ", residual::kMaxScales, ", found ", count);
  HITSR_CHECK(phi_index.size() == count, "phi_index: expected ", count, " entries, found ", phi_index.size());
  for (size_t s = 0; s < count; ++s) {
    scales[s] = {static_cast<int>(flat[2 * s]), static_cast<int>(flat[2 * s + 1]), static_cast<int>(phi_index[s])};
  }
  return static_cast<int>(count);
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
  const int count = fill_scales(flat, no_phi, scales);
  const int on = static_cast<int>(device);
  return {plan_on(on, C, H, W, scales, count).ranks, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, on)};
}

const void* pointer(const Tensor& tensor, Shape shape, ScalarType dtype, int device, const char* name) {
  HITSR_CHECK(
      tensor.is_cuda() && tensor.get_device_index() == device, name, ": expected device cuda:", device, ", found ",
      tensor.is_cuda() ? "cuda:" : "another, ", tensor.get_device_index());
  check_dtype(tensor, dtype, name);
  check_contiguous(tensor, name);
  check_shape(tensor, shape, name);
  const void* first = data<const void>(tensor);
  HITSR_CHECK(reinterpret_cast<uintptr_t>(first) % 16 == 0, name, ": expected data aligned to 16 bytes");
  return first;
}

// The low-level op of hitsr_fast/ops/residual_quantize.py, except that z and parts may be missing (the codes of `replay`
// are then decoded), that phi_weight is packed as `pack_phi` does, and that all is float32. parts: of
// nearest_code_triton.prepare.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_op(
    const std::optional<Tensor>& z, const Tensor& codebook, const std::vector<Tensor>& parts,
    const Tensor& phi_weight, const Tensor& phi_bias, Shape flat, Shape phi_index,
    double phi_ratio, const std::optional<Tensor>& replay, int64_t B, Shape size, bool inputs,
    bool per_scale) {
  HITSR_CHECK(codebook.is_cuda(), "codebook: expected device cuda, found another");
  const int device = codebook.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Arguments args = {};
  args.num_scales = fill_scales(flat, phi_index, args.scales);
  int64_t T = 0;
  for (int s = 0; s < args.num_scales; ++s) T += int64_t(args.scales[s].height) * args.scales[s].width;
  const int64_t K = codebook.size(0), C = codebook.size(1), H = size[0], W = size[1], P = phi_bias.size(0);
  const int64_t CP = std::max<int64_t>(C, 16), T0 = replay.has_value() ? replay->size(1) : 0;
  const int64_t first = int64_t(args.scales[0].height) * args.scales[0].width;
  HITSR_CHECK(
      residual::has_channels(static_cast<int>(C)), "codebook: expected 8, 16, 32 or 64 channels, found ", C);
  HITSR_CHECK(z.has_value() || T0 == T, "replay: expected ", T, " tokens to decode, found ", T0);
  for (int64_t phi : phi_index) {
    HITSR_CHECK(phi >= 0 && phi < P, "phi_index: expected 0 to ", P - 1, ", found ", phi);
  }

  const int64_t tiles = (K + residual::kTile - 1) / residual::kTile, codes = tiles * residual::kTile;
  if (z.has_value()) {
    HITSR_CHECK(parts.size() == 5, "parts: expected 5 tensors, found ", parts.size());
    const std::vector<int64_t> shapes[] = {
        {1, C}, {1, codes, CP}, {1, codes}, {1, tiles * residual::kClasses, C, residual::kMembers}, {1, 5}};
    const void* part[5];
    for (int i = 0; i < 5; ++i) {
      part[i] = pointer(parts[i], shapes[i], i == 1 ? ScalarType::Half : ScalarType::Float, device, kPartNames[i]);
    }
    args.z = static_cast<const float*>(pointer(*z, {B, C, H, W}, ScalarType::Float, device, "z"));
    args.mean = static_cast<const float*>(part[0]);
    args.codes = static_cast<const block::Word4*>(part[1]);
    args.half_norms = static_cast<const float*>(part[2]);
    args.exact = static_cast<const block::Float4*>(part[3]);
    args.bounds = static_cast<const float*>(part[4]);
  }
  args.codebook = static_cast<const float*>(pointer(codebook, {K, C}, ScalarType::Float, device, "codebook"));
  args.weight = static_cast<const block::Float4*>(
      pointer(phi_weight, {P, 9, C / 4, C, 4}, ScalarType::Float, device, "phi_weight"));
  args.bias = static_cast<const float*>(pointer(phi_bias, {P, C}, ScalarType::Float, device, "phi_bias"));
  if (T0 > 0) args.replay = static_cast<const int64_t*>(pointer(*replay, {B, T0}, ScalarType::Long, device, "replay"));

  const auto make = [&](Shape shape, ScalarType dtype) { return torch::stable::new_empty(codebook, shape, dtype); };
  const Tensor indices = make({B, T}, ScalarType::Long), reconstruction = make({B, C, H, W}, ScalarType::Float);
  const Tensor pooled = make({B, inputs ? T - first : 0, C}, ScalarType::Float);
  const Tensor maps = make({per_scale ? args.num_scales : 0, B, C, H, W}, ScalarType::Float);
  args.indices = data<int64_t>(indices);
  args.reconstruction = data<float>(reconstruction);
  args.inputs = inputs ? data<float>(pooled) : nullptr;
  args.reconstructions = per_scale ? data<float>(maps) : nullptr;
  args.batch = static_cast<int>(B);
  args.height = static_cast<int>(H);
  args.width = static_cast<int>(W);
  args.size = static_cast<int>(K);
  args.tiles = static_cast<int>(tiles);
  args.tokens = static_cast<int>(T);
  args.replayed = static_cast<int>(T0);
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
