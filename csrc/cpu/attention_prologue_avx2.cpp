// attention_prologue on AVX2 with FMA.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>

#include "cpu/attention_prologue.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx2,fma,popcnt")
namespace hitsr_fast::prologue::avx2 {
#include "cpu/attention_prologue_kernels.h"
}  // namespace hitsr_fast::prologue::avx2
HITSR_TARGET_END
#endif
