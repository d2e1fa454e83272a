// The kernels of group_norm_silu, once for each instruction set, whose file defines `fused`: a * b + c. The loops are
// plain, for the compiler to turn into vectors; `omp simd` lets it order a sum as it likes.
//
// As in nearest_code_search.h, what is shared has internal linkage and nothing is a template of the standard library.

#include "cpu/floats16_inline.h"

namespace {

// y / (1 + 2^-(y log2 e)). Power: that of the nearest integer, times a polynomial, minimax on [-1/2, 1/2], with a relative
// error below 2^-22, rounding included. It is 2^-126 at least, and infinite from 2^127.5 on. NaN stays NaN by the dividend.
inline float silu(float y) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
  float power = y * -1.44269504088896341f;
  power = power < 128.0f ? power : 128.0f;
  power = power > -126.0f ? power : -126.0f;
  const float shifted = power + kToInteger, part = power - (shifted - kToInteger);
  float fraction = 1.32647272e-3f;
  fraction = fused(fraction, part, 9.67151264e-3f);
  fraction = fused(fraction, part, 5.55073374e-2f);
  fraction = fused(fraction, part, 2.40222421e-1f);
  fraction = fused(fraction, part, 6.93146978e-1f);
  fraction = fused(fraction, part, 1.0f);
  return y / fused(fraction, float_of((bits_of(shifted) << 23) + 0x3f800000u), 1.0f);
}

}  // namespace

template <typename T>
void moments_of_pixels(
    const T* x, int64_t pixels, int64_t groups, int64_t width, float* memory, float* mean, float* squares) {
  const int64_t C = groups * width;
  const float count = static_cast<float>(pixels);
  float *centre = memory, *rest = memory + C, *square = memory + 2 * C;
  for (int64_t c = 0; c < 3 * C; ++c) memory[c] = 0;
  const T* row = x;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, row += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) centre[c] += wide(row[c]);
  }
  for (int64_t c = 0; c < C; ++c) centre[c] /= count;
  row = x;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, row += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const float deviation = wide(row[c]) - centre[c];
      rest[c] += deviation;  // what rounding has left of the mean
      square[c] = fused(deviation, deviation, square[c]);
    }
  }
  for (int64_t group = 0; group < groups; ++group, centre += width, rest += width, square += width) {
    float middle = 0, sum = 0;
    for (int64_t c = 0; c < width; ++c) middle += centre[c] + rest[c] / count;
    middle /= static_cast<float>(width);
    for (int64_t c = 0; c < width; ++c) {
      const float apart = centre[c] - middle;
      sum += square[c] + apart * (count * apart + 2 * rest[c]);
    }
    mean[group] = middle;
    squares[group] = sum;
  }
}

template <typename T>
void moments_of_run(const T* x, int64_t count, float* mean, float* squares) {
  float sum = 0, rest = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += wide(x[i]);
  const float centre = sum / static_cast<float>(count);
#pragma omp simd reduction(+ : rest, square)
  for (int64_t i = 0; i < count; ++i) {
    const float deviation = wide(x[i]) - centre;
    rest += deviation;
    square += deviation * deviation;
  }
  *mean = centre + rest / static_cast<float>(count);
  *squares = square;
}

template <typename T>
void apply_to_pixels(
    const T* x, const float* mean, const float* factor, const float* offset, int64_t pixels, int64_t C, T* out) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += C, out += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) narrow(silu(fused(wide(x[c]) - mean[c], factor[c], offset[c])), out + c);
  }
}

template <typename T>
void apply_to_run(const T* x, float mean, float factor, float offset, int64_t count, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(silu(fused(wide(x[i]) - mean, factor, offset)), out + i);
}

#define HITSR_GROUP_NORM_INSTANCES(T)                                                                                \
  template void moments_of_pixels(const T*, int64_t, int64_t, int64_t, float*, float*, float*);                      \
  template void moments_of_run(const T*, int64_t, float*, float*);                                                   \
  template void apply_to_pixels(const T*, const float*, const float*, const float*, int64_t, int64_t, T*);           \
  template void apply_to_run(const T*, float, float, float, int64_t, T*);
HITSR_GROUP_NORM_INSTANCES(float)
HITSR_GROUP_NORM_INSTANCES(Half)
HITSR_GROUP_NORM_INSTANCES(Bfloat16)
#undef HITSR_GROUP_NORM_INSTANCES
