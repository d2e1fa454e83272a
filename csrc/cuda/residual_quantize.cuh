// The CUDA backend of `residual_quantize`, as its binding (residual_quantize_op.cpp) sees it: no header of torch's
// here, so that nvcc compiles little.
#pragma once

#include <cuda_runtime_api.h>

#include "residual_quantize/arguments.h"

namespace hitsr_fast::residual {

// Loads the code for the current device: an error where there is none for its chip, or its driver is too old for it.
cudaError_t load();

// Starts the kernel for all images on a stream.
cudaError_t launch(const Arguments& arguments, int channels, const Plan& plan, cudaStream_t stream);

}  // namespace hitsr_fast::residual
