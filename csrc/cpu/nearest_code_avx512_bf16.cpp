// nearest_code on AVX-512 with BF16: two channels of a score in one instruction.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/nearest_code.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,popcnt")
namespace hitsr_fast::nearest::avx512_bf16 {
namespace {

#include "cpu/avx512.h"

struct Isa : Avx512 {
  static constexpr int kRows = 8, kBlocks = 2, kRegisters = 32;
  static constexpr bool kPairs = true;
  using Codes = __m512bh;

  static Codes load_codes(const uint32_t* from) { return (Codes)_mm512_loadu_si512(from); }
  static Codes spread(const uint32_t* from) { return (Codes)_mm512_set1_epi32(static_cast<int>(*from)); }
  static Scores step(Scores scores, Codes x, Codes codes) { return _mm512_dpbf16_ps(scores, x, codes); }
};

}  // namespace
#include "cpu/nearest_code_vectors.h"
#include "cpu/nearest_code_vector_screen.h"
#include "cpu/nearest_code_search.h"
}  // namespace hitsr_fast::nearest::avx512_bf16
HITSR_TARGET_END
#endif
