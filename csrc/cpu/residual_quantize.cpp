// CPU backend of residual_quantize, residual_decode and residual_step: one walk over the scales of each image.
#include "cpu/residual_quantize.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>

#include "check.h"
#include "cpu/nearest_code_book.h"

namespace hitsr_fast {
namespace {

using residual::Band;
using residual::Geometry;
using residual::Scale;
using residual::Taps;

// Rows of a map, and tokens, that are worth a thread.
constexpr int64_t kRowShare = 4, kTokenShare = 16;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

struct Kernels {
  int64_t lanes;
  decltype(&residual::portable::pool) pool;
  decltype(&residual::portable::spread) spread;
};

Kernels kernels_of(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx_bf16" || isa == "avx512_bf16" || isa == "avx512") {
    return {16, residual::avx512::pool, residual::avx512::spread};
  }
  if (isa == "avx2") return {8, residual::avx2::pool, residual::avx2::spread};
#endif
  return {4, residual::portable::pool, residual::portable::spread};
}

// Memory for floats, used from the first cache line on.
at::Tensor floats(int64_t count) { return at::empty({count + 16}, at::kFloat); }
at::Tensor zeros(int64_t count) { return at::zeros({count + 16}, at::kFloat); }
float* aligned(const at::Tensor& memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory.data_ptr<float>());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// The scales of a pyramid, with the tables that their kernels read.
class Pyramid {
 public:
  Pyramid(
      int64_t channels, int64_t height, int64_t width, const std::string& isa, at::IntArrayRef scales,
      const at::Tensor& phi_weight, const at::Tensor& phi_bias, at::IntArrayRef phi_index, double phi_ratio,
      int64_t most_tokens = 0)
      : most_tokens(most_tokens),
        kernels(kernels_of(isa)),
        map{height, width, channels, round_up(width, residual::kPlacesAtATime), round_up(channels, kernels.lanes)} {
    if (phi_ratio != 0) fold(phi_weight, phi_bias, static_cast<float>(phi_ratio));
    for (size_t s = 0; s < phi_index.size(); ++s) {
      Scale scale{scales[2 * s], scales[2 * s + 1], tokens, {}, {}, nullptr, nullptr};
      TORCH_CHECK_VALUE(
          0 < scale.height && scale.height <= height && 0 < scale.width && scale.width <= width,
          "scales: expected at most the map's ", height, " x ", width, ", found ", scale.height, " x ", scale.width);
      scale.y = taps(scale.height, height);
      scale.x = taps(scale.width, width);
      if (phi_ratio != 0) {
        TORCH_CHECK_VALUE(0 <= phi_index[s] && phi_index[s] < phi_bias.size(0), "phi_index: found ", phi_index[s]);
        scale.phi_weight = aligned(weight_) + phi_index[s] * 9 * channels * map.channels_stride;
        scale.phi_bias = aligned(bias_) + phi_index[s] * map.channels_stride;
      }
      tokens += scale.height * scale.width;
      this->most_tokens = std::max(this->most_tokens, scale.height * scale.width);
      this->scales.push_back(scale);
    }
  }

  int64_t map_floats() const { return map.height * map.stride * map.channels_stride; }

  int64_t most_tokens;  // of a scale, or of a grid to be pooled to
  int64_t tokens = 0;   // of all scales
  const Kernels kernels;
  const Geometry map;
  std::vector<Scale> scales;

