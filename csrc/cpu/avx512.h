// Vectors of 16 floats, for files that are compiled for AVX-512; included inside such a file's own namespace.
struct Avx512 {
  static constexpr int kLanes = 16;
  using Scores = __m512;
  using Doubles = __m512d;

  static Scores load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Scores values) { _mm512_storeu_ps(to, values); }
  static Scores fill(float value) { return _mm512_set1_ps(value); }
  static Scores minimum(Scores a, Scores b) { return _mm512_min_ps(a, b); }
  static Scores root(Scores values) { return _mm512_sqrt_ps(values); }
  static float lowest(Scores values) { return _mm512_reduce_min_ps(values); }

  static Scores gather(const float* from, int64_t stride) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_i32gather_ps(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(stride))), from, 4);
  }

  static uint32_t at_most(Scores values, float limit) {
    return _mm512_cmp_ps_mask(values, _mm512_set1_ps(limit), _CMP_LE_OQ);
  }

  static Doubles widen(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
  static Doubles widen(const double* from) { return _mm512_loadu_pd(from); }
};
