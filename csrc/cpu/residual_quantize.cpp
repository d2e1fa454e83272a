// CPU backend of residual_quantize, residual_decode and residual_step: one walk over the scales of each image.
#include <algorithm>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/instruction_sets.h"
#include "cpu/nearest_code.h"
#include "cpu/residual_quantize.h"

namespace hitsr_fast {
namespace {

// Rows of a map, and tokens, that are worth a thread.
constexpr int64_t kRowShare = 4, kTokenShare = 16;

// Maps lie with channels last: [height][stride][channels_stride]. The strides are padded to whole register tiles and
// vectors; what pads a row of a map is never read as part of it, and what pads channels is zero.
struct Geometry {
  int64_t height, width, channels;
  int64_t stride, channels_stride;
};

struct Taps {  // those of BicubicTaps
  const int* place;
  const float* weight;
};

// One scale of the pyramid.
struct Scale {
  int64_t height, width, start;  // its tokens are [start, start + height * width) of an image's
  Taps y, x;                     // to the size of the map; not used along a side that has that size already
  const float* phi_weight;       // [3 * 3][C][channels_stride], the identity included; null: there is no phi
  const float* phi_bias;         // [channels_stride]
};

// Memory of one thread, for bands of a map.
struct Band {
  float* codes;     // [width of a scale][channels_stride]
  float* across;    // [height of a scale][stride][channels_stride]: codes, spread along x
  float* smoothed;  // [kBandRows + 2][stride + 2][channels_stride]: and along y, with a frame of zeros
};

constexpr int64_t kBandRows = 8;

// Rows of maps that a band is made of are `stride` wide; this many places are worked on at a time.
constexpr int64_t kPlacesAtATime = 8;

struct Kernels {
  int64_t lanes;  // floats in a vector
  // Mean of the places of a map that each token [begin, end) of a grid covers, [end - begin][channels_stride].
  void (*pool)(
      const Geometry&, const float* map, int64_t height, int64_t width, int64_t begin, int64_t end, float* rows);
  // Spread an image's codes over rows [begin, end) of the map: add to `reconstruction`, take from `residual`, if there
  // is one. codes: [K][channels].
  void (*spread)(
      const Geometry&, const Scale&, const float* codebook, const int64_t* indices, int64_t begin, int64_t end,
      const Band&, float* reconstruction, float* residual);
};

#define HITSR_OP residual_quantize
#include "cpu/foreach_isa.h"

// The scales of a pyramid, with the tables that their kernels read.
class Pyramid {
 public:
  Pyramid(
      int64_t channels, int64_t height, int64_t width, const std::string& isa, Shape scales,
      const Tensor& phi_weight, const Tensor& phi_bias, Shape phi_index, double phi_ratio,
      int64_t most_tokens = 0)
      : most_tokens(most_tokens),
        kernels(HITSR_SELECT(isa, kKernels)),
        map{height, width, channels, round_up(width, kPlacesAtATime), round_up(channels, kernels.lanes)} {
    if (phi_ratio != 0) fold(phi_weight, phi_bias, static_cast<float>(phi_ratio));
    for (size_t s = 0; s < phi_index.size(); ++s) {
      Scale scale{scales[2 * s], scales[2 * s + 1], tokens, {}, {}, nullptr, nullptr};
      check_scale(scale.height, scale.width, height, width);
      scale.y = taps(scale.height, height);
      scale.x = taps(scale.width, width);
      if (phi_ratio != 0) {
        HITSR_CHECK(0 <= phi_index[s] && phi_index[s] < phis_, "phi_index: found ", phi_index[s]);
        scale.phi_weight = weight_->at(0) + phi_index[s] * 9 * channels * map.channels_stride;
        scale.phi_bias = bias_->at(0) + phi_index[s] * map.channels_stride;
      }
      tokens += scale.height * scale.width;
      this->most_tokens = std::max(this->most_tokens, scale.height * scale.width);
      this->scales.push_back(scale);
    }
  }

  int64_t map_floats() const { return map.height * map.stride * map.channels_stride; }

  int64_t most_tokens;  // of a scale, or of a grid to be pooled to
  int64_t tokens = 0;   // of all scales
  const Kernels& kernels;
  const Geometry map;
  std::vector<Scale> scales;

