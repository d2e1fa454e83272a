// modulated_layer_norm on AVX2 with FMA.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>

#include "cpu/modulated_layer_norm.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx2,fma,popcnt")
namespace hitsr_fast::adaln::avx2 {
#include "cpu/modulated_layer_norm_kernels.h"
}  // namespace hitsr_fast::adaln::avx2
HITSR_TARGET_END
#endif
