// CPU backend of group_norm_silu: blocks of a map in parallel, once for the moments and once for the result.
#include "cpu/group_norm_silu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/instruction_sets.h"
#include "cpu/large_pages.h"

namespace hitsr_fast {
namespace {

constexpr int64_t kBlock = 16384;         // values that are read twice for their moments: they stay in a near cache
constexpr int64_t kMostPixels = 512;      // that one channel's sum in a block runs over
constexpr int64_t kSmallestShare = 8192;  // values that are worth a thread

template <typename T>
struct Kernels {
  decltype(&group_norm::portable::moments_of_pixels<T>) moments_of_pixels;
  decltype(&group_norm::portable::moments_of_run<T>) moments_of_run;
  decltype(&group_norm::portable::apply_to_pixels<T>) apply_to_pixels;
  decltype(&group_norm::portable::apply_to_run<T>) apply_to_run;
};

template <typename T>
Kernels<T> kernels_of(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx_bf16" || isa == "avx512_bf16" || isa == "avx512") {
    using namespace group_norm::avx512;
    return {moments_of_pixels<T>, moments_of_run<T>, apply_to_pixels<T>, apply_to_run<T>};
  }
  if (isa == "avx2") {
    using namespace group_norm::avx2;
    return {moments_of_pixels<T>, moments_of_run<T>, apply_to_pixels<T>, apply_to_run<T>};
  }
#endif
  using namespace group_norm::portable;
  return {moments_of_pixels<T>, moments_of_run<T>, apply_to_pixels<T>, apply_to_run<T>};
}

// Maps, cut into blocks of a size that does not depend on the number of threads: of an image's P pixels if they are
// channels-last, else of a group's width * P values, which lie in a row.
struct Maps {
  int64_t B, C, P, groups, width;  // width: channels of a group
  bool channels_last;
  int64_t step, blocks;  // pixels or values of a block, and how many there are of an image or group

  Maps(const at::Tensor& x, int64_t groups, bool channels_last)
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
  at::parallel_for(0, count, share, [&](int64_t begin, int64_t end) {
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
      std::vector<float> memory(static_cast<size_t>(3 * C));
      kernels.moments_of_pixels(
          x + (image * maps.P + block * maps.step) * C, maps.size(block), groups, maps.width, memory.data(),
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
};

// Blocks are joined in their order, in double precision.
Coefficients join(const Maps& maps, const Moments& moments, const float* weight, const float* bias, double eps) {
  const int64_t groups = maps.groups, blocks = maps.blocks;
  const auto channels = static_cast<size_t>(maps.B * maps.C);
  Coefficients found{std::vector<float>(channels), std::vector<float>(channels), std::vector<float>(channels)};
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
at::Tensor floats_of(const at::Tensor& values, int64_t C, const char* name) {
  check_cpu(values, name);
  TORCH_CHECK_VALUE(
      values.dim() == 1 && values.size(0) == C, name, ": expected shape (", C, "), found ", values.sizes());
  return values.to(at::kFloat).contiguous();
}

template <typename T>
void run(
    const at::Tensor& x, const at::Tensor& out, const Maps& maps, const at::Tensor& weight, const at::Tensor& bias,
    double eps, const std::string& isa) {
  const Kernels<T> kernels = kernels_of<T>(isa);
  const T* const from = static_cast<const T*>(x.const_data_ptr());
  const Moments moments = measure(maps, kernels, from);
  const auto* const factors = static_cast<const float*>(weight.const_data_ptr());
  const auto* const offsets = static_cast<const float*>(bias.const_data_ptr());
  const Coefficients found = join(maps, moments, factors, offsets, eps);
  apply(maps, kernels, found, from, static_cast<T*>(out.data_ptr()));
}

// x is read as it lies if its channels or its pixels lie in a row, and copied otherwise.
at::Tensor group_norm_silu(
    const at::Tensor& given, const at::Tensor& weight, const at::Tensor& bias, int64_t groups, double eps,
    const std::string& isa) {
  check_cpu(given, "x");
  TORCH_CHECK_VALUE(given.dim() == 4, "x: expected shape (B, C, H, W), found ", given.sizes());
  const int64_t C = given.size(1), P = given.size(2) * given.size(3);
  TORCH_CHECK_VALUE(
      groups > 0 && C > 0 && C % groups == 0, "groups: expected a divisor of C = ", C, ", found ", groups);
  const bool channels_last = C > 1 && P > 1 && given.stride(1) == 1;
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor x = given.contiguous(format), out = at::empty_like(x, format);
  const at::Tensor weights = floats_of(weight, C, "weight"), biases = floats_of(bias, C, "bias");
  if (out.numel() == 0) return out;
  advise_large_pages(out);
  const Maps maps(x, groups, channels_last);
  const std::string set = isa_by_name(isa).name;
  switch (x.scalar_type()) {
    case at::kFloat:
      run<float>(x, out, maps, weights, biases, eps, set);
      break;
    case at::kHalf:
      run<Half>(x, out, maps, weights, biases, eps, set);
      break;
    case at::kBFloat16:
      run<Bfloat16>(x, out, maps, weights, biases, eps, set);
      break;
    default:
      TORCH_CHECK_TYPE(false, "x: expected dtype float16, bfloat16 or float32, found ", x.scalar_type());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  library.def(
      "_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, str isa) -> Tensor",
      &group_norm_silu);
}

}  // namespace hitsr_fast
