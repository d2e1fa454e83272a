// CPU backend of group_norm_silu: blocks of a map in parallel, once for the moments and once for the result; of its
// gradient, once for the sums and once for the result.
#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/buffer.h"
#include "cpu/instruction_sets.h"
#include "tensor.h"

namespace hitsr_fast {
namespace {

constexpr int64_t kBlock = 16384;         // values that are read twice for their moments: they stay in a near cache
constexpr int64_t kMostPixels = 512;      // that one channel's sum in a block runs over
constexpr int64_t kSmallestShare = 8192;  // values that are worth a thread
constexpr int64_t kKept = 262144;         // values of a group whose gradients are kept in a near cache

// Moments are the mean of some values, and the sum of the squares of their deviations from it. A value x becomes
// silu((x - mean) * factor + offset).
template <typename T>
struct Kernels {
  // Of x [pixels][groups][width], for each group. memory: [3 * groups * width] floats.
  void (*moments_of_pixels)(
      const T* x, int64_t pixels, int64_t groups, int64_t width, float* memory, float* mean, float* squares);
  // Of x [count].
  void (*moments_of_run)(const T* x, int64_t count, float* mean, float* squares);
  // Of x [pixels][C]. mean, factor, offset: [C].
  void (*apply_to_pixels)(
      const T* x, const float* mean, const float* factor, const float* offset, int64_t pixels, int64_t C, T* out);
  // Of x [count].
  void (*apply_to_run)(const T* x, float mean, float factor, float offset, int64_t count, T* out);
  // The gradient G in (x - mean) * factor + offset is `grad` times SiLU's derivative of that. Of each channel of
  // [pixels][C] the sums of G and of G * (x - mean). sums: [2][C].
  void (*sums_of_pixels)(
      const T* grad, const T* x, const float* mean, const float* factor, const float* offset, int64_t pixels,
      int64_t C, float* sums);
  // The same of [count]. sums: [2]. G is written to `inner`, with room for one whole vector more, if that is not null.
  void (*sums_of_run)(
      const T* grad, const T* x, float mean, float factor, float offset, int64_t count, float* inner, double* sums);
  // G * factor + (x - mean) * linear + constant, of [pixels][C].
  void (*slope_of_pixels)(
      const T* grad, const T* x, const float* mean, const float* factor, const float* offset, const float* linear,
      const float* constant, int64_t pixels, int64_t C, T* out);
  // The same of [count]. G is read from `inner`, if that is not null.
  void (*slope_of_run)(
      const T* grad, const T* x, float mean, float factor, float offset, float linear, float constant, int64_t count,
      const float* inner, T* out);
};

#define HITSR_OP group_norm_silu
#include "cpu/foreach_isa.h"

// Asks Linux to back a new tensor's memory with pages of 2 MiB, if the system leaves that to programs ("madvise").
// Glibc takes a block of 32 MiB or more from the system each time, and to fault it in by pages of 4 KiB takes longer
// than to write it. It is advice: that the system does not follow it is no error.
void advise_large_pages(const Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20, kLeast = uintptr_t{32} << 20;
  const auto from = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const auto size = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  if (size < kLeast) return;
  const uintptr_t begin = (from + kPage - 1) / kPage * kPage, end = (from + size) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Maps, cut into blocks of a size that does not depend on the number of threads: of an image's P pixels if they are
// channels-last, else of a group's width * P values, which lie in a row.
struct Maps {
  int64_t B, C, P, groups, width;  // width: channels of a group
  bool channels_last;
  int64_t step, blocks;  // pixels or values of a block, and how many there are of an image or group

  Maps(const Tensor& x, int64_t groups, bool channels_last)
      : B(x.size(0)), C(x.size(1)), P(x.size(2) * x.size(3)), groups(groups), width(C / groups),
        channels_last(channels_last),
        step(channels_last ? std::clamp<int64_t>(kBlock / C, 1, kMostPixels) : kBlock),
        blocks((length() + step - 1) / step) {}

  int64_t length() const { return channels_last ? P : width * P; }
  int64_t size(int64_t block) const { return std::min(step, length() - block * step); }
};

// A task for each of `count` pieces of so many values.
template <typename F>
void for_each(int64_t count, int64_t values, const F& task) {
  const int64_t share = std::max<int64_t>(kSmallestShare / std::max<int64_t>(values, 1), 1);
  torch::stable::parallel_for(0, count, share, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// Of each block and group, [B][blocks][groups].
struct Moments {
  std::vector<float> mean, squares;

  explicit Moments(const Maps& maps)
      : mean(static_cast<size_t>(maps.B * maps.blocks * maps.groups)), squares(mean.size()) {}
};

template <typename T>
Moments measure(const Maps& maps, const Kernels<T>& kernels, const T* x) {
  Moments moments(maps);
  const int64_t blocks = maps.blocks, groups = maps.groups, C = maps.C;
  if (maps.channels_last) {
    for_each(maps.B * blocks, maps.size(0) * C, [&](int64_t i) {
      const int64_t image = i / blocks, block = i % blocks;
      const Buffer<float> memory(3 * C);
      kernels.moments_of_pixels(
          x + (image * maps.P + block * maps.step) * C, maps.size(block), groups, maps.width, memory.at(0),
          &moments.mean[i * groups], &moments.squares[i * groups]);
    });
  } else {
    for_each(maps.B * groups * blocks, maps.size(0), [&](int64_t i) {
      const int64_t part = i / blocks, block = i % blocks;
      const int64_t to = (part / groups * blocks + block) * groups + part % groups;
      kernels.moments_of_run(
          x + part * maps.length() + block * maps.step, maps.size(block), &moments.mean[to], &moments.squares[to]);
    });
  }
  return moments;
}

// What the kernels take for each channel of each image, [B][C].
struct Coefficients {
  std::vector<float> mean, factor, offset;

  explicit Coefficients(const Maps& maps)
      : mean(static_cast<size_t>(maps.B * maps.C)), factor(mean.size()), offset(mean.size()) {}
};

// Blocks are joined in their order, in double precision. group_mean, group_rstd: [B][groups], written.
Coefficients join(
    const Maps& maps, const Moments& moments, const float* weight, const float* bias, double eps, float* group_mean,
    float* group_rstd) {
  const int64_t groups = maps.groups, blocks = maps.blocks;
  Coefficients found(maps);
  const double unit = maps.channels_last ? maps.width : 1, count = unit * static_cast<double>(maps.length());
  std::vector<double> mean(static_cast<size_t>(groups)), squares(mean.size());
  for (int64_t image = 0; image < maps.B; ++image) {
    const float *means = &moments.mean[image * blocks * groups], *parts = &moments.squares[image * blocks * groups];
    std::fill(mean.begin(), mean.end(), 0.0);
    std::fill(squares.begin(), squares.end(), 0.0);
    for (int64_t block = 0; block < blocks; ++block) {
      const double share = unit * static_cast<double>(maps.size(block)) / count;
      for (int64_t g = 0; g < groups; ++g) mean[g] += share * means[block * groups + g];
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const double values = unit * static_cast<double>(maps.size(block));
      for (int64_t g = 0; g < groups; ++g) {
        const double apart = means[block * groups + g] - mean[g];
        squares[g] += parts[block * groups + g] + values * apart * apart;
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      group_mean[image * groups + g] = static_cast<float>(mean[g]);
      group_rstd[image * groups + g] = static_cast<float>(1 / std::sqrt(squares[g] / count + eps));
    }
    for (int64_t c = 0; c < maps.C; ++c) {
      const int64_t g = c / maps.width, to = image * maps.C + c;
      found.mean[to] = static_cast<float>(mean[g]);
      found.factor[to] = static_cast<float>(weight[c] / std::sqrt(squares[g] / count + eps));
      found.offset[to] = bias[c];
    }
  }
  return found;
}

template <typename T>
void apply(const Maps& maps, const Kernels<T>& kernels, const Coefficients& found, const T* x, T* out) {
  const int64_t C = maps.C, P = maps.P;
  if (maps.channels_last) {
    for_each(maps.B * maps.blocks, maps.size(0) * C, [&](int64_t i) {
      const int64_t image = i / maps.blocks, block = i % maps.blocks, at = (image * P + block * maps.step) * C;
      const int64_t first = image * C;
      kernels.apply_to_pixels(
          x + at, &found.mean[first], &found.factor[first], &found.offset[first], maps.size(block), C, out + at);
    });
  } else {
    for_each(maps.B * C, P, [&](int64_t i) {
      kernels.apply_to_run(x + i * P, found.mean[i], found.factor[i], found.offset[i], P, out + i * P);
    });
  }
}

// Of any floating dtype and strides, as floats in a row.
Tensor floats_of(const Tensor& values, int64_t C, const char* name) {
  check_cpu(values, name);
  check_shape(values, {C}, name);
  return in_a_row(values, ScalarType::Float);
}

// Of channels-last maps the sums of G and of its products with deviations from the mean, [B][2][C]; G is that of
// `Kernels`. Blocks are joined in their order, in double precision.
template <typename T>
std::vector<double> sum_pixels(
    const Maps& maps, const Kernels<T>& kernels, const Coefficients& found, const T* grad, const T* x) {
  const int64_t C = maps.C, P = maps.P, blocks = maps.blocks;
  std::vector<double> sums(static_cast<size_t>(maps.B * 2 * C));
  const Buffer<float> parts(maps.B * blocks * 2 * C);
  for_each(maps.B * blocks, maps.size(0) * C, [&](int64_t i) {
    const int64_t image = i / blocks, block = i % blocks, at = (image * P + block * maps.step) * C, first = image * C;
    kernels.sums_of_pixels(
        grad + at, x + at, &found.mean[first], &found.factor[first], &found.offset[first], maps.size(block), C,
        parts.at(i * 2 * C));
  });
  for_each(maps.B, blocks * 2 * C, [&](int64_t image) {
    double* to = &sums[image * 2 * C];
    for (int64_t block = 0; block < blocks; ++block) {
      const float* from = parts.at((image * blocks + block) * 2 * C);
      for (int64_t c = 0; c < 2 * C; ++c) to[c] += from[c];
    }
  });
  return sums;
}

// With n the normalised values, G the gradient in n * weight + bias and H = G * weight:
// dx = rstd (H - mean(H) - n mean(H n)), means over a group; dweight = sum G n, dbias = sum G.
template <typename T>
void run_backward(
    const Maps& maps, const Kernels<T>& kernels, const T* grad, const T* x, const float* weight, const float* bias,
    const float* mean, const float* rstd, T* grad_x, float* grad_weight, float* grad_bias) {
  const int64_t B = maps.B, C = maps.C, P = maps.P, groups = maps.groups, width = maps.width;
  Coefficients found(maps);
  for (int64_t i = 0; i < B * C; ++i) {
    const int64_t part = i / width;
    found.mean[i] = mean[part];
    found.factor[i] = weight[i % C] * rstd[part];
    found.offset[i] = bias[i % C];
  }
  std::vector<double> sums(static_cast<size_t>(maps.channels_last ? 0 : B * 2 * C));
  std::vector<float> linear(found.mean.size()), constant(linear.size());
  const double count = static_cast<double>(width) * static_cast<double>(P);
  const auto join = [&](int64_t part) {  // of an image's group
    const int64_t image = part / groups, first = part % groups * width;
    const double *plain = &sums[image * 2 * C], *product = plain + C, scale = rstd[part];
    double plain_mean = 0, product_mean = 0;
    for (int64_t c = first; c < first + width; ++c) {
      plain_mean += weight[c] * plain[c] / count;
      product_mean += weight[c] * product[c] * scale / count;
    }
    for (int64_t i = part * width; i < (part + 1) * width; ++i) {
      constant[i] = static_cast<float>(-scale * plain_mean);
      linear[i] = static_cast<float>(-scale * scale * product_mean);
    }
  };
  const auto sum = [&](int64_t i, float* inner) {
    double both[2];
    kernels.sums_of_run(grad + i * P, x + i * P, found.mean[i], found.factor[i], found.offset[i], P, inner, both);
    const int64_t to = i / C * 2 * C + i % C;
    sums[to] = both[0];
    sums[to + C] = both[1];
  };
  const auto slope = [&](int64_t i, const float* inner) {
    kernels.slope_of_run(
        grad + i * P, x + i * P, found.mean[i], found.factor[i], found.offset[i], linear[i], constant[i], P, inner,
        grad_x + i * P);
  };
  if (maps.channels_last) {
    sums = sum_pixels(maps, kernels, found, grad, x);
    for (int64_t part = 0; part < B * groups; ++part) join(part);
    for_each(B * maps.blocks, maps.size(0) * C, [&](int64_t i) {
      const int64_t image = i / maps.blocks, block = i % maps.blocks, at = (image * P + block * maps.step) * C;
      const int64_t first = image * C;
      kernels.slope_of_pixels(
          grad + at, x + at, &found.mean[first], &found.factor[first], &found.offset[first], &linear[first],
          &constant[first], maps.size(block), C, grad_x + at);
    });
  } else if (maps.length() <= kKept) {
    for_each(B * groups, maps.length(), [&](int64_t part) {
      const Buffer<float> inner(maps.length() + 16);
      for (int64_t c = 0; c < width; ++c) sum(part * width + c, inner.at(c * P));
      join(part);
      for (int64_t c = 0; c < width; ++c) slope(part * width + c, inner.at(c * P));
    });
  } else {
    for_each(B * C, P, [&](int64_t i) { sum(i, nullptr); });
    for (int64_t part = 0; part < B * groups; ++part) join(part);
    for_each(B * C, P, [&](int64_t i) { slope(i, nullptr); });
  }
  for (int64_t c = 0; c < C; ++c) {
    double of_weight = 0, of_bias = 0;
    for (int64_t image = 0; image < B; ++image) {
      of_bias += sums[image * 2 * C + c];
      of_weight += sums[image * 2 * C + C + c] * rstd[image * groups + c / width];
    }
    grad_weight[c] = static_cast<float>(of_weight);
    grad_bias[c] = static_cast<float>(of_bias);
  }
}

bool is_channels_last(const Tensor& x) {
  return x.size(1) > 1 && x.size(2) * x.size(3) > 1 && x.stride(1) == 1;
}

// The tensor itself if its channels, or its pixels, lie in a row, and a copy otherwise.
Tensor in_layout(const Tensor& x, bool channels_last) {
  const auto format =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::contiguous(x, format);
}

void check_maps(const Tensor& x, int64_t groups) {
  check_cpu(x, "x");
  HITSR_CHECK(x.dim() == 4, "x: expected shape (B, C, H, W), found ", x.sizes());
  HITSR_CHECK(
      groups > 0 && x.size(1) > 0 && x.size(1) % groups == 0, "groups: expected a divisor of C = ", x.size(1),
      ", found ", groups);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(
    const Tensor& given, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
    const std::string& isa) {
  check_maps(given, groups);
  const int64_t B = given.size(0), C = given.size(1);
  const bool channels_last = is_channels_last(given);
  const Tensor x = in_layout(given, channels_last), out = torch::stable::empty_like(x);
  const Tensor weights = floats_of(weight, C, "weight"), biases = floats_of(bias, C, "bias");
  const Tensor mean = empty({B, groups}, ScalarType::Float), rstd = empty({B, groups}, ScalarType::Float);
  float *const means = data<float>(mean), *const rstds = data<float>(rstd);
  if (out.numel() == 0) {
    std::fill(means, means + mean.numel(), 0.0f);
    std::fill(rstds, rstds + rstd.numel(), static_cast<float>(1 / std::sqrt(eps)));
    return {out, mean, rstd};
  }
  advise_large_pages(out);
  const Maps maps(x, groups, channels_last);
  visit_dtype(x, "x", [&](auto value) {
    using T = decltype(value);
    const Kernels<T>& kernels = HITSR_SELECT(isa, kKernels<T>);
    const Moments moments = measure(maps, kernels, data<const T>(x));
    const Coefficients found =
        join(maps, moments, data<const float>(weights), data<const float>(biases), eps, means, rstds);
    apply(maps, kernels, found, data<const T>(x), data<T>(out));
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad_in, const Tensor& given, const Tensor& weight, const Tensor& bias, const Tensor& mean_in,
    const Tensor& rstd_in, const std::string& isa) {
  const int64_t B = given.size(0), C = given.size(1), groups = mean_in.size(1);
  check_maps(given, groups);
  check_cpu(grad_in, "grad");
  check_shape(grad_in, given.sizes(), "grad");
  check_shape(mean_in, {B, groups}, "mean");
  check_shape(rstd_in, {B, groups}, "rstd");
  const bool channels_last = is_channels_last(given);
  const Tensor x = in_layout(given, channels_last);
  const bool same = grad_in.scalar_type() == x.scalar_type();
  const Tensor grad = in_layout(same ? grad_in : in_a_row(grad_in, x.scalar_type()), channels_last);
  const Tensor weights = floats_of(weight, C, "weight"), biases = floats_of(bias, C, "bias");
  const Tensor mean = in_a_row(mean_in, ScalarType::Float), rstd = in_a_row(rstd_in, ScalarType::Float);
  const Tensor grad_x = torch::stable::empty_like(x);
  const Tensor grad_weight = empty({C}, ScalarType::Float), grad_bias = empty({C}, ScalarType::Float);
  float *const of_weight = data<float>(grad_weight), *const of_bias = data<float>(grad_bias);
  if (x.numel() == 0) {
    std::fill(of_weight, of_weight + C, 0.0f);
    std::fill(of_bias, of_bias + C, 0.0f);
  } else {
    advise_large_pages(grad_x);
    const Maps maps(x, groups, channels_last);
    visit_dtype(x, "x", [&](auto value) {
      using T = decltype(value);
      run_backward<T>(
          maps, HITSR_SELECT(isa, kKernels<T>), data<const T>(grad), data<const T>(x), data<const float>(weights),
          data<const float>(biases), data<const float>(mean), data<const float>(rstd), data<T>(grad_x), of_weight,
          of_bias);
    });
  }
  return {grad_x, in_a_row(grad_weight, weight.scalar_type()), in_a_row(grad_bias, bias.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library,
      "_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, str isa) "
      "-> (Tensor, Tensor, Tensor)",
      TORCH_BOX(&group_norm_silu));
  define(
      library,
      "_group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, str isa) "
      "-> (Tensor, Tensor, Tensor)",
      TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace hitsr_fast
