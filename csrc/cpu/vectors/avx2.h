// Vectors of 8 floats, for AVX2 with FMA; included inside a namespace that is compiled for them.
constexpr int kPlainLanes = 8;
#include "cpu/vectors/plain.h"

struct Vectors : PlainLanes {
  using Scores = __m256;
  using Doubles = __m256d;

  static Scores load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Scores values) { _mm256_storeu_ps(to, values); }
  static Scores fill(float value) { return _mm256_set1_ps(value); }
  static Scores minimum(Scores a, Scores b) { return _mm256_min_ps(a, b); }
  static Scores maximum(Scores a, Scores b) { return _mm256_max_ps(a, b); }
  static Scores fused(Scores a, Scores b, Scores c) { return _mm256_fmadd_ps(a, b, c); }
  static float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static Scores root(Scores values) { return _mm256_sqrt_ps(values); }
  static uint32_t at_most(Scores values, float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(values, fill(limit), _CMP_LE_OQ)));
  }
  static int64_t list_at_most(const float* values, int64_t count, float limit, int* to) {
    return list<Vectors>(values, count, limit, to);
  }
  static Doubles widen(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
  static Doubles widen(const double* from) { return _mm256_loadu_pd(from); }
};
