// modulated_layer_norm on AVX-512.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>

#include "cpu/modulated_layer_norm.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt")
namespace hitsr_fast::adaln::avx512 {
#include "cpu/modulated_layer_norm_kernels.h"
}  // namespace hitsr_fast::adaln::avx512
HITSR_TARGET_END
#endif
