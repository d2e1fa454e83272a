// Kernels of the CUDA backend of `residual_quantize`. What they do is in residual_quantize/, which the host can run
// too; docs/ops/residual_quantize.md describes it. Compiled with -fmad=false: where one step is meant, the source says
// so.
#include "../block/cuda.h"
#include "residual_quantize.cuh"
#include "residual_quantize/quantize.h"
#include "shared_memory.cuh"

namespace hitsr_fast::residual {

namespace {

// The residual of a whole image leaves room for one block on a multiprocessor, that of a half for two; but for sm_120,
// whose multiprocessors have 100 KiB.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int blocks_at_once(int) { return 1; }
#else
constexpr int blocks_at_once(int ranks) { return ranks; }
#endif

template <int C, int RANKS>
__global__ void __launch_bounds__(kMaxThreads, blocks_at_once(RANKS))
    residual_quantize_kernel(const __grid_constant__ Arguments arguments) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  // No clusters: `launch` is never asked for them here.
  if constexpr (RANKS == 1)
#endif
  {
    block::CudaBlock<kMaxThreads, RANKS> block;
    quantize<C>(block, arguments, static_cast<int>(blockIdx.x) / RANKS, RANKS);
  }
}

template <int C, int RANKS>
cudaError_t launch_kernel(const Arguments& arguments, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = allow_shared_memory<residual_quantize_kernel<C, RANKS>>();
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {RANKS, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(arguments.batch) * RANKS);
  config.blockDim = dim3(kMaxThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = RANKS > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, residual_quantize_kernel<C, RANKS>, arguments);
}

template <int C>
cudaError_t launch_channels(const Arguments& arguments, const Plan& plan, cudaStream_t stream) {
  return plan.ranks == 2 ? launch_kernel<C, 2>(arguments, plan.bytes, stream)
                         : launch_kernel<C, 1>(arguments, plan.bytes, stream);
}

}  // namespace

cudaError_t load() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, residual_quantize_kernel<32, 1>);
}

cudaError_t launch(const Arguments& arguments, int channels, const Plan& plan, cudaStream_t stream) {
  switch (channels) {
    case 8: return launch_channels<8>(arguments, plan, stream);
    case 16: return launch_channels<16>(arguments, plan, stream);
    case 32: return launch_channels<32>(arguments, plan, stream);
    case 64: return launch_channels<64>(arguments, plan, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace hitsr_fast::residual
