// scale_block_attention on AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/scale_block_attention.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx2,fma,popcnt")
namespace hitsr_fast::attention::avx2 {
namespace {

#include "cpu/avx2.h"

using Isa = Avx2;

}  // namespace
#include "cpu/scale_block_attention_vectors.h"
}  // namespace hitsr_fast::attention::avx2
HITSR_TARGET_END
#endif