 private:
  // phi(h) = (1 - r) h + r (conv(h) + bias) is a convolution itself.
  void fold(const at::Tensor& phi_weight, const at::Tensor& phi_bias, float ratio) {
    const int64_t phis = phi_bias.size(0), C = map.channels, stride = map.channels_stride;
    const at::Tensor weight = phi_weight.to(at::kFloat).contiguous(), bias = phi_bias.to(at::kFloat).contiguous();
    weight_ = zeros(phis * 9 * C * stride);
    bias_ = zeros(phis * stride);
    const float* from = weight.const_data_ptr<float>();
    float* to = aligned(weight_);
    for (int64_t p = 0; p < phis; ++p) {
      const float* given = bias.const_data_ptr<float>() + p * C;
      for (int64_t out = 0; out < C; ++out) aligned(bias_)[p * stride + out] = ratio * given[out];
      for (int64_t tap = 0; tap < 9; ++tap) {
        for (int64_t in = 0; in < C; ++in) {
          float* row = to + ((p * 9 + tap) * C + in) * stride;
          for (int64_t out = 0; out < C; ++out) row[out] = ratio * from[((p * C + out) * C + in) * 9 + tap];
          if (tap == 4) row[in] += 1 - ratio;
        }
      }
    }
  }

  Taps taps(int64_t from, int64_t to) {
    auto& place = places_.emplace_back(4 * to);
    auto& weight = weights_.emplace_back(4 * to);
    constexpr double a = -0.75;
    const auto near = [](double x) { return ((a + 2) * x - (a + 3)) * x * x + 1; };
    const auto far = [](double x) { return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a; };
    for (int64_t i = 0; i < to; ++i) {
      const double centre = (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
      const double below = std::floor(centre), part = centre - below;
      const double values[4] = {far(part + 1), near(part), near(1 - part), far(2 - part)};
      for (int64_t t = 0; t < 4; ++t) {
        place[4 * i + t] = static_cast<int>(std::clamp<int64_t>(static_cast<int64_t>(below) - 1 + t, 0, from - 1));
        weight[4 * i + t] = static_cast<float>(values[t]);
      }
    }
    return {place.data(), weight.data()};
  }

  at::Tensor weight_, bias_;
  std::deque<std::vector<int>> places_;  // their elements stay where they are
  std::deque<std::vector<float>> weights_;
};

// What one thread works with; made before the walk, so that nothing is allocated on the way.
class Worker {
 public:
  Worker(const Pyramid& pyramid, const nearest::Codebook* book, const std::string& isa) {
    const Geometry& map = pyramid.map;
    memory_[0] = zeros(map.width * map.channels_stride);
    memory_[1] = floats(pyramid.map_floats());
    memory_[2] = zeros((residual::kBandRows + 2) * (map.stride + 2) * map.channels_stride);
    band = {aligned(memory_[0]), aligned(memory_[1]), aligned(memory_[2])};
    memory_[3] = floats(pyramid.most_tokens * map.channels_stride);
    rows = aligned(memory_[3]);
    if (book != nullptr) searcher = nearest::make_searcher<float>(isa, *book, pyramid.most_tokens);
  }

  Band band;
  float* rows;  // pooled tokens of a scale
  std::unique_ptr<nearest::Searcher<float>> searcher;

 private:
  at::Tensor memory_[4];
};

// Runs a task over [0, count): here, or shared out. The task takes a worker and a range.
struct Alone {
  Worker& worker;
  template <typename F>
  void operator()(int64_t count, int64_t, const F& task) const {
    task(worker, int64_t{0}, count);
  }
};
struct Shared {
  std::vector<Worker>& workers;
  template <typename F>
  void operator()(int64_t count, int64_t share, const F& task) const {
    at::parallel_for(0, count, share, [&](int64_t begin, int64_t end) {
      task(workers.at(at::get_thread_num()), begin, end);
    });
  }
};

// What the walk reads and writes, over all images of a batch; what is not asked for has no elements.
struct Batch {
  const at::Tensor& codebook;  // (K, C) float
  at::Tensor latents;          // (B, C, H, W), any strides
  at::Tensor indices;          // (B, T)
  int64_t replayed;            // tokens of an image that are given
  at::Tensor reconstruction, inputs, reconstructions;
};

// Between the maps of tensors, (C, H, W) of any strides, and of the walk. Rows [begin, end).
template <typename T>
void read_map(const Geometry& map, const at::Tensor& image, int64_t begin, int64_t end, float* to) {
  const T* from = image.const_data_ptr<T>();
  const int64_t c_stride = image.stride(0), y_stride = image.stride(1), x_stride = image.stride(2);
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t x = 0; x < map.width; ++x) {
        to[(y * map.stride + x) * map.channels_stride + c] =
            static_cast<float>(from[c * c_stride + y * y_stride + x * x_stride]);
      }
    }
  }
}