 private:
  // phi(h) = (1 - r) h + r (conv(h) + bias) is a convolution itself.
  void fold(const Tensor& phi_weight, const Tensor& phi_bias, float ratio) {
    const int64_t C = map.channels, stride = map.channels_stride;
    const bool as_is = phi_weight.scalar_type() == ScalarType::Float;  // whatever its strides
    const Tensor weight = as_is ? phi_weight : in_a_row(phi_weight, ScalarType::Float);
    const Tensor bias = in_a_row(phi_bias, ScalarType::Float);
    const int64_t last = weight.dim() - 1;  // of (P, C, C, 3, 3), or of one phi
    const int64_t across = weight.stride(last), down = weight.stride(last - 1);
    const int64_t each_in = weight.stride(last - 2), each_out = weight.stride(last - 3);
    const int64_t each_phi = last == 4 ? weight.stride(0) : 0;
    phis_ = bias.numel() / C;
    weight_ = Buffer<float>::zeros(phis_ * 9 * C * stride);
    bias_ = Buffer<float>::zeros(phis_ * stride);
    const float* from = data<const float>(weight);
    float* to = weight_->at(0);
    for (int64_t p = 0; p < phis_; ++p) {
      const float* given = data<const float>(bias) + p * C;
      for (int64_t out = 0; out < C; ++out) bias_->at(0)[p * stride + out] = ratio * given[out];
      for (int64_t tap = 0; tap < 9; ++tap) {
        for (int64_t in = 0; in < C; ++in) {
          float* row = to + ((p * 9 + tap) * C + in) * stride;
          const float* column = from + p * each_phi + in * each_in + tap / 3 * down + tap % 3 * across;
          for (int64_t out = 0; out < C; ++out) row[out] = ratio * column[out * each_out];
          if (tap == 4) row[in] += 1 - ratio;
        }
      }
    }
  }

  Taps taps(int64_t from, int64_t to) {
    const BicubicTaps& found = taps_.emplace_back(from, to);
    return {found.place.data(), found.weight.data()};
  }

  int64_t phis_ = 0;
  std::optional<Buffer<float>> weight_, bias_;
  std::deque<BicubicTaps> taps_;  // whose elements stay where they are
};

// What one thread works with; made before the walk, so that nothing is allocated on the way.
class Worker {
 public:
  Worker(const Pyramid& pyramid, const nearest::Codebook* book, const std::string& isa)
      : codes_(Buffer<float>::zeros(pyramid.map.width * pyramid.map.channels_stride)),
        across_(pyramid.map_floats()),
        smoothed_(Buffer<float>::zeros((kBandRows + 2) * (pyramid.map.stride + 2) * pyramid.map.channels_stride)),
        rows_(pyramid.most_tokens * pyramid.map.channels_stride),
        band{codes_.at(0), across_.at(0), smoothed_.at(0)},
        rows(rows_.at(0)),
        searcher(book == nullptr ? nullptr : nearest::make_searcher<float>(isa, *book, pyramid.most_tokens)) {}

 private:
  Buffer<float> codes_, across_, smoothed_, rows_;

 public:
  Band band;
  float* rows;  // pooled tokens of a scale
  std::unique_ptr<nearest::Searcher<float>> searcher;
};

size_t thread_number() {
  uint32_t number;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&number));
  return number;
}

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
    torch::stable::parallel_for(0, count, share, [&](int64_t begin, int64_t end) {
      task(workers.at(thread_number()), begin, end);
    });
  }
};

// What the walk reads and writes, over all images of a batch; what is not asked for has no elements.
struct Batch {
  const Tensor& codebook;         // (K, C) float
  std::optional<Tensor> latents;  // (B, C, H, W), any strides
  Tensor indices;                 // (B, T)
  int64_t replayed;               // tokens of an image that are given
  Tensor reconstruction, inputs, reconstructions;
};

// One of the images of a tensor (..., C, H, W), of any strides.
template <typename T>
struct Image {
  T* first;
  int64_t c_stride, y_stride, x_stride;

  Image(const Tensor& images, int64_t offset)
      : first(data<T>(images) + offset),
        c_stride(images.stride(-3)),
        y_stride(images.stride(-2)),
        x_stride(images.stride(-1)) {}
};

// Between images and the maps of the walk. Rows [begin, end).
template <typename T>
void read_map(const Geometry& map, const Image<const T>& image, int64_t begin, int64_t end, float* to) {
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t x = 0; x < map.width; ++x) {
        to[(y * map.stride + x) * map.channels_stride + c] =
            wide(image.first[c * image.c_stride + y * image.y_stride + x * image.x_stride]);
      }
    }
  }
}

