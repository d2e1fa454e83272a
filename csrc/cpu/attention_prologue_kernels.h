// The kernel of attention_prologue (foreach_isa.h). The loops are plain, for the compiler to turn into vectors; `omp
// simd` lets it order a sum as it likes.

template <typename T, typename U>
void part(const T* from, const Steps& steps, int64_t heads, int64_t D, float* memory, U* to, int64_t stride) {
  float* const factors = memory + heads * D;
  if (steps.bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < heads * D; ++i) memory[i] = wide(from[i]) + steps.bias[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < heads * D; ++i) memory[i] = wide(from[i]);
  }
  if (steps.norm) {
    // The lengths of all heads, then the roots and quotients, which take long one by one.
    for (int64_t head = 0; head < heads; ++head) {
      const float* const values = memory + head * D;
      float squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t d = 0; d < D; ++d) squares += values[d] * values[d];
      factors[head] = squares;
    }
    for (int64_t head = 0; head < heads; ++head) {
      const float length = std::sqrt(factors[head]);
      factors[head] = (steps.scale != nullptr ? steps.scale[head] : 1) / (length < 1e-12f ? 1e-12f : length);
    }
  }
  for (int64_t head = 0; head < heads; ++head, to += stride) {
    const float* const values = memory + head * D;
    const float factor = steps.norm ? factors[head] : 1;
    if (steps.rotary != nullptr) {
#pragma omp simd
      for (int64_t d = 0; d < D; d += 2) {
        const float even = values[d] * factor, odd = values[d + 1] * factor;
        const float cosine = steps.rotary[d], sine = steps.rotary[d + 1];
        narrow(even * cosine - odd * sine, to + d);
        narrow(even * sine + odd * cosine, to + d + 1);
      }
    } else {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) narrow(values[d] * factor, to + d);
    }
  }
}

template <typename T, typename U>
constexpr Part<T, U> kPart = part<T, U>;