void write_map(const Geometry& map, const float* from, int64_t begin, int64_t end, const at::Tensor& image) {
  float* to = image.data_ptr<float>();
  const int64_t c_stride = image.stride(0), y_stride = image.stride(1), x_stride = image.stride(2);
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t x = 0; x < map.width; ++x) {
        to[c * c_stride + y * y_stride + x * x_stride] = from[(y * map.stride + x) * map.channels_stride + c];
      }
    }
  }
}

// All scales of one image.
template <typename Executor>
void walk(
    const Pyramid& pyramid, const Batch& batch, int64_t image, const Executor& run, float* reconstruction,
    float* residual) {
  const Geometry& map = pyramid.map;
  const bool has_latent = batch.latents.defined();
  run(map.height, kRowShare, [&](Worker&, int64_t begin, int64_t end) {
    const int64_t row = map.stride * map.channels_stride;
    std::fill(reconstruction + begin * row, reconstruction + end * row, 0.0f);
    if (!has_latent) return;
    AT_DISPATCH_SWITCH(batch.latents.scalar_type(), "residual_quantize", HITSR_DISPATCH_CASES([&] {
      read_map<scalar_t>(map, batch.latents[image], begin, end, residual);
    }));
  });
  int64_t* indices = batch.indices.data_ptr<int64_t>() + image * pyramid.tokens;
  for (size_t s = 0; s < pyramid.scales.size(); ++s) {
    const Scale& scale = pyramid.scales[s];
    const bool search = scale.start >= batch.replayed, inputs = s > 0 && batch.inputs.size(1) > 0;
    if (search || inputs) {
      run(scale.height * scale.width, kTokenShare, [&](Worker& worker, int64_t begin, int64_t end) {
        const int64_t count = end - begin;
        if (inputs) {
          pyramid.kernels.pool(map, reconstruction, scale.height, scale.width, begin, end, worker.rows);
          const int64_t first = scale.start - pyramid.scales[1].start + begin;
          float* to = batch.inputs.data_ptr<float>() + (image * batch.inputs.size(1) + first) * map.channels;
          for (int64_t n = 0; n < count; ++n) {
            std::copy_n(worker.rows + n * map.channels_stride, map.channels, to + n * map.channels);
          }
        }
        if (search) {
          pyramid.kernels.pool(map, residual, scale.height, scale.width, begin, end, worker.rows);
          const nearest::Rows<float> rows{worker.rows, 1, count, 0, 0, map.channels_stride, 1};
          nearest::count_full_scans(worker.searcher->search(rows, 0, count, indices + scale.start + begin));
        }
      });
    }
    run(map.height, kRowShare, [&](Worker& worker, int64_t begin, int64_t end) {
      pyramid.kernels.spread(
          map, scale, batch.codebook.const_data_ptr<float>(), indices + scale.start, begin, end, worker.band,
          reconstruction, residual);
      if (batch.reconstructions.size(0) == 0) return;
      write_map(map, reconstruction, begin, end, batch.reconstructions[static_cast<int64_t>(s)][image]);
    });
  }
  run(map.height, kRowShare, [&](Worker&, int64_t begin, int64_t end) {
    write_map(map, reconstruction, begin, end, batch.reconstruction[image]);
  });
}

