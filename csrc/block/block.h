// What device code is written against, so that the same source runs as a CUDA kernel and on the host.
//
// A block context is a class, one object per thread, with
//
//   thread(), threads(), rank()    number of the thread in its block, threads of a block, block of the cluster
//   shared()                       the block's shared memory, aligned to 16 bytes
//   sync(), sync_warp(), sync_cluster()   barriers; each orders memory among those that it joins
//   remote(pointer, rank)          the same place in the shared memory of another block of the cluster
//   shuffle(value, lane), shuffle_xor(value, mask), ballot(flag)   among a warp; they order no memory
//   copy_async(to, from), copy_wait()   16 bytes from global to shared memory, and the end of all of one's own copies
//   multiply(sums, rows, codes)    the tile product of a warp, below
//
// block/cuda.h has the one of a CUDA kernel, tests/csrc/block_host.h those that run on a CPU. A warp has 32 threads.
//
// multiply: sums (16 M x 8) += rows (16 M x 16 STEPS) * codes (8 x 16 STEPS)^T, float16 with float32 sums. With
// g = lane / 4 and t = lane % 4, a thread holds of each step, two values to a word,
//   rows[m][step] = row 16 m + g, 16 m + g + 8 at columns 2t, 2t + 1; then the same rows at columns 2t + 8, 2t + 9
//   codes[step]   = code g at columns 2t, 2t + 1; and at 2t + 8, 2t + 9
// and sums[m] = row 16 m + g at codes 2t, 2t + 1; row 16 m + g + 8 at codes 2t, 2t + 1.
// The order in which a step's terms are added, and how they are rounded, is the context's own.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define HITSR_DEVICE __device__ __forceinline__
#define HITSR_BOTH __host__ __device__ inline
#define HITSR_UNROLL _Pragma("unroll")
#define HITSR_UNROLL_BY(count) _Pragma(HITSR_TEXT(unroll count))
#define HITSR_TEXT(text) #text
#else
#define HITSR_DEVICE inline
#define HITSR_BOTH inline
#define HITSR_UNROLL
#define HITSR_UNROLL_BY(count)
#endif

namespace hitsr_fast::block {

constexpr int kWarp = 32;

// Four values that move as one.
struct alignas(16) Float4 {
  float value[4];
};
struct alignas(16) Word4 {
  uint32_t value[4];
};
struct alignas(8) Word2 {
  uint32_t value[2];
};
struct alignas(8) Float2 {
  float value[2];
};

template <class To, class From>
HITSR_DEVICE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Bits of a float16, rounded to nearest even. |value| is 0 or from 2^-14 to 65504.
HITSR_DEVICE uint16_t to_half(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t word = bits<uint32_t>(value), magnitude = word & 0x7fffffffu;
  const uint32_t sign = word >> 16 & 0x8000u;
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
#endif
}

HITSR_DEVICE float from_half(uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#else
  // 2^112 is what the exponents of the two formats differ by; the product also takes subnormal numbers.
  const float magnitude = bits<float>(static_cast<uint32_t>(half & 0x7fff) << 13) * 0x1p112f;
  return half & 0x8000 ? -magnitude : magnitude;
#endif
}

// Number of the lowest bit that is set in a word other than 0, and of all that are.
HITSR_DEVICE int lowest_bit(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

HITSR_DEVICE int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

}  // namespace hitsr_fast::block
