// The block context of a CUDA kernel; block.h says what each member does.
#pragma once

#include "block.h"

namespace hitsr_fast::block {

template <int THREADS, int RANKS>
class CudaBlock {
 public:
  static constexpr size_t kGap = 0;  // between the parts of shared memory

  __device__ __forceinline__ CudaBlock() {
    if constexpr (RANKS > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank_));
  }

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ static constexpr int threads() { return THREADS; }
  __device__ __forceinline__ int rank() const { return rank_; }

  __device__ __forceinline__ unsigned char* shared() const {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
  }

  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ void sync_cluster() const {
    if constexpr (RANKS > 1) {
      asm volatile("barrier.cluster.arrive; barrier.cluster.wait;" ::: "memory");
    } else {
      __syncthreads();
    }
  }

  template <class T>
  __device__ __forceinline__ T* remote(T* pointer, int rank) const {
    if constexpr (RANKS > 1) {
      uint64_t address;
      asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(pointer), "r"(rank));
      return reinterpret_cast<T*>(address);
    } else {
      return pointer;
    }
  }

  template <class T>
  __device__ __forceinline__ T shuffle(T value, int lane) const {
    return __shfl_sync(kEveryone, value, lane);
  }
  template <class T>
  __device__ __forceinline__ T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(kEveryone, value, mask);
  }
  __device__ __forceinline__ uint32_t ballot(bool flag) const { return __ballot_sync(kEveryone, flag); }

  __device__ __forceinline__ void copy_async(void* to, const void* from) const {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  }
  __device__ __forceinline__ void copy_wait() const { asm volatile("cp.async.wait_all;" ::: "memory"); }

  template <int M, int STEPS>
  __device__ __forceinline__ void multiply(
      float (&sums)[M][4], const uint32_t (&rows)[M][STEPS][4], const uint32_t (&codes)[STEPS][2]) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[m][0]), "+f"(sums[m][1]), "+f"(sums[m][2]), "+f"(sums[m][3])
            : "r"(rows[m][step][0]),
              "r"(rows[m][step][1]),
              "r"(rows[m][step][2]),
              "r"(rows[m][step][3]),
              "r"(codes[step][0]),
              "r"(codes[step][1]));
      }
    }
  }

 private:
  static constexpr uint32_t kEveryone = 0xffffffffu;
  int rank_ = 0;
};

}  // namespace hitsr_fast::block
