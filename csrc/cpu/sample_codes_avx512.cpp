// sample_codes on AVX-512.
#if defined(__x86_64__)
#include <cstring>

#include "cpu/sample_codes.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt")
namespace hitsr_fast::sampling::avx512 {
#include "cpu/sample_codes_kernels.h"
}  // namespace hitsr_fast::sampling::avx512
HITSR_TARGET_END
#endif
