// The CUDA backend of `residual_decode_backward`, as its binding (residual_decode_backward_op.cpp) sees it: no header of
// torch's here, so that nvcc compiles little.
#pragma once

#include <cuda_runtime_api.h>

#include "residual_decode_backward/arguments.h"

namespace hitsr_fast::residual_backward {

// Starts the kernels on a stream.
cudaError_t launch(const Arguments& arguments, int channels, cudaStream_t stream);

}  // namespace hitsr_fast::residual_backward
