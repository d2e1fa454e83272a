// CPU backend of group_norm_silu: blocks of a map in parallel, once for the moments and once for the result.
#include <algorithm>
#include <string>
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
Tensor floats_of(const Tensor& values, int64_t C, const char* name) {
  check_cpu(values, name);
  check_shape(values, {C}, name);
  return in_a_row(values, ScalarType::Float);
}

template <typename T>
void run(
    const Tensor& x, const Tensor& out, const Maps& maps, const Tensor& weight, const Tensor& bias, double eps,
    const std::string& isa) {
  const Kernels<T>& kernels = HITSR_SELECT(isa, kKernels<T>);
  const Moments moments = measure(maps, kernels, data<const T>(x));
  const Coefficients found = join(maps, moments, data<const float>(weight), data<const float>(bias), eps);
  apply(maps, kernels, found, data<const T>(x), data<T>(out));
}

// x is read as it lies if its channels or its pixels lie in a row, and copied otherwise.
Tensor group_norm_silu(
    const Tensor& given, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
    const std::string& isa) {
  check_cpu(given, "x");
  HITSR_CHECK(given.dim() == 4, "x: expected shape (B, C, H, W), found ", given.sizes());
  const int64_t C = given.size(1), P = given.size(2) * given.size(3);
  HITSR_CHECK(
      groups > 0 && C > 0 && C % groups == 0, "groups: expected a divisor of C = ", C, ", found ", groups);
  const bool channels_last = C > 1 && P > 1 && given.stride(1) == 1;
  const auto format =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  const Tensor x = torch::stable::contiguous(given, format), out = torch::stable::empty_like(x);
  const Tensor weights = floats_of(weight, C, "weight"), biases = floats_of(bias, C, "bias");
  if (out.numel() == 0) return out;
  advise_large_pages(out);
  const Maps maps(x, groups, channels_last);
  visit_dtype(x, "x", [&](auto value) { run<decltype(value)>(x, out, maps, weights, biases, eps, isa); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library, "_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, str isa) -> Tensor",
      TORCH_BOX(&group_norm_silu));
}

}  // namespace hitsr_fast
