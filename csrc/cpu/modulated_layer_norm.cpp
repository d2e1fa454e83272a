// CPU backend of modulated_layer_norm, gated_residual and both: the loops over images and blocks of rows.
#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>

#include "cpu/buffer.h"
#include "cpu/instruction_sets.h"
#include "tensor.h"

namespace hitsr_fast {
namespace {

constexpr int64_t kBlock = 32;             // rows that share a sum; the same on any number of threads
constexpr int64_t kSmallestShare = 16384;  // values that are worth a thread

// Rows of one image, [rows][C]; vectors of C floats belong to the image. What is summed over rows is added to, so that the
// caller decides in which order. S is of the stream from block to block, R of a branch's end that is nearest to it.
template <typename S, typename R>
struct Kernels {
  // memory: [C] floats. mean, rstd: [rows].
  void (*norm)(
      const S* x, const float* scale, const float* shift, float eps, int64_t rows, int64_t C, float* memory, R* out,
      float* mean, float* rstd);
  // memory: [2 * C] floats.
  void (*norm_backward)(
      const S* grad, const S* x, const float* scale, const float* mean, const float* rstd, int64_t rows, int64_t C,
      float* memory, S* grad_x, float* grad_scale, float* grad_shift);
  void (*residual)(const S* x, const R* y, const float* gate, int64_t rows, int64_t C, S* out);
  void (*residual_backward)(
      const S* grad, const S* y, const float* gate, int64_t rows, int64_t C, S* grad_y, float* grad_gate);
  // memory: [C] floats.
  void (*residual_norm)(
      const S* x, const R* y, const float* gate, const float* scale, const float* shift, float eps, int64_t rows,
      int64_t C, float* memory, S* total, R* out);
};

#define HITSR_OP modulated_layer_norm
#include "cpu/foreach_isa.h"

// Arguments of any floating dtype and strides become what the kernels read: rows (B, L, C) in bfloat16 or float32, and
// floats of which there is one for each image or row. Here and not in Python, where on small maps it would take longer
// than the kernels. This is the dtype of several kinds of rows that a kernel reads in one: bfloat16 if all are.
ScalarType dtype_of(std::initializer_list<ScalarType> dtypes) {
  const bool half = std::all_of(dtypes.begin(), dtypes.end(), [](auto dtype) { return dtype == ScalarType::BFloat16; });
  return half ? ScalarType::BFloat16 : ScalarType::Float;
}

Tensor rows_of(const Tensor& values, const Tensor& like, ScalarType dtype, const char* name) {
  check_cpu(values, name);
  HITSR_CHECK(
      values.dim() == 3 && values.sizes() == like.sizes(), name, ": expected shape (B, L, C) as the first argument's, ",
      like.sizes(), ", found ", values.sizes());
  return in_a_row(values, dtype);
}

Tensor floats_of(const Tensor& values, int64_t B, int64_t n, const char* name) {
  check_cpu(values, name);
  check_shape(values, {B, n}, name);
  return in_a_row(values, ScalarType::Float);
}

int64_t blocks_of(int64_t L) { return (L + kBlock - 1) / kBlock; }

// Sums over blocks of rows, [B][blocks][count] of them, which have a part each.
class Sums {
 public:
  Sums(int64_t B, int64_t blocks, int64_t count)
      : B_(B), blocks_(blocks), count_(count), parts_(Buffer<float>::zeros(B * blocks * count)) {}

  float* part(int64_t block) const { return parts_.at(block * count_); }

  // Vectors [first, first + C) of the sums, (B, C).
  Tensor total(int64_t first, int64_t C, ScalarType dtype) const {
    const Tensor found = empty({B_, C}, ScalarType::Float);
    for (int64_t image = 0; image < B_; ++image) {
      float* to = data<float>(found) + image * C;
      std::fill_n(to, C, 0.0f);
      for (int64_t block = image * blocks_; block < (image + 1) * blocks_; ++block) {
        for (int64_t c = 0; c < C; ++c) to[c] += part(block)[first + c];
      }
    }
    return in_a_row(found, dtype);
  }

