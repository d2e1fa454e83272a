// Vectors of 16 floats, for AVX-512; included inside a namespace that is compiled for them.
struct Vectors {
  static constexpr int kLanes = 16, kRegisters = 32;
  using Scores = __m512;
  using Doubles = __m512d;

  static Scores load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Scores values) { _mm512_storeu_ps(to, values); }
  static Scores fill(float value) { return _mm512_set1_ps(value); }
  static Scores minimum(Scores a, Scores b) { return _mm512_min_ps(a, b); }
  static Scores maximum(Scores a, Scores b) { return _mm512_max_ps(a, b); }
  static Scores fused(Scores a, Scores b, Scores c) { return _mm512_fmadd_ps(a, b, c); }
  static float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  // Relative error below 2^-13, or below 2^-22: a division takes several times as long.
  template <bool kPrecise>
  static Scores quotient(Scores a, Scores b) {
    Scores inverse = _mm512_rcp14_ps(b);
    if constexpr (kPrecise) inverse = inverse * _mm512_fnmadd_ps(b, inverse, _mm512_set1_ps(2));
    return a * inverse;
  }
  static Scores root(Scores values) { return _mm512_sqrt_ps(values); }
  static Scores fraction(Scores values) { return _mm512_reduce_ps(values, _MM_FROUND_TO_NEG_INF); }
  static Scores times_power_of_two(Scores a, Scores power) { return _mm512_scalef_ps(a, power); }
  static float lowest(Scores values) { return _mm512_reduce_min_ps(values); }

  static __m512i numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

  static Scores gather(const float* from, int64_t stride) {
    return _mm512_i32gather_ps(_mm512_mullo_epi32(numbers(), _mm512_set1_epi32(static_cast<int>(stride))), from, 4);
  }

  static uint32_t at_most(Scores values, float limit) {
    return _mm512_cmp_ps_mask(values, _mm512_set1_ps(limit), _CMP_LE_OQ);
  }

  // Without a branch, which would be guessed wrong once a row.
  static int64_t list_at_most(const float* values, int64_t count, float limit, int* to) {
    const int* first = to;
    __m512i number = numbers();
    for (int64_t i = 0; i < count; i += kLanes) {
      const __mmask16 kept = _mm512_cmp_ps_mask(load(values + i), fill(limit), _CMP_LE_OQ);
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(kept, number));
      to += __builtin_popcount(kept);
      number = _mm512_add_epi32(number, _mm512_set1_epi32(kLanes));
    }
    return to - first;
  }

  static Doubles widen(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
  static Doubles widen(const double* from) { return _mm512_loadu_pd(from); }
};
