// Kernels of the CUDA backend of `residual_decode_backward`. What they do is in residual_decode_backward/, which the host
// can run too; docs/ops/residual_quantize.md describes it. Compiled with -fmad=false, as residual_quantize.cu is.
#include "../block/cuda.h"
#include "residual_decode_backward.cuh"
#include "residual_decode_backward/stages.h"
#include "shared_memory.cuh"

namespace hitsr_fast::residual_backward {

namespace {

template <class Stage, int C>
__global__ void __launch_bounds__(kThreads, 2) residual_decode_backward_kernel(
    const __grid_constant__ Arguments arguments) {
  block::CudaBlock<kThreads, 1> block;
  Stage::template run<C, kThreads>(block, arguments, static_cast<int>(blockIdx.x));
}

template <int C>
cudaError_t launch_channels(const Arguments& arguments, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  each_stage<C, kThreads>(arguments, [&](auto stage, int blocks, size_t bytes) {
    constexpr auto kKernel = residual_decode_backward_kernel<decltype(stage), C>;
    error = allow_shared_memory<kKernel>();
    if (error != cudaSuccess) return false;
    kKernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(arguments);
    error = cudaGetLastError();
    return error == cudaSuccess;
  });
  return error;
}

}  // namespace

cudaError_t launch(const Arguments& arguments, int channels, cudaStream_t stream) {
  switch (channels) {
    case 8: return launch_channels<8>(arguments, stream);
    case 16: return launch_channels<16>(arguments, stream);
    case 32: return launch_channels<32>(arguments, stream);
    case 64: return launch_channels<64>(arguments, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace hitsr_fast::residual_backward