void write_map(const Geometry& map, const float* from, int64_t begin, int64_t end, const Image<float>& image) {
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t x = 0; x < map.width; ++x) {
        image.first[c * image.c_stride + y * image.y_stride + x * image.x_stride] =
            from[(y * map.stride + x) * map.channels_stride + c];
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
  run(map.height, kRowShare, [&](Worker&, int64_t begin, int64_t end) {
    const int64_t row = map.stride * map.channels_stride;
    std::fill(reconstruction + begin * row, reconstruction + end * row, 0.0f);
    if (!batch.latents) return;
    visit_dtype(*batch.latents, "z", [&](auto value) {
      using T = decltype(value);
      read_map<T>(map, {*batch.latents, image * batch.latents->stride(0)}, begin, end, residual);
    });
  });
  int64_t* indices = data<int64_t>(batch.indices) + image * pyramid.tokens;
  for (size_t s = 0; s < pyramid.scales.size(); ++s) {
    const Scale& scale = pyramid.scales[s];
    const bool search = scale.start >= batch.replayed, inputs = s > 0 && batch.inputs.size(1) > 0;
    if (search || inputs) {
      run(scale.height * scale.width, kTokenShare, [&](Worker& worker, int64_t begin, int64_t end) {
        const int64_t count = end - begin;
        if (inputs) {
          pyramid.kernels.pool(map, reconstruction, scale.height, scale.width, begin, end, worker.rows);
          const int64_t first = scale.start - pyramid.scales[1].start + begin;
          float* to = data<float>(batch.inputs) + (image * batch.inputs.size(1) + first) * map.channels;
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
          map, scale, data<const float>(batch.codebook), indices + scale.start, begin, end, worker.band,
          reconstruction, residual);
      if (batch.reconstructions.size(0) == 0) return;
      const Tensor& all = batch.reconstructions;
      const int64_t offset = static_cast<int64_t>(s) * all.stride(0) + image * all.stride(1);
      write_map(map, reconstruction, begin, end, {all, offset});
    });
  }
  run(map.height, kRowShare, [&](Worker&, int64_t begin, int64_t end) {
    write_map(map, reconstruction, begin, end, {batch.reconstruction, image * batch.reconstruction.stride(0)});
  });
}

// A task for all images: one a thread while there are enough of them, the rest one after the other with all threads. It
// takes the image's number, an executor, and room for two maps.
template <typename F>
void for_each_image(
    const Pyramid& pyramid, int64_t B, const nearest::Codebook* book, const std::string& isa, const F& task) {
  const int64_t threads = torch::stable::get_num_threads(), together = B / threads * threads;
  if (B == 0) return;
  std::vector<Worker> workers;
  for (int64_t i = 0; i < threads; ++i) workers.emplace_back(pyramid, book, isa);
  std::vector<Buffer<float>> maps;
  for (int64_t i = 0; i < 2 * std::min(threads, B); ++i) maps.emplace_back(pyramid.map_floats());
  torch::stable::parallel_for(0, together, 1, [&](int64_t begin, int64_t end) {
    const size_t thread = thread_number();
    for (int64_t b = begin; b < end; ++b) {
      task(b, Alone{workers.at(thread)}, maps[2 * thread].at(0), maps[2 * thread + 1].at(0));
    }
  });
  for (int64_t b = together; b < B; ++b) task(b, Shared{workers}, maps[0].at(0), maps[1].at(0));
}

void walk_all(const Pyramid& pyramid, const Batch& batch, const nearest::Codebook* book, const std::string& isa) {
  const auto task = [&](int64_t image, const auto& run, float* reconstruction, float* residual) {
    walk(pyramid, batch, image, run, reconstruction, batch.latents ? residual : nullptr);
  };
  for_each_image(pyramid, batch.indices.size(0), book, isa, task);
}

void make_outputs(Batch& batch, const Pyramid& pyramid, int64_t B, bool inputs, bool per_scale) {
  const Geometry& map = pyramid.map;
  const int64_t rows = inputs ? pyramid.tokens - pyramid.scales[0].height * pyramid.scales[0].width : 0;
  const auto S = static_cast<int64_t>(per_scale ? pyramid.scales.size() : 0);
  batch.reconstruction = empty({B, map.channels, map.height, map.width}, ScalarType::Float);
  batch.inputs = empty({B, rows, map.channels}, ScalarType::Float);
  batch.reconstructions = empty({S, B, map.channels, map.height, map.width}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_quantize(
    const Tensor& z, const Tensor& codebook, const Tensor& phi_weight, const Tensor& phi_bias,
    const std::vector<Tensor>& parts, Shape scales, Shape phi_index, double phi_ratio,
    const std::optional<Tensor>& replay, bool cosine, bool inputs, bool per_scale, const std::string& isa) {
  check_cpu(z, "z");
  const int64_t B = z.size(0), C = z.size(1);
  const auto books = nearest::codebooks(parts, 1, codebook.size(0), C, cosine, isa);
  const Pyramid pyramid(C, z.size(2), z.size(3), isa, scales, phi_weight, phi_bias, phi_index, phi_ratio);
  const Tensor codes = in_a_row(codebook, ScalarType::Float);
  Batch batch{codes, z, empty({B, pyramid.tokens}, ScalarType::Long), 0, {}, {}, {}};
  if (replay) {
    const Tensor given = in_a_row(*replay, ScalarType::Long);
    check_indices(given, codes.size(0), "replay");
    batch.replayed = given.size(1);
    for (int64_t b = 0; b < B; ++b) {
      const int64_t* from = data<const int64_t>(given) + b * batch.replayed;
      std::copy_n(from, batch.replayed, data<int64_t>(batch.indices) + b * pyramid.tokens);
    }
  }
  make_outputs(batch, pyramid, B, inputs, per_scale);
  walk_all(pyramid, batch, &books[0], isa);
  return {batch.reconstruction, batch.indices, batch.inputs, batch.reconstructions};
}

std::tuple<Tensor, Tensor, Tensor> residual_decode(
    const Tensor& indices, const Tensor& codebook, const Tensor& phi_weight, const Tensor& phi_bias,
    Shape scales, Shape phi_index, Shape size, double phi_ratio, bool inputs,
    bool per_scale, const std::string& isa) {
  check_cpu(indices, "indices");
  const Pyramid pyramid(codebook.size(1), size[0], size[1], isa, scales, phi_weight, phi_bias, phi_index, phi_ratio);
  const Tensor codes = in_a_row(codebook, ScalarType::Float);
  Batch batch{codes, {}, in_a_row(indices, ScalarType::Long), pyramid.tokens, {}, {}, {}};
  check_indices(batch.indices, codes.size(0), "indices");
  HITSR_CHECK(indices.size(1) == pyramid.tokens, "indices: expected ", pyramid.tokens, " of each image");
  make_outputs(batch, pyramid, indices.size(0), inputs, per_scale);
  walk_all(pyramid, batch, nullptr, isa);
  return {batch.reconstruction, batch.inputs, batch.reconstructions};
}

// Adds the codes of one scale to `reconstruction`, in place; returns it pooled, (B, C, h2, w2), or (B, C, 0, 0).
Tensor residual_step(
    const Tensor& reconstruction, const Tensor& indices, const Tensor& codebook,
    const Tensor& phi_weight, const Tensor& phi_bias, Shape scale, Shape next_scale,
    double phi_ratio, const std::string& isa) {
  check_cpu(reconstruction, "reconstruction");
  check_dtype(reconstruction, ScalarType::Float, "reconstruction");
  const int64_t B = reconstruction.size(0), C = reconstruction.size(1), pooled = next_scale[0] * next_scale[1];
  const Pyramid pyramid(
      C, reconstruction.size(2), reconstruction.size(3), isa, scale, phi_weight, phi_bias, {0},
      phi_ratio, pooled);
  const Tensor codes = in_a_row(codebook, ScalarType::Float), tokens = in_a_row(indices, ScalarType::Long);
  check_indices(tokens, codes.size(0), "indices");
  const Tensor out = empty({B, C, next_scale[0], next_scale[1]}, ScalarType::Float);
  const Geometry& map = pyramid.map;
  for_each_image(pyramid, B, nullptr, isa, [&](int64_t image, const auto& run, float* work, float*) {
    run(map.height, kRowShare, [&](Worker& worker, int64_t begin, int64_t end) {
      const int64_t offset = image * reconstruction.stride(0);
      read_map<float>(map, {reconstruction, offset}, begin, end, work);
      pyramid.kernels.spread(
          map, pyramid.scales[0], data<const float>(codes),
          data<const int64_t>(tokens) + image * pyramid.tokens, begin, end, worker.band, work, nullptr);
      write_map(map, work, begin, end, {reconstruction, offset});
    });
    if (pooled == 0) return;
    run(pooled, kTokenShare, [&](Worker& worker, int64_t begin, int64_t end) {
      pyramid.kernels.pool(map, work, next_scale[0], next_scale[1], begin, end, worker.rows);
      float* to = data<float>(out) + image * C * pooled;
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t c = 0; c < C; ++c) to[c * pooled + n] = worker.rows[(n - begin) * map.channels_stride + c];
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library,
      "_residual_quantize(Tensor z, Tensor codebook, Tensor phi_weight, Tensor phi_bias, Tensor[] parts, int[] scales, "
      "int[] phi_index, float phi_ratio, Tensor? replay, bool cosine, bool inputs, bool per_scale, str isa) "
      "-> (Tensor, Tensor, Tensor, Tensor)",
      TORCH_BOX(&residual_quantize));
  define(
      library,
      "_residual_decode(Tensor indices, Tensor codebook, Tensor phi_weight, Tensor phi_bias, int[] scales, "
      "int[] phi_index, int[] size, float phi_ratio, bool inputs, bool per_scale, str isa) -> (Tensor, Tensor, Tensor)",
      TORCH_BOX(&residual_decode));
  define(
      library,
      "_residual_step(Tensor(a!) reconstruction, Tensor indices, Tensor codebook, Tensor phi_weight, Tensor phi_bias, "
      "int[] scale, int[] next_scale, float phi_ratio, str isa) -> Tensor",
      TORCH_BOX(&residual_step));
}

}  // namespace hitsr_fast