// A task for all images: one a thread while there are enough of them, the rest one after the other with all threads. It
// takes the image's number, an executor, and room for two maps.
template <typename F>
void for_each_image(
    const Pyramid& pyramid, int64_t B, const nearest::Codebook* book, const std::string& isa, const F& task) {
  const int64_t threads = at::get_num_threads(), together = B / threads * threads;
  if (B == 0) return;
  std::vector<Worker> workers;
  for (int64_t i = 0; i < threads; ++i) workers.emplace_back(pyramid, book, isa);
  std::vector<at::Tensor> maps;
  for (int64_t i = 0; i < 2 * std::min(threads, B); ++i) maps.push_back(floats(pyramid.map_floats()));
  at::parallel_for(0, together, 1, [&](int64_t begin, int64_t end) {
    const int64_t thread = at::get_thread_num();
    for (int64_t b = begin; b < end; ++b) {
      task(b, Alone{workers.at(thread)}, aligned(maps[2 * thread]), aligned(maps[2 * thread + 1]));
    }
  });
  for (int64_t b = together; b < B; ++b) task(b, Shared{workers}, aligned(maps[0]), aligned(maps[1]));
}

void walk_all(const Pyramid& pyramid, const Batch& batch, const nearest::Codebook* book, const std::string& isa) {
  const auto task = [&](int64_t image, const auto& run, float* reconstruction, float* residual) {
    walk(pyramid, batch, image, run, reconstruction, batch.latents.defined() ? residual : nullptr);
  };
  for_each_image(pyramid, batch.indices.size(0), book, isa, task);
}

at::Tensor as_float(const at::Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }

void check_indices(const at::Tensor& indices, int64_t codes, const char* name) {
  const int64_t* first = indices.const_data_ptr<int64_t>();
  const auto found = std::find_if(first, first + indices.numel(), [&](int64_t k) { return k < 0 || k >= codes; });
  TORCH_CHECK_VALUE(
      found == first + indices.numel(), name, ": expected indices from 0 to ", codes - 1, ", found ", *found);
}

