// residual_quantize on AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "cpu/residual_quantize.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx2,fma,popcnt")
namespace hitsr_fast::residual::avx2 {
namespace {

#include "cpu/avx2.h"

struct Isa : Avx2 {
  static constexpr int kPlaces = 4;
};

}  // namespace
#include "cpu/residual_quantize_kernels.h"
}  // namespace hitsr_fast::residual::avx2
HITSR_TARGET_END
#endif
