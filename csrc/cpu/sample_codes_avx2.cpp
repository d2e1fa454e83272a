// sample_codes on AVX2.
#if defined(__x86_64__)
#include <cstring>

#include "cpu/sample_codes.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx2,fma,popcnt")
namespace hitsr_fast::sampling::avx2 {
#include "cpu/sample_codes_kernels.h"
}  // namespace hitsr_fast::sampling::avx2
HITSR_TARGET_END
#endif
