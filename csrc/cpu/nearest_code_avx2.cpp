// nearest_code on AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/nearest_code.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx2,fma,popcnt")
namespace hitsr_fast::nearest::avx2 {
namespace {

#include "cpu/avx2.h"

struct Isa : Avx2 {
  static constexpr int kRows = 6, kBlocks = 2, kRegisters = 16;
  static constexpr bool kPairs = false;
  using Codes = __m256;

  static Codes load_codes(const uint32_t* from) { return load(reinterpret_cast<const float*>(from)); }
  static Codes spread(const uint32_t* from) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(from)); }
  static Scores step(Scores scores, Codes x, Codes codes) { return _mm256_fmadd_ps(x, codes, scores); }
};

}  // namespace
#include "cpu/nearest_code_vectors.h"
#include "cpu/nearest_code_vector_screen.h"
#include "cpu/nearest_code_search.h"
}  // namespace hitsr_fast::nearest::avx2
HITSR_TARGET_END
#endif