void make_outputs(Batch& batch, const Pyramid& pyramid, int64_t B, bool inputs, bool per_scale) {
  const Geometry& map = pyramid.map;
  const auto options = batch.codebook.options();
  const int64_t rows = inputs ? pyramid.tokens - pyramid.scales[0].height * pyramid.scales[0].width : 0;
  const auto S = static_cast<int64_t>(per_scale ? pyramid.scales.size() : 0);
  batch.reconstruction = at::empty({B, map.channels, map.height, map.width}, options);
  batch.inputs = at::empty({B, rows, map.channels}, options);
  batch.reconstructions = at::empty({S, B, map.channels, map.height, map.width}, options);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> residual_quantize(
    const at::Tensor& z, const at::Tensor& codebook, const at::Tensor& phi_weight, const at::Tensor& phi_bias,
    const std::vector<at::Tensor>& parts, at::IntArrayRef scales, at::IntArrayRef phi_index, double phi_ratio,
    const std::optional<at::Tensor>& replay, bool cosine, bool inputs, bool per_scale, const std::string& isa) {
  check_cpu(z, "z");
  const int64_t B = z.size(0), C = z.size(1);
  const auto books = nearest::codebooks(parts, 1, codebook.size(0), C, cosine, isa);
  const Pyramid pyramid(C, z.size(2), z.size(3), isa, scales, phi_weight, phi_bias, phi_index, phi_ratio);
  const at::Tensor codes = as_float(codebook);
  Batch batch{codes, z, at::empty({B, pyramid.tokens}, codes.options().dtype(at::kLong)), 0, {}, {}, {}};
  if (replay) {
    const at::Tensor given = replay->contiguous();
    check_indices(given, codes.size(0), "replay");
    batch.replayed = given.size(1);
    batch.indices.slice(1, 0, batch.replayed).copy_(given);
  }
  make_outputs(batch, pyramid, B, inputs, per_scale);
  walk_all(pyramid, batch, &books[0], isa);
  return {batch.reconstruction, batch.indices, batch.inputs, batch.reconstructions};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> residual_decode(
    const at::Tensor& indices, const at::Tensor& codebook, const at::Tensor& phi_weight, const at::Tensor& phi_bias,
    at::IntArrayRef scales, at::IntArrayRef phi_index, at::IntArrayRef size, double phi_ratio, bool inputs,
    bool per_scale, const std::string& isa) {
  check_cpu(indices, "indices");
  const Pyramid pyramid(codebook.size(1), size[0], size[1], isa, scales, phi_weight, phi_bias, phi_index, phi_ratio);
  const at::Tensor codes = as_float(codebook);
  Batch batch{codes, {}, indices.contiguous(), pyramid.tokens, {}, {}, {}};
  check_indices(batch.indices, codes.size(0), "indices");
  TORCH_CHECK_VALUE(indices.size(1) == pyramid.tokens, "indices: expected ", pyramid.tokens, " of each image");
  make_outputs(batch, pyramid, indices.size(0), inputs, per_scale);
  walk_all(pyramid, batch, nullptr, isa);
  return {batch.reconstruction, batch.inputs, batch.reconstructions};
}

// Adds the codes of one scale to `reconstruction`, in place; returns it pooled, (B, C, h2, w2), or (B, C, 0, 0).
at::Tensor residual_step(
    const at::Tensor& reconstruction, const at::Tensor& indices, const at::Tensor& codebook,
    const at::Tensor& phi_weight, const at::Tensor& phi_bias, at::IntArrayRef scale, at::IntArrayRef next_scale,
    double phi_ratio, const std::string& isa) {
  check_cpu(reconstruction, "reconstruction");
  check_dtype(reconstruction, at::kFloat, "reconstruction");
  const int64_t B = reconstruction.size(0), C = reconstruction.size(1), pooled = next_scale[0] * next_scale[1];
  const Pyramid pyramid(
      C, reconstruction.size(2), reconstruction.size(3), isa, scale, phi_weight.unsqueeze(0), phi_bias.unsqueeze(0), {0},
      phi_ratio, pooled);
  const at::Tensor codes = as_float(codebook), tokens = indices.contiguous();
  check_indices(tokens, codes.size(0), "indices");
  const at::Tensor out = at::empty({B, C, next_scale[0], next_scale[1]}, reconstruction.options());
  const Geometry& map = pyramid.map;
  for_each_image(pyramid, B, nullptr, isa, [&](int64_t image, const auto& run, float* work, float*) {
    run(map.height, kRowShare, [&](Worker& worker, int64_t begin, int64_t end) {
      const at::Tensor target = reconstruction[image];
      read_map<float>(map, target, begin, end, work);
      pyramid.kernels.spread(
          map, pyramid.scales[0], codes.const_data_ptr<float>(),
          tokens.const_data_ptr<int64_t>() + image * pyramid.tokens, begin, end, worker.band, work, nullptr);
      write_map(map, work, begin, end, target);
    });
    if (pooled == 0) return;
    run(pooled, kTokenShare, [&](Worker& worker, int64_t begin, int64_t end) {
      pyramid.kernels.pool(map, work, next_scale[0], next_scale[1], begin, end, worker.rows);
      float* to = out.data_ptr<float>() + image * C * pooled;
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t c = 0; c < C; ++c) to[c * pooled + n] = worker.rows[(n - begin) * map.channels_stride + c];
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  library.def(
      "_residual_quantize(Tensor z, Tensor codebook, Tensor phi_weight, Tensor phi_bias, Tensor[] parts, int[] scales, "
      "int[] phi_index, float phi_ratio, Tensor? replay, bool cosine, bool inputs, bool per_scale, str isa) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      &residual_quantize);
  library.def(
      "_residual_decode(Tensor indices, Tensor codebook, Tensor phi_weight, Tensor phi_bias, int[] scales, "
      "int[] phi_index, int[] size, float phi_ratio, bool inputs, bool per_scale, str isa) -> (Tensor, Tensor, Tensor)",
      &residual_decode);
  library.def(
      "_residual_step(Tensor(a!) reconstruction, Tensor indices, Tensor codebook, Tensor phi_weight, Tensor phi_bias, "
      "int[] scale, int[] next_scale, float phi_ratio, str isa) -> Tensor",
      &residual_step);
}

}  // namespace hitsr_fast
