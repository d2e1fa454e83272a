// nearest_code on AVX2 with FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/nearest_code.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx2,fma,popcnt")
namespace hitsr_fast::nearest::avx2 {
namespace {

constexpr int kPlainLanes = 8;
#include "cpu/plain_lanes.h"

struct Isa : PlainLanes {
  static constexpr int kRows = 6, kBlocks = 2, kRegisters = 16;
  static constexpr bool kPairs = false;
  using Scores = __m256;
  using Doubles = __m256d;
  using Codes = __m256;

  static Scores load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Scores values) { _mm256_storeu_ps(to, values); }
  static Scores fill(float value) { return _mm256_set1_ps(value); }
  static Scores minimum(Scores a, Scores b) { return _mm256_min_ps(a, b); }
  static Scores fused(Scores a, Scores b, Scores c) { return _mm256_fmadd_ps(a, b, c); }
  static Scores root(Scores values) { return _mm256_sqrt_ps(values); }
  static uint32_t at_most(Scores values, float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(values, fill(limit), _CMP_LE_OQ)));
  }
  static Doubles widen(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
  static Doubles widen(const double* from) { return _mm256_loadu_pd(from); }
  static int64_t list_at_most(const float* values, int64_t count, float limit, int* to) {
    return list<Isa>(values, count, limit, to);
  }
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
