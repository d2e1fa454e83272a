// nearest_code on AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/nearest_code.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt")
namespace hitsr_fast::nearest::avx512 {
namespace {

#include "cpu/avx512.h"

struct Isa : Avx512 {
  static constexpr int kRows = 8, kBlocks = 2, kRegisters = 32;
  static constexpr bool kPairs = false;
  using Codes = __m512;

  static Codes load_codes(const uint32_t* from) { return _mm512_loadu_ps(from); }
  static Codes spread(const uint32_t* from) { return (Codes)_mm512_set1_epi32(static_cast<int>(*from)); }
  static Scores step(Scores scores, Codes x, Codes codes) { return _mm512_fmadd_ps(x, codes, scores); }
};

}  // namespace
#include "cpu/nearest_code_vectors.h"
#include "cpu/nearest_code_vector_screen.h"
#include "cpu/nearest_code_search.h"
}  // namespace hitsr_fast::nearest::avx512
HITSR_TARGET_END
#endif
