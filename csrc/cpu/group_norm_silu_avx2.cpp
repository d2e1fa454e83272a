// group_norm_silu on AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "cpu/group_norm_silu.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx2,fma,popcnt")
namespace hitsr_fast::group_norm::avx2 {
namespace {

#include "cpu/avx2.h"

using Isa = Avx2;

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <bool kPrecise>
inline __m256 quotient(__m256 a, __m256 b) {
  return a / b;
}

}  // namespace
#include "cpu/group_norm_silu_kernels.h"
}  // namespace hitsr_fast::group_norm::avx2
HITSR_TARGET_END
#endif
