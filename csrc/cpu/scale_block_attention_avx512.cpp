// scale_block_attention on AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/scale_block_attention.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt")
namespace hitsr_fast::attention::avx512 {
namespace {

#include "cpu/avx512.h"

using Isa = Avx512;

}  // namespace
#include "cpu/scale_block_attention_vectors.h"
}  // namespace hitsr_fast::attention::avx512
HITSR_TARGET_END
#endif
