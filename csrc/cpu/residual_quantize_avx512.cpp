// residual_quantize on AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "cpu/residual_quantize.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt")
namespace hitsr_fast::residual::avx512 {
namespace {

#include "cpu/avx512.h"

struct Isa : Avx512 {
  static constexpr int kPlaces = 8;
};

}  // namespace
#include "cpu/residual_quantize_kernels.h"
}  // namespace hitsr_fast::residual::avx512
HITSR_TARGET_END
#endif
