// The kernels of modulated_layer_norm and gated_residual (foreach_isa.h). The loops are plain, for the compiler to turn
// into vectors; `omp simd` lets it order a sum as it likes.

// One row. A function of its own, for the compiler may order a sum otherwise where it sees more around it.
template <typename T, typename R>
[[gnu::noinline, gnu::noclone]] void norm_row(
    const T* x, const float* scale, const float* shift, float eps, int64_t C, float* memory, R* out, float* mean,
    float* rstd) {
  const float count = static_cast<float>(C);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < C; ++c) {
    const float value = wide(x[c]);
    memory[c] = value;
    sum += value;
  }
  const float centre = sum / count;
  float rest = 0, squares = 0;
#pragma omp simd reduction(+ : rest, squares)
  for (int64_t c = 0; c < C; ++c) {
    const float centred = memory[c] - centre;
    memory[c] = centred;
    rest += centred;
    squares += centred * centred;
  }
  const float missed = rest / count;  // what the rounding of the mean left
  const float inverse = 1 / std::sqrt(squares / count - missed * missed + eps);
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) narrow((memory[c] - missed) * inverse * (1 + scale[c]) + shift[c], out + c);
  *mean = centre + missed;
  *rstd = inverse;
}

template <typename T, typename R>
void norm(
    const T* x, const float* scale, const float* shift, float eps, int64_t rows, int64_t C, float* memory, R* out,
    float* mean, float* rstd) {
  for (int64_t row = 0; row < rows; ++row) {
    norm_row(x + row * C, scale, shift, eps, C, memory, out + row * C, mean + row, rstd + row);
  }
}

template <typename T>
void norm_backward(
    const T* grad, const T* x, const float* scale, const float* mean, const float* rstd, int64_t rows, int64_t C,
    float* memory, T* grad_x, float* grad_scale, float* grad_shift) {
  float *normal = memory, *inner = memory + C;
  for (int64_t row = 0; row < rows; ++row, grad += C, x += C, grad_x += C) {
    const float centre = mean[row], inverse = rstd[row];
    float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t c = 0; c < C; ++c) {
      const float given = wide(grad[c]), n = (wide(x[c]) - centre) * inverse, h = given * (1 + scale[c]);
      grad_scale[c] += given * n;
      grad_shift[c] += given;
      normal[c] = n;
      inner[c] = h;
      sum += h;
      product += h * n;
    }
    const float mean_inner = sum / static_cast<float>(C), mean_product = product / static_cast<float>(C);
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      narrow((inner[c] - mean_inner - normal[c] * mean_product) * inverse, grad_x + c);
    }
  }
}

template <typename T, typename R>
void residual(const T* x, const R* y, const float* gate, int64_t rows, int64_t C, T* out) {
  for (int64_t row = 0; row < rows; ++row, x += C, y += C, out += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) narrow(wide(x[c]) + gate[c] * wide(y[c]), out + c);
  }
}

// Row after row, which lies in the first-level cache between the two.
template <typename T, typename R>
void residual_norm(
    const T* x, const R* y, const float* gate, const float* scale, const float* shift, float eps, int64_t rows,
    int64_t C, float* memory, T* total, R* out) {
  float mean, rstd;
  for (int64_t row = 0; row < rows; ++row, x += C, y += C, total += C, out += C) {
    residual(x, y, gate, 1, C, total);
    norm_row(total, scale, shift, eps, C, memory, out, &mean, &rstd);
  }
}

template <typename T>
void residual_backward(
    const T* grad, const T* y, const float* gate, int64_t rows, int64_t C, T* grad_y, float* grad_gate) {
  for (int64_t row = 0; row < rows; ++row, grad += C, y += C, grad_y += C) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const float given = wide(grad[c]);
      grad_gate[c] += given * wide(y[c]);
      narrow(given * gate[c], grad_y + c);
    }
  }
}

template <typename S, typename R>
constexpr Kernels<S, R> kKernels{
    norm<S, R>, norm_backward<S>, residual<S, R>, residual_backward<S>, residual_norm<S, R>};
