// group_norm_silu on AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "cpu/group_norm_silu.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt")
namespace hitsr_fast::group_norm::avx512 {
namespace {

#include "cpu/avx512.h"

using Isa = Avx512;

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// Relative error below 2^-13, or below 2^-22: a division takes several times as long.
template <bool kPrecise>
inline __m512 quotient(__m512 a, __m512 b) {
  __m512 inverse = _mm512_rcp14_ps(b);
  if constexpr (kPrecise) inverse = inverse * _mm512_fnmadd_ps(b, inverse, _mm512_set1_ps(2));
  return a * inverse;
}

}  // namespace
#include "cpu/group_norm_silu_kernels.h"
}  // namespace hitsr_fast::group_norm::avx512
HITSR_TARGET_END
#endif
