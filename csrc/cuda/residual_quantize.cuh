// The CUDA backend of `residual_quantize`, as its binding (residual_quantize_op.cpp) sees it: no header of torch's
// here, so that nvcc compiles little.
#pragma once

#include <cuda_runtime_api.h>

#include "residual_quantize/arguments.h"

namespace hitsr_fast::residual {

constexpr bool has_channels(int channels) {
  return channels == 8 || channels == 16 || channels == 32 || channels == 64;
}

// Starts the kernel for all images on a stream.
cudaError_t launch(const Arguments& arguments, int channels, const Plan& plan, cudaStream_t stream);

}  // namespace hitsr_fast::residual