 private:
  int64_t B_, blocks_, count_;
  Buffer<float> parts_;
};

// A task for each block of rows: its number, the image, its first row of all, and how many.
template <typename F>
void for_each_block(const Tensor& values, const F& task) {
  const int64_t L = values.size(1), C = values.size(2), blocks = blocks_of(L), rows = std::min(L, kBlock);
  const int64_t share = std::max<int64_t>(kSmallestShare / std::max<int64_t>(rows * C, 1), 1);
  torch::stable::parallel_for(0, values.size(0) * blocks, share, [&](int64_t begin, int64_t end) {
    const Buffer<float> memory(2 * C);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / blocks, first = block % blocks * kBlock;
      task(block, image, image * L + first, std::min(kBlock, L - first), memory.at(0));
    }
  });
}

// Bfloat16 beside float32 is the branch's.
template <typename F>
void with_dtypes(const Tensor& stream, const Tensor& branch, const F& run) {
  if (branch.scalar_type() == ScalarType::Float) {
    run(float{}, float{});
  } else if (stream.scalar_type() == ScalarType::Float) {
    run(float{}, Bfloat16{});
  } else {
    run(Bfloat16{}, Bfloat16{});
  }
}

std::tuple<Tensor, Tensor, Tensor> norm(
    const Tensor& x_in, const Tensor& scale_in, const Tensor& shift_in, double eps, ScalarType out_dtype,
    const std::string& isa) {
  const Tensor x = rows_of(x_in, x_in, dtype_of({x_in.scalar_type(), out_dtype}), "x");
  const int64_t B = x.size(0), C = x.size(2);
  const Tensor scale = floats_of(scale_in, B, C, "scale"), shift = floats_of(shift_in, B, C, "shift");
  const Tensor out = empty(x.sizes(), dtype_of({out_dtype}));
  const Tensor mean = empty({B, x.size(1)}, ScalarType::Float), rstd = empty({B, x.size(1)}, ScalarType::Float);
  with_dtypes(x, out, [&](auto in, auto result) {
    using S = decltype(in);
    using R = decltype(result);
    const auto kernel = HITSR_SELECT(isa, kKernels<S, R>).norm;
    const S* const from = data<S>(x);
    const float *const factors = data<float>(scale), *const offsets = data<float>(shift);
    R* const to = data<R>(out);
    float *const means = data<float>(mean), *const inverses = data<float>(rstd);
    for_each_block(x, [&](int64_t, int64_t image, int64_t row, int64_t rows, float* memory) {
      kernel(
          from + row * C, factors + image * C, offsets + image * C, static_cast<float>(eps), rows, C, memory,
          to + row * C, means + row, inverses + row);
    });
  });
  return {in_a_row(out, out_dtype), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& scale_in, const Tensor& mean_in,
    const Tensor& rstd_in, const std::string& isa) {
  const ScalarType dtype = dtype_of({grad_in.scalar_type(), x_in.scalar_type()});
  const Tensor x = rows_of(x_in, x_in, dtype, "x"), grad = rows_of(grad_in, x_in, dtype, "grad");
  const int64_t B = x.size(0), L = x.size(1), C = x.size(2);
  const Tensor scale = floats_of(scale_in, B, C, "scale");
  const Tensor mean = floats_of(mean_in, B, L, "mean"), rstd = floats_of(rstd_in, B, L, "rstd");
  const Tensor grad_x = empty(x.sizes(), dtype);
  const Sums sums(B, blocks_of(L), 2 * C);
  with_dtypes(x, x, [&](auto value, auto) {
    using T = decltype(value);
    const auto kernel = HITSR_SELECT(isa, kKernels<T, T>).norm_backward;
    const T *const given = data<T>(grad), *const from = data<T>(x);
    const float *const factors = data<float>(scale), *const means = data<float>(mean);
    const float* const inverses = data<float>(rstd);
    T* const to = data<T>(grad_x);
    for_each_block(x, [&](int64_t block, int64_t image, int64_t row, int64_t rows, float* memory) {
      kernel(
          given + row * C, from + row * C, factors + image * C, means + row, inverses + row, rows, C, memory,
          to + row * C, sums.part(block), sums.part(block) + C);
    });
  });
  return {
      in_a_row(grad_x, x_in.scalar_type()), sums.total(0, C, scale_in.scalar_type()),
      sums.total(C, C, ScalarType::Float)};
}

Tensor residual(const Tensor& x_in, const Tensor& y_in, const Tensor& gate_in, const std::string& isa) {
  const ScalarType dtype = y_in.scalar_type();
  const Tensor x = rows_of(x_in, x_in, dtype_of({x_in.scalar_type(), dtype}), "x");
  const Tensor y = rows_of(y_in, x_in, dtype_of({dtype}), "y");
  const int64_t C = x.size(2);
  const Tensor gate = floats_of(gate_in, x.size(0), C, "gate");
  const Tensor out = empty(x.sizes(), x.scalar_type());
  with_dtypes(x, y, [&](auto stream, auto branch) {
    using S = decltype(stream);
    using R = decltype(branch);
    const auto kernel = HITSR_SELECT(isa, kKernels<S, R>).residual;
    const S* const from = data<S>(x);
    const R* const added = data<R>(y);
    const float* const gates = data<float>(gate);
    S* const to = data<S>(out);
    for_each_block(x, [&](int64_t, int64_t image, int64_t row, int64_t rows, float*) {
      kernel(from + row * C, added + row * C, gates + image * C, rows, C, to + row * C);
    });
  });
  return in_a_row(out, x_in.scalar_type());
}

std::tuple<Tensor, Tensor> residual_norm(
    const Tensor& x_in, const Tensor& y_in, const Tensor& gate_in, const Tensor& scale_in, const Tensor& shift_in,
    double eps, ScalarType out_dtype, const std::string& isa) {
  const ScalarType branch = dtype_of({y_in.scalar_type(), out_dtype}), stream = dtype_of({x_in.scalar_type(), branch});
  if (stream != x_in.scalar_type()) {  // the sum is rounded to a dtype in which no kernel reads it
    const Tensor total = residual(x_in, y_in, gate_in, isa);
    return {total, std::get<0>(norm(total, scale_in, shift_in, eps, out_dtype, isa))};
  }
  const Tensor x = rows_of(x_in, x_in, stream, "x"), y = rows_of(y_in, x_in, branch, "y");
  const int64_t B = x.size(0), C = x.size(2);
  const Tensor gate = floats_of(gate_in, B, C, "gate");
  const Tensor scale = floats_of(scale_in, B, C, "scale"), shift = floats_of(shift_in, B, C, "shift");
  const Tensor total = empty(x.sizes(), stream), out = empty(x.sizes(), branch);
  with_dtypes(x, y, [&](auto of_stream, auto of_branch) {
    using S = decltype(of_stream);
    using R = decltype(of_branch);
    const auto kernel = HITSR_SELECT(isa, kKernels<S, R>).residual_norm;
    const S* const from = data<S>(x);
    const R* const added = data<R>(y);
    const float *const gates = data<float>(gate), *const factors = data<float>(scale), *const offsets = data<float>(shift);
    S* const sums = data<S>(total);
    R* const to = data<R>(out);
    for_each_block(x, [&](int64_t, int64_t image, int64_t row, int64_t rows, float* memory) {
      kernel(
          from + row * C, added + row * C, gates + image * C, factors + image * C, offsets + image * C,
          static_cast<float>(eps), rows, C, memory, sums + row * C, to + row * C);
    });
  });
  return {total, in_a_row(out, out_dtype)};
}

std::tuple<Tensor, Tensor> residual_backward(
    const Tensor& grad_in, const Tensor& y_in, const Tensor& gate_in, const std::string& isa) {
  const ScalarType dtype = dtype_of({grad_in.scalar_type(), y_in.scalar_type()});
  const Tensor y = rows_of(y_in, y_in, dtype, "y"), grad = rows_of(grad_in, y_in, dtype, "grad");
  const int64_t B = y.size(0), C = y.size(2);
  const Tensor gate = floats_of(gate_in, B, C, "gate");
  const Tensor grad_y = empty(y.sizes(), dtype);
  const Sums sums(B, blocks_of(y.size(1)), C);
  with_dtypes(y, y, [&](auto value, auto) {
    using T = decltype(value);
    const auto kernel = HITSR_SELECT(isa, kKernels<T, T>).residual_backward;
    const T *const given = data<T>(grad), *const from = data<T>(y);
    const float* const gates = data<float>(gate);
    T* const to = data<T>(grad_y);
    for_each_block(y, [&](int64_t block, int64_t image, int64_t row, int64_t rows, float*) {
      kernel(given + row * C, from + row * C, gates + image * C, rows, C, to + row * C, sums.part(block));
    });
  });
  return {in_a_row(grad_y, y_in.scalar_type()), sums.total(0, C, gate_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library,
      "_modulated_layer_norm(Tensor x, Tensor scale, Tensor shift, float eps, ScalarType out_dtype, str isa) "
      "-> (Tensor, Tensor, Tensor)",
      TORCH_BOX(&norm));
  define(
      library,
      "_modulated_layer_norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor mean, Tensor rstd, str isa) "
      "-> (Tensor, Tensor, Tensor)",
      TORCH_BOX(&norm_backward));
  define(library, "_gated_residual(Tensor x, Tensor y, Tensor gate, str isa) -> Tensor", TORCH_BOX(&residual));
  define(
      library,
      "_gated_residual_norm(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps, "
      "ScalarType out_dtype, str isa) -> (Tensor, Tensor)",
      TORCH_BOX(&residual_norm));
  define(
      library, "_gated_residual_backward(Tensor grad, Tensor y, Tensor gate, str isa) -> (Tensor, Tensor)",
      TORCH_BOX(&residual_backward));
}

}  // namespace hitsr_fast
