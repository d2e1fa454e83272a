// attention_prologue on AVX-512.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>

#include "cpu/attention_prologue.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt")
namespace hitsr_fast::prologue::avx512 {
#include "cpu/attention_prologue_kernels.h"
}  // namespace hitsr_fast::prologue::avx512
HITSR_TARGET_END
#endif
