// The kernels of group_norm_silu (foreach_isa.h). Most loops are plain, for the compiler to turn into vectors; `omp
// simd` lets it order a sum as it likes.

#include "cpu/vectors/power_of_two.h"

constexpr int64_t kRoom = 2048;  // floats between two loops, in the nearest cache

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Asks for memory that is read, or written, soon: between two pieces of it the kernels compute for too long for the
// processor to see them coming.
template <bool kWrite>
inline void fetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, kWrite);
}

// Whether T shows an error of 2^-13.
template <typename T>
constexpr bool kPrecise = true;
template <>
constexpr bool kPrecise<Bfloat16> = false;

// y / (1 + e^-y), in place; `values` has room for whole vectors. What is below -87 counts as -87, of which 1e-36 is
// left, so that the power stays below 2^127.
template <typename T>
inline void silu(float* values, int64_t count) {
  for (int64_t i = count; i % Vectors::kLanes != 0; ++i) values[i] = 0;
  for (int64_t i = 0; i < count; i += Vectors::kLanes) {
    const auto y = Vectors::maximum(Vectors::fill(-87.0f), Vectors::load(values + i));  // in this order NaN stays NaN
    const auto power = power_of_two<kPrecise<T> ? 6 : 3>(y * Vectors::fill(-1.44269504088896341f));
    Vectors::store(values + i, Vectors::quotient<kPrecise<T>>(y, Vectors::fill(1) + power));
  }
}

// SiLU's derivative at y, s (1 + y (1 - s)) with s = 1 / (1 + e^-y), in place; as `silu`. What is above 87 counts as
// 87, for the power, which stays above 2^-127, would count beside a larger y.
template <typename T>
inline void silu_slope(float* values, int64_t count) {
  const auto one = Vectors::fill(1), most = Vectors::fill(87);
  for (int64_t i = count; i % Vectors::kLanes != 0; ++i) values[i] = 0;
  for (int64_t i = 0; i < count; i += Vectors::kLanes) {
    const auto y = Vectors::minimum(most, Vectors::maximum(Vectors::fill(-87), Vectors::load(values + i)));
    const auto power = power_of_two<kPrecise<T> ? 6 : 3>(y * Vectors::fill(-1.44269504088896341f));
    const auto s = Vectors::quotient<kPrecise<T>>(one, one + power);
    Vectors::store(values + i, Vectors::fused(y, power * s, one) * s);
  }
}

template <typename T>
void moments_of_pixels(
    const T* x, int64_t pixels, int64_t groups, int64_t width, float* memory, float* mean, float* squares) {
  const int64_t C = groups * width;
  const float count = static_cast<float>(pixels);
  float *centre = memory, *rest = memory + C, *square = memory + 2 * C;
  for (int64_t c = 0; c < 3 * C; ++c) memory[c] = 0;
  // Four pixels at a time: the sums, which lie in memory, take longer to load and store than the values.
  const int64_t whole = pixels / 4 * 4;
  for (int64_t pixel = 0; pixel < whole; pixel += 4) {
    const T *a = x + pixel * C, *b = a + C, *c = b + C, *d = c + C;
#pragma omp simd
    for (int64_t i = 0; i < C; ++i) centre[i] += (wide(a[i]) + wide(b[i])) + (wide(c[i]) + wide(d[i]));
  }
  for (int64_t pixel = whole; pixel < pixels; ++pixel) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) centre[c] += wide(x[pixel * C + c]);
  }
  for (int64_t c = 0; c < C; ++c) centre[c] /= count;
  // The same for the squares of the deviations, and for their sum: what rounding has left of the mean.
  for (int64_t pixel = 0; pixel < whole; pixel += 4) {
    const T *a = x + pixel * C, *b = a + C, *c = b + C, *d = c + C;
    fetch<false>(a + pixels * C, 4 * C * static_cast<int64_t>(sizeof(T)));
#pragma omp simd
    for (int64_t i = 0; i < C; ++i) {
      const float p = wide(a[i]) - centre[i], q = wide(b[i]) - centre[i];
      const float r = wide(c[i]) - centre[i], s = wide(d[i]) - centre[i];
      rest[i] += (p + q) + (r + s);
      square[i] += Vectors::fused(p, p, q * q) + Vectors::fused(r, r, s * s);
    }
  }
  for (int64_t pixel = whole; pixel < pixels; ++pixel) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const float deviation = wide(x[pixel * C + c]) - centre[c];
      rest[c] += deviation;
      square[c] = Vectors::fused(deviation, deviation, square[c]);
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
  alignas(64) float room[kRoom];
  const int64_t width = smaller(C, kRoom), rows = kRoom / width;
  for (int64_t pixel = 0; pixel < pixels; pixel += rows) {
    const int64_t count = smaller(rows, pixels - pixel);
    for (int64_t first = 0; first < C; first += width) {
      const int64_t channels = smaller(width, C - first), bytes = channels * static_cast<int64_t>(sizeof(T));
      for (int64_t row = 0; row < count; ++row) {
        const int64_t at = (pixel + row) * C + first;
        const T* from = x + at;
        float* to = room + row * channels;
        fetch<false>(from + 2 * rows * C, bytes);
        fetch<true>(out + at + 2 * rows * C, bytes);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          to[c] = Vectors::fused(wide(from[c]) - mean[first + c], factor[first + c], offset[first + c]);
        }
      }
      silu<T>(room, count * channels);
      for (int64_t row = 0; row < count; ++row) {
        const float* from = room + row * channels;
        T* to = out + (pixel + row) * C + first;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) narrow(from[c], to + c);
      }
    }
  }
}

