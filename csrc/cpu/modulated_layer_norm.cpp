// CPU backend of modulated_layer_norm and gated_residual: the loops over images and blocks of rows.
#include "cpu/modulated_layer_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/instruction_sets.h"

namespace hitsr_fast {
namespace {

constexpr int64_t kBlock = 32;             // rows that share a sum; the same on any number of threads
constexpr int64_t kSmallestShare = 16384;  // values that are worth a thread

// S is of the stream from block to block, B of a branch's end that is nearest to it.
template <typename S, typename B>
struct Kernels {
  decltype(&adaln::portable::norm<S, B>) norm;
  decltype(&adaln::portable::norm_backward<S>) norm_backward;
  decltype(&adaln::portable::residual<S, B>) residual;
  decltype(&adaln::portable::residual_backward<S>) residual_backward;
};

template <typename S, typename B>
Kernels<S, B> kernels_of(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx_bf16" || isa == "avx512_bf16" || isa == "avx512") {
    using namespace adaln::avx512;
    return {norm<S, B>, norm_backward<S>, residual<S, B>, residual_backward<S>};
  }
  if (isa == "avx2") {
    using namespace adaln::avx2;
    return {norm<S, B>, norm_backward<S>, residual<S, B>, residual_backward<S>};
  }
#endif
  using namespace adaln::portable;
  return {norm<S, B>, norm_backward<S>, residual<S, B>, residual_backward<S>};
}

// Arguments of any floating dtype and strides become what the kernels read: rows (B, L, C) in bfloat16 or float32, and
// floats of which there is one for each image or row. Here and not in Python, where on small maps it would take longer
// than the kernels. This is the dtype of several kinds of rows that a kernel reads in one: bfloat16 if all are.
at::ScalarType dtype_of(std::initializer_list<at::ScalarType> dtypes) {
  const bool half = std::all_of(dtypes.begin(), dtypes.end(), [](auto dtype) { return dtype == at::kBFloat16; });
  return half ? at::kBFloat16 : at::kFloat;
}

at::Tensor rows_of(const at::Tensor& values, const at::Tensor& like, at::ScalarType dtype, const char* name) {
  check_cpu(values, name);
  TORCH_CHECK_VALUE(
      values.dim() == 3 && values.sizes() == like.sizes(), name, ": expected shape (B, L, C) as the first argument's, ",
      like.sizes(), ", found ", values.sizes());
  return values.to(dtype).contiguous();
}

at::Tensor floats_of(const at::Tensor& values, int64_t B, int64_t n, const char* name) {
  check_cpu(values, name);
  TORCH_CHECK_VALUE(
      values.dim() == 2 && values.size(0) == B && values.size(1) == n, name, ": expected shape (", B, ", ", n,
      "), found ", values.sizes());
  return values.to(at::kFloat).contiguous();
}

template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

int64_t blocks_of(int64_t L) { return (L + kBlock - 1) / kBlock; }

// A task for each block of rows: its number, the image, its first row of all, and how many.
template <typename F>
void for_each_block(const at::Tensor& values, const F& task) {
  const int64_t L = values.size(1), C = values.size(2), blocks = blocks_of(L), rows = std::min(L, kBlock);
  const int64_t share = std::max<int64_t>(kSmallestShare / std::max<int64_t>(rows * C, 1), 1);
  at::parallel_for(0, values.size(0) * blocks, share, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(static_cast<size_t>(2 * C));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t image = block / blocks, first = block % blocks * kBlock;
      task(block, image, image * L + first, std::min(kBlock, L - first), memory.data());
    }
  });
}

