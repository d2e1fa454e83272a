// The few functions of CUDA's runtime that starting a kernel calls, on devices that are not there; and a program that
// starts kernels on two of them from many threads. It prints what an attribute of a kernel was set to, and ends with an
// error if a launch was not allowed the shared memory that it asked for.
#include <cstdio>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cuda/residual_quantize.cuh"

namespace residual = hitsr_fast::residual;

namespace {

constexpr int kMost[] = {166912, 232448};  // bytes of shared memory that a block of each device may have
thread_local int current = 0;
std::mutex mutex;
std::map<std::pair<const void*, int>, int> allowed;
bool refused = false;

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = kMost[device];
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaErrorUnsupportedPtxVersion; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  allowed[{kernel, current}] = value;
  std::printf("%d %d\n", current, value);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allowed.find({kernel, current});
  refused = refused || found == allowed.end() || found->second < static_cast<int>(config->dynamicSmemBytes);
  return cudaSuccess;
}

}  // extern "C"

int main() {
  std::vector<std::thread> threads;
  for (int number = 0; number < 8; ++number) {
    threads.emplace_back([number] {
      current = number % 2;
      residual::Arguments arguments = {};
      arguments.batch = 1;
      const size_t bytes = number < 4 ? 150000 : 20000;  // a large image and a small one, by turns
      for (int i = 0; i < 2000; ++i) residual::launch(arguments, 32, {1, 1, bytes}, nullptr);
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (residual::load() != cudaErrorUnsupportedPtxVersion) return 2;
  return refused ? 1 : 0;
}