template <typename T>
void apply_to_run(const T* x, float mean, float factor, float offset, int64_t count, T* out) {
  alignas(64) float room[kRoom];
  for (int64_t at = 0; at < count; at += kRoom) {
    const int64_t values = smaller(kRoom, count - at), bytes = values * static_cast<int64_t>(sizeof(T));
    fetch<false>(x + at + 2 * kRoom, bytes);
    fetch<true>(out + at + 2 * kRoom, bytes);
#pragma omp simd
    for (int64_t i = 0; i < values; ++i) room[i] = Vectors::fused(wide(x[at + i]) - mean, factor, offset);
    silu<T>(room, values);
#pragma omp simd
    for (int64_t i = 0; i < values; ++i) narrow(room[i], out + at + i);
  }
}

// Calls task(row, first, channels, slopes) for each piece of a pixel's row, with SiLU's derivative of each value.
template <typename T, typename F>
inline void with_slopes(
    const T* grad, const T* x, const float* mean, const float* factor, const float* offset, int64_t pixels, int64_t C,
    const F& task) {
  alignas(64) float room[kRoom];
  const int64_t width = smaller(C, kRoom), rows = kRoom / width;
  for (int64_t pixel = 0; pixel < pixels; pixel += rows) {
    const int64_t count = smaller(rows, pixels - pixel);
    for (int64_t first = 0; first < C; first += width) {
      const int64_t channels = smaller(width, C - first), bytes = channels * static_cast<int64_t>(sizeof(T));
      for (int64_t row = 0; row < count; ++row) {
        const int64_t at = (pixel + row) * C + first;
        const T* from = x + at;
        float* to = room + row * channels;
        fetch<false>(from + 2 * rows * C, bytes);
        fetch<false>(grad + at + 2 * rows * C, bytes);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          to[c] = Vectors::fused(wide(from[c]) - mean[first + c], factor[first + c], offset[first + c]);
        }
      }
      silu_slope<T>(room, count * channels);
      for (int64_t row = 0; row < count; ++row) task(pixel + row, first, channels, room + row * channels);
    }
  }
}

template <typename T>
void sums_of_pixels(
    const T* grad, const T* x, const float* mean, const float* factor, const float* offset, int64_t pixels, int64_t C,
    float* sums) {
  for (int64_t c = 0; c < 2 * C; ++c) sums[c] = 0;
  with_slopes<T>(
      grad, x, mean, factor, offset, pixels, C,
      [&](int64_t row, int64_t first, int64_t channels, const float* slopes) {
        const T *given = grad + row * C + first, *from = x + row * C + first;
        const float* centre = mean + first;
        float *plain = sums + first, *product = sums + C + first;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float inner = slopes[c] * wide(given[c]);
          plain[c] += inner;
          product[c] = Vectors::fused(inner, wide(from[c]) - centre[c], product[c]);
        }
      });
}

template <typename T>
void slope_of_pixels(
    const T* grad, const T* x, const float* mean, const float* factor, const float* offset, const float* linear,
    const float* constant, int64_t pixels, int64_t C, T* out) {
  with_slopes<T>(
      grad, x, mean, factor, offset, pixels, C,
      [&](int64_t row, int64_t first, int64_t channels, const float* slopes) {
        const T *given = grad + row * C + first, *from = x + row * C + first;
        const float *centre = mean + first, *factors = factor + first;
        const float *linears = linear + first, *constants = constant + first;
        T* to = out + row * C + first;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          const float rest = Vectors::fused(wide(from[c]) - centre[c], linears[c], constants[c]);
          narrow(Vectors::fused(slopes[c] * wide(given[c]), factors[c], rest), to + c);
        }
      });
}

// SiLU's derivatives of [count], times grad.
template <typename T>
inline void inner_of_run(
    const T* grad, const T* x, float mean, float factor, float offset, int64_t count, float* inner) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) inner[i] = Vectors::fused(wide(x[i]) - mean, factor, offset);
  silu_slope<T>(inner, count);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) inner[i] *= wide(grad[i]);
}

template <typename T>
void sums_of_run(
    const T* grad, const T* x, float mean, float factor, float offset, int64_t count, float* inner, double* sums) {
  alignas(64) float room[kRoom];
  sums[0] = sums[1] = 0;
  for (int64_t at = 0; at < count; at += kRoom) {
    const int64_t values = smaller(kRoom, count - at);
    float* to = inner == nullptr ? room : inner + at;
    inner_of_run(grad + at, x + at, mean, factor, offset, values, to);
    float plain = 0, product = 0;
#pragma omp simd reduction(+ : plain, product)
    for (int64_t i = 0; i < values; ++i) {
      plain += to[i];
      product += to[i] * (wide(x[at + i]) - mean);
    }
    sums[0] += plain;
    sums[1] += product;
  }
}

template <typename T>
void slope_of_run(
    const T* grad, const T* x, float mean, float factor, float offset, float linear, float constant, int64_t count,
    const float* inner, T* out) {
  alignas(64) float room[kRoom];
  for (int64_t at = 0; at < count; at += kRoom) {
    const int64_t values = smaller(kRoom, count - at);
    const float* from = inner == nullptr ? room : inner + at;
    if (inner == nullptr) inner_of_run(grad + at, x + at, mean, factor, offset, values, room);
#pragma omp simd
    for (int64_t i = 0; i < values; ++i) {
      const float rest = Vectors::fused(wide(x[at + i]) - mean, linear, constant);
      narrow(Vectors::fused(from[i], factor, rest), out + at + i);
    }
  }
}

template <typename T>
constexpr Kernels<T> kKernels{
    moments_of_pixels<T>, moments_of_run<T>, apply_to_pixels<T>, apply_to_run<T>,
    sums_of_pixels<T>,    sums_of_run<T>,    slope_of_pixels<T>, slope_of_run<T>,
};