// Bfloat16 beside float32 is the branch's.
template <typename F>
void with_dtypes(const at::Tensor& stream, const at::Tensor& branch, const F& run) {
  if (branch.scalar_type() == at::kFloat) {
    run(float{}, float{});
  } else if (stream.scalar_type() == at::kFloat) {
    run(float{}, Bfloat16{});
  } else {
    run(Bfloat16{}, Bfloat16{});
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm(
    const at::Tensor& x_in, const at::Tensor& scale_in, const at::Tensor& shift_in, double eps, at::ScalarType out_dtype,
    const std::string& isa) {
  const at::Tensor x = rows_of(x_in, x_in, dtype_of({x_in.scalar_type(), out_dtype}), "x");
  const int64_t B = x.size(0), C = x.size(2);
  const at::Tensor scale = floats_of(scale_in, B, C, "scale"), shift = floats_of(shift_in, B, C, "shift");
  const at::Tensor out = at::empty_like(x, x.options().dtype(dtype_of({out_dtype})));
  const at::Tensor mean = at::empty({B, x.size(1)}, scale.options()), rstd = at::empty_like(mean);
  with_dtypes(x, out, [&](auto in, auto result) {
    using S = decltype(in);
    using R = decltype(result);
    const auto kernel = kernels_of<S, R>(isa_by_name(isa).name).norm;
    for_each_block(x, [&](int64_t, int64_t image, int64_t row, int64_t rows, float* memory) {
      kernel(
          data<S>(x) + row * C, data<float>(scale) + image * C, data<float>(shift) + image * C, static_cast<float>(eps),
          rows, C, memory, data<R>(out) + row * C, data<float>(mean) + row, data<float>(rstd) + row);
    });
  });
  return {out.to(out_dtype), mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward(
    const at::Tensor& grad_in, const at::Tensor& x_in, const at::Tensor& scale_in, const at::Tensor& mean_in,
    const at::Tensor& rstd_in, const std::string& isa) {
  const at::ScalarType dtype = dtype_of({grad_in.scalar_type(), x_in.scalar_type()});
  const at::Tensor x = rows_of(x_in, x_in, dtype, "x"), grad = rows_of(grad_in, x_in, dtype, "grad");
  const int64_t B = x.size(0), L = x.size(1), C = x.size(2);
  const at::Tensor scale = floats_of(scale_in, B, C, "scale");
  const at::Tensor mean = floats_of(mean_in, B, L, "mean"), rstd = floats_of(rstd_in, B, L, "rstd");
  const at::Tensor grad_x = at::empty_like(x), sums = at::zeros({B, blocks_of(L), 2, C}, scale.options());
  with_dtypes(x, x, [&](auto value, auto) {
    using T = decltype(value);
    const auto kernel = kernels_of<T, T>(isa_by_name(isa).name).norm_backward;
    for_each_block(x, [&](int64_t block, int64_t image, int64_t row, int64_t rows, float* memory) {
      float* to = data<float>(sums) + block * 2 * C;
      kernel(
          data<T>(grad) + row * C, data<T>(x) + row * C, data<float>(scale) + image * C, data<float>(mean) + row,
          data<float>(rstd) + row, rows, C, memory, data<T>(grad_x) + row * C, to, to + C);
    });
  });
  const at::Tensor whole = sums.sum(1);
  return {
      grad_x.to(x_in.scalar_type()), whole.select(1, 0).to(scale_in.scalar_type()).contiguous(),
      whole.select(1, 1).contiguous()};
}

at::Tensor residual(const at::Tensor& x_in, const at::Tensor& y_in, const at::Tensor& gate_in, const std::string& isa) {
  const at::ScalarType dtype = y_in.scalar_type();
  const at::Tensor x = rows_of(x_in, x_in, dtype_of({x_in.scalar_type(), dtype}), "x");
  const at::Tensor y = rows_of(y_in, x_in, dtype_of({dtype}), "y");
  const int64_t C = x.size(2);
  const at::Tensor gate = floats_of(gate_in, x.size(0), C, "gate");
  const at::Tensor out = at::empty_like(x);
  with_dtypes(x, y, [&](auto stream, auto branch) {
    using S = decltype(stream);
    using R = decltype(branch);
    const auto kernel = kernels_of<S, R>(isa_by_name(isa).name).residual;
    for_each_block(x, [&](int64_t, int64_t image, int64_t row, int64_t rows, float*) {
      kernel(
          data<S>(x) + row * C, data<R>(y) + row * C, data<float>(gate) + image * C, rows, C, data<S>(out) + row * C);
    });
  });
  return out.to(x_in.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> residual_backward(
    const at::Tensor& grad_in, const at::Tensor& y_in, const at::Tensor& gate_in, const std::string& isa) {
  const at::ScalarType dtype = dtype_of({grad_in.scalar_type(), y_in.scalar_type()});
  const at::Tensor y = rows_of(y_in, y_in, dtype, "y"), grad = rows_of(grad_in, y_in, dtype, "grad");
  const int64_t B = y.size(0), C = y.size(2);
  const at::Tensor gate = floats_of(gate_in, B, C, "gate");
  const at::Tensor grad_y = at::empty_like(y), sums = at::zeros({B, blocks_of(y.size(1)), C}, gate.options());
  with_dtypes(y, y, [&](auto value, auto) {
    using T = decltype(value);
    const auto kernel = kernels_of<T, T>(isa_by_name(isa).name).residual_backward;
    for_each_block(y, [&](int64_t block, int64_t image, int64_t row, int64_t rows, float*) {
      kernel(
          data<T>(grad) + row * C, data<T>(y) + row * C, data<float>(gate) + image * C, rows, C,
          data<T>(grad_y) + row * C, data<float>(sums) + block * C);
    });
  });
  return {grad_y.to(y_in.scalar_type()), sums.sum(1).to(gate_in.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  library.def(
      "_modulated_layer_norm(Tensor x, Tensor scale, Tensor shift, float eps, ScalarType out_dtype, str isa) "
      "-> (Tensor, Tensor, Tensor)",
      &norm);
  library.def(
      "_modulated_layer_norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor mean, Tensor rstd, str isa) "
      "-> (Tensor, Tensor, Tensor)",
      &norm_backward);
  library.def("_gated_residual(Tensor x, Tensor y, Tensor gate, str isa) -> Tensor", &residual);
  library.def("_gated_residual_backward(Tensor grad, Tensor y, Tensor gate, str isa) -> (Tensor, Tensor)", &residual_backward);
}

}  // namespace hitsr_fast
