// Shared memory beyond what any kernel may have.
#pragma once

#include <atomic>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace hitsr_fast {

// Allows a kernel all the shared memory that the current device has, once: a limit for each launch would be lowered by
// another thread before the launch.
template <auto KERNEL>
cudaError_t allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};  // a bit for each of the first 64 devices
  int device, most;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed.load() & bit) != 0) return cudaSuccess;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.fetch_or(bit);
  return error;
}

}  // namespace hitsr_fast
