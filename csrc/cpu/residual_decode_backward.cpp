// CPU backend of residual_decode_backward.
//
// A scale adds phi(U codes) to the map, where U is the bicubic spread and phi a convolution with 3 x 3 taps W_t. With G the
// gradient that reaches the map, and S_t the shift of a map by a tap, its gradients are
//   of the codes  U' (sum of W_t' S_t G) = sum of W_t' D_t   and   of W_t  (S_t G) (U codes)' = D_t codes',
// where D_t = U' S_t G. U works along the sides and the taps across channels, so that D_t is cheap: both products run at
// the size of the scale, a third of the work of convolutions at the size of the map for HIT's scales.
#include <algorithm>
#include <atomic>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/instruction_sets.h"
#include "cpu/residual_quantize.h"

namespace hitsr_fast {
namespace {

constexpr int64_t kBandRows = 4;     // of a map, that are read together
constexpr int64_t kCodeShare = 256;  // codes that are worth a thread

// What is summed in parts is cut by these alone, and so the same on any number of threads.
constexpr int64_t kPieceTokens = 256;                // of a scale, that have sums of their own,
constexpr int64_t kMostLanes = 4;                    // and every so many images,
constexpr int64_t kMostSums = int64_t{32} << 20;     // as long as all sums have no more bytes
constexpr int64_t kBlockTokens = 64, kTokenTile = 8;  // that lie in the cache together; and are padded to

// Maps lie with channels last, [height][width][stride]; what pads the channels to whole vectors is zero.
struct Geometry {
  int64_t height, width, channels, stride;
};

// U' along one side: token n draws on the places [begin[n], end[n]) of the map. Of place begin[n] + i, the weights for a
// map that is shifted by -1, 0, 1 are weight[n * stride + i + (0, 1, 2)].
struct Pull {
  const int *begin, *end;
  const float* weight;
  int64_t stride;
};

struct Kernels {
  int64_t lanes;  // floats in a vector
  // Adds `count` places of a map that lies channels first, from `from` on, to [channels][count].
  void (*add_band)(const Geometry&, const float* from, int64_t count, float* band);
  // A row of those with channels last; adds its places up.
  void (*turn_row)(const Geometry&, const float* band, int64_t count, float* to, float* sum);
  // U' along x: a row of the map becomes [3][width of the scale][stride], one for each shift.
  void (*across)(const Geometry&, const Pull&, int64_t width, const float* row, float* to);
  // U' along y: D of row i of the scale, [width of the scale][9][stride], from `across`, [rows][3][width][stride].
  void (*down)(const Geometry&, const Pull&, int64_t i, int64_t width, const float* across, float* to);
  // Gradients of the codes, [count][stride], from D and the weights, [9][channels out][stride].
  void (*codes_gradient)(const Geometry&, const float* shifted, const float* weights, int64_t count, float* to);
  // Adds those of the weights to [9][stride in][stride out].
  void (*weight_gradient)(const Geometry&, const float* shifted, const float* codes, int64_t count, float* sums);
  // Adds rows [count][stride] to the codes [begin, end) that they belong to, [K][channels].
  void (*scatter)(
      const Geometry&, const float* rows, const int64_t* indices, int64_t count, int64_t begin, int64_t end,
      float* codebook);
};

#define HITSR_OP residual_decode_backward
#include "cpu/foreach_isa.h"

// See Pull.
class PullTable {
 public:
  PullTable(int64_t tokens, int64_t places) : begin_(tokens), end_(tokens) {
    const BicubicTaps taps(tokens, places);
    std::vector<double> spread(tokens * (places + 4));  // of each token, with two zeros on either side
    for (int64_t x = 0; x < places; ++x) {
      for (int64_t t = 4 * x; t < 4 * x + 4; ++t) spread[taps.place[t] * (places + 4) + x + 2] += taps.weight[t];
    }
    for (int64_t n = 0; n < tokens; ++n) {
      const double* row = spread.data() + n * (places + 4) + 2;
      int64_t first = 0, last = places;
      while (first < last && row[first] == 0) ++first;
      while (first < last && row[last - 1] == 0) --last;
      begin_[n] = static_cast<int>(std::max<int64_t>(first - 1, 0));
      end_[n] = static_cast<int>(std::min(last + 1, places));
      stride_ = std::max<int64_t>(stride_, end_[n] - begin_[n] + 2);
    }
    weight_.resize(tokens * stride_);
    for (int64_t n = 0; n < tokens; ++n) {
      const double* row = spread.data() + n * (places + 4) + 2;
      for (int64_t i = 0; i < end_[n] - begin_[n] + 2; ++i) {
        weight_[n * stride_ + i] = static_cast<float>(row[begin_[n] + i - 1]);
      }
    }
  }

  Pull get() const { return {begin_.data(), end_.data(), weight_.data(), stride_}; }

 private:
  std::vector<int> begin_, end_;
  std::vector<float> weight_;
  int64_t stride_ = 0;
};

struct Scale {
  int64_t height, width, start, phi;  // its tokens are [start, start + height * width) of an image's
  PullTable y, x;
};

// Rows [begin, end) of a scale.
struct Piece {
  const Scale* scale;
  int64_t map, begin, end;  // the number of the gradient that reaches the scale
};

// Memory of one thread.
struct Worker {
  Buffer<float> across, shifted, codes;

  Worker(const Geometry& map, int64_t block)
      : across(map.height * 3 * map.width * map.stride),
        shifted(Buffer<float>::zeros(block * 9 * map.stride)),
        codes(Buffer<float>::zeros(block * map.stride)) {}
};

// Runs task(worker, unit) for all units, whichever thread is free taking the next.
template <typename F>
void for_each_unit(std::vector<Worker>& workers, int64_t count, const F& task) {
  std::atomic<int64_t> next{0};
  const int64_t most = std::min<int64_t>(count, static_cast<int64_t>(workers.size()));
  torch::stable::parallel_for(0, most, 1, [&](int64_t begin, int64_t) {
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      task(workers.at(static_cast<size_t>(begin)), unit);
    }
  });
}

// phi, the identity folded in, by taps: [P][9][channels out][stride].
Buffer<float> by_taps(const Geometry& map, const Tensor& phi_weight, float ratio) {
  const int64_t C = map.channels, phis = phi_weight.size(0);
  auto found = Buffer<float>::zeros(phis * 9 * C * map.stride);
  const float* from = data<const float>(phi_weight);
  for (int64_t p = 0; p < phis; ++p) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      for (int64_t out = 0; out < C; ++out) {
        float* row = found.at(((p * 9 + tap) * C + out) * map.stride);
        for (int64_t in = 0; in < C; ++in) row[in] = ratio * from[((p * C + out) * C + in) * 9 + tap];
        if (tap == 4) row[out] += 1 - ratio;
      }
    }
  }
  return found;
}

class Backward {
 public:
  Backward(
      const Tensor& grad, const Tensor& each, const Tensor& indices, const Tensor& codebook, const Tensor& phi_weight,
      Shape scales, Shape phi_index, double ratio, const std::string& isa)
      : grad_(in_a_row(grad, ScalarType::Float)),
        each_(in_a_row(each, ScalarType::Float)),
        indices_(in_a_row(indices, ScalarType::Long)),
        codebook_(in_a_row(codebook, ScalarType::Float)),
        kernels_(HITSR_SELECT(isa, kKernels)),
        map_{grad.size(2), grad.size(3), grad.size(1), round_up(grad.size(1), kernels_.lanes)},
        ratio_(static_cast<float>(ratio)),
        maps_(std::max<int64_t>(each.size(0), 1)),
        phis_(phi_weight.size(0)),
        weights_(by_taps(map_, in_a_row(phi_weight, ScalarType::Float), ratio_)),
        grad_codebook_(zeros({codebook.size(0), map_.channels})),
        grad_weight_(zeros(phi_weight.sizes())),
        grad_bias_(zeros({phis_, map_.channels})) {
    scales_.reserve(phi_index.size());
    for (size_t s = 0; s < phi_index.size(); ++s) {
      const int64_t h = scales[2 * s], w = scales[2 * s + 1];
      check_scale(h, w, map_.height, map_.width);
      HITSR_CHECK(0 <= phi_index[s] && phi_index[s] < phis_, "phi_index: found ", phi_index[s]);
      scales_.push_back({h, w, tokens_, phi_index[s], {h, map_.height}, {w, map_.width}});
      tokens_ += h * w;
      const int64_t rows = std::max<int64_t>(kPieceTokens / w, 1), map = maps_ == 1 ? 0 : static_cast<int64_t>(s);
      for (int64_t i = 0; i < h; i += rows) pieces_.push_back({&scales_.back(), map, i, std::min(i + rows, h)});
      block_ = std::max(block_, round_up(std::max(w, kBlockTokens), kTokenTile));
    }
    HITSR_CHECK(indices.size(1) == tokens_, "indices: expected ", tokens_, " of each image");
    check_indices(indices_, codebook.size(0), "indices");
    const int64_t bytes = static_cast<int64_t>(pieces_.size()) * sums() * 4;
    lanes_ = std::clamp<int64_t>(kMostSums / bytes, 1, kMostLanes);
  }

  std::tuple<Tensor, Tensor, Tensor> run() {
    const int64_t B = grad_.size(0), threads = torch::stable::get_num_threads(), count = std::min({threads, lanes_, B});
    if (B == 0) return {grad_codebook_, grad_weight_, grad_bias_};
    std::vector<Worker> workers;
    for (int64_t i = 0; i < threads; ++i) workers.emplace_back(map_, block_);
    lanes_ = std::min(lanes_, B);
    const auto pieces = static_cast<int64_t>(pieces_.size());
    const auto weight_sums = Buffer<float>::zeros(ratio_ == 0 ? 0 : lanes_ * pieces * sums());
    const auto places = Buffer<float>::zeros(lanes_ * maps_ * map_.height * map_.stride);
    const Buffer<float> maps(count * maps_ * map_.height * map_.width * map_.stride);
    const Buffer<float> rows(count * tokens_ * map_.stride);
    for (int64_t first = 0; first < B; first += count) {  // no two of these images share sums
      const int64_t images = std::min(count, B - first);
      const int64_t bands = (map_.height + kBandRows - 1) / kBandRows;
      torch::stable::parallel_for(0, images * bands, 1, [&](int64_t begin, int64_t end) {
        const Buffer<float> band(map_.channels * kBandRows * map_.width);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t image = i / bands, y = i % bands * kBandRows, lane = (first + image) % lanes_;
          read_band(
              first + image, y, band.at(0), maps.at(image * maps_ * map_floats()),
              places.at(lane * maps_ * row_sums()));
        }
      });
      for_each_unit(workers, images * pieces, [&](Worker& worker, int64_t unit) {
        const int64_t image = unit % images, piece = pieces - 1 - unit / images;  // the large ones first
        const int64_t lane = (first + image) % lanes_;
        run_piece(
            worker, pieces_[piece], maps.at(image * maps_ * map_floats()),
            data<const int64_t>(indices_) + (first + image) * tokens_, rows.at(image * tokens_ * map_.stride),
            ratio_ == 0 ? nullptr : weight_sums.at((lane * pieces + piece) * sums()));
      });
      torch::stable::parallel_for(0, codebook_.size(0), kCodeShare, [&](int64_t begin, int64_t end) {
        kernels_.scatter(
            map_, rows.at(0), data<const int64_t>(indices_) + first * tokens_, images * tokens_, begin, end,
            data<float>(grad_codebook_));
      });
    }
    if (ratio_ != 0) add_up(weight_sums, places);
    return {grad_codebook_, grad_weight_, grad_bias_};
  }

 private:
  static Tensor zeros(Shape shape) {
    const Tensor found = empty(shape, ScalarType::Float);
    std::fill_n(data<float>(found), found.numel(), 0.0f);
    return found;
  }

  int64_t map_floats() const { return map_.height * map_.width * map_.stride; }
  int64_t row_sums() const { return map_.height * map_.stride; }
  int64_t sums() const { return 9 * map_.stride * map_.stride; }  // of a piece

  // Rows from y on of the gradients that reach the scales: that of a scale goes to its own and all earlier steps.
  void read_band(int64_t image, int64_t y, float* band, float* maps, float* places) const {
    const int64_t rows = std::min(kBandRows, map_.height - y), count = rows * map_.width;
    const int64_t offset = image * map_.channels * map_.height * map_.width + y * map_.width;
    std::fill_n(band, map_.channels * count, 0.0f);
    kernels_.add_band(map_, data<const float>(grad_) + offset, count, band);
    for (int64_t map = maps_ - 1; map >= 0; --map) {
      const float* added = each_.size(0) > 0 ? data<const float>(each_) + map * grad_.numel() + offset : nullptr;
      if (added != nullptr) kernels_.add_band(map_, added, count, band);
      for (int64_t i = 0; i < rows; ++i) {
        float* to = maps + map * map_floats() + (y + i) * map_.width * map_.stride;
        kernels_.turn_row(
            map_, band + i * map_.width, count, to, places + map * row_sums() + (y + i) * map_.stride);
      }
    }
  }

  // Gradients of the codes of a piece go to `rows`, those of its phi are added to `sums`.
  void run_piece(
      const Worker& worker, const Piece& piece, const float* maps, const int64_t* indices, float* rows,
      float* sums) const {
    const Scale& scale = *piece.scale;
    const Pull y = scale.y.get(), x = scale.x.get();
    const int64_t first = y.begin[piece.begin], wide_row = 3 * scale.width * map_.stride;
    for (int64_t i = first; i < y.end[piece.end - 1]; ++i) {
      const float* row = maps + piece.map * map_floats() + i * map_.width * map_.stride;
      kernels_.across(map_, x, scale.width, row, worker.across.at((i - first) * wide_row));
    }
    const int64_t step = std::max<int64_t>(kBlockTokens / scale.width, 1);
    for (int64_t begin = piece.begin; begin < piece.end; begin += step) {
      const int64_t end = std::min(begin + step, piece.end), count = (end - begin) * scale.width;
      for (int64_t i = begin; i < end; ++i) {
        const float* from = worker.across.at((y.begin[i] - first) * wide_row);
        kernels_.down(map_, y, i, scale.width, from, worker.shifted.at((i - begin) * scale.width * 9 * map_.stride));
      }
      const int64_t token = scale.start + begin * scale.width;
      float* to = rows + token * map_.stride;
      if (ratio_ == 0) {
        for (int64_t n = 0; n < count; ++n) {
          std::copy_n(worker.shifted.at((n * 9 + 4) * map_.stride), map_.stride, to + n * map_.stride);
        }
        continue;
      }
      for (int64_t n = 0; n < count; ++n) {
        const float* code = data<const float>(codebook_) + indices[token + n] * map_.channels;
        std::copy_n(code, map_.channels, worker.codes.at(n * map_.stride));
      }
      const float* weights = weights_.at(scale.phi * 9 * map_.channels * map_.stride);
      kernels_.codes_gradient(map_, worker.shifted.at(0), weights, count, to);
      kernels_.weight_gradient(map_, worker.shifted.at(0), worker.codes.at(0), count, sums);
    }
  }

  // Of all lanes and pieces, in their order.
  void add_up(const Buffer<float>& weight_sums, const Buffer<float>& places) {
    const int64_t C = map_.channels, stride = map_.stride;
    const auto pieces = static_cast<int64_t>(pieces_.size());
    torch::stable::parallel_for(0, phis_ * 9, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> total(C * stride);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t phi = i / 9, tap = i % 9;
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t lane = 0; lane < lanes_; ++lane) {
          for (int64_t piece = 0; piece < pieces; ++piece) {
            if (pieces_[piece].scale->phi != phi) continue;
            const float* from = weight_sums.at((lane * pieces + piece) * sums() + tap * stride * stride);
            for (int64_t n = 0; n < C * stride; ++n) total[n] += from[n];
          }
        }
        float* to = data<float>(grad_weight_) + phi * C * C * 9 + tap;
        for (int64_t out = 0; out < C; ++out) {
          for (int64_t in = 0; in < C; ++in) to[(out * C + in) * 9] = ratio_ * total[in * stride + out];
        }
      }
    });
    for (size_t s = 0; s < scales_.size(); ++s) {
      const int64_t map = maps_ == 1 ? 0 : static_cast<int64_t>(s);
      float* to = data<float>(grad_bias_) + scales_[s].phi * C;
      for (int64_t lane = 0; lane < lanes_; ++lane) {
        for (int64_t y = 0; y < map_.height; ++y) {
          const float* from = places.at((lane * maps_ + map) * row_sums() + y * stride);
          for (int64_t c = 0; c < C; ++c) to[c] += ratio_ * from[c];
        }
      }
    }
  }

  const Tensor grad_, each_, indices_, codebook_;
  const Kernels& kernels_;
  const Geometry map_;
  const float ratio_;
  const int64_t maps_, phis_;     // maps_: gradients that reach different scales
  const Buffer<float> weights_;
  const Tensor grad_codebook_, grad_weight_, grad_bias_;
  std::vector<Scale> scales_;
  std::vector<Piece> pieces_;
  int64_t tokens_ = 0, block_ = 0, lanes_ = 1;  // sums of image b are in lane b % lanes_
};

std::tuple<Tensor, Tensor, Tensor> residual_decode_backward(
    const Tensor& grad, const Tensor& grad_per_scale, const Tensor& indices, const Tensor& codebook,
    const Tensor& phi_weight, Shape scales, Shape phi_index, double phi_ratio, const std::string& isa) {
  check_cpu(grad, "grad");
  check_cpu(grad_per_scale, "grad_per_scale");
  check_cpu(indices, "indices");
  check_cpu(codebook, "codebook");
  check_cpu(phi_weight, "phi_weight");
  const int64_t S = grad_per_scale.size(0), C = codebook.size(1);
  HITSR_CHECK(grad.dim() == 4 && grad.size(1) == C, "grad: expected shape (B, ", C, ", H, W), found ", grad.sizes());
  check_shape(grad_per_scale, {S, grad.size(0), C, grad.size(2), grad.size(3)}, "grad_per_scale");
  const auto count = static_cast<int64_t>(phi_index.size());
  HITSR_CHECK(S == 0 || S == count, "grad_per_scale: expected 0 or ", count, " maps, found ", S);
  check_shape(phi_weight, {phi_weight.size(0), C, C, 3, 3}, "phi_weight");
  const auto [codes, weight, bias] =
      Backward(grad, grad_per_scale, indices, codebook, phi_weight, scales, phi_index, phi_ratio, isa).run();
  const ScalarType of_phi = phi_weight.scalar_type();
  return {in_a_row(codes, codebook.scalar_type()), in_a_row(weight, of_phi), in_a_row(bias, of_phi)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library,
      "_residual_decode_backward(Tensor grad, Tensor grad_per_scale, Tensor indices, Tensor codebook, Tensor phi_weight, "
      "int[] scales, int[] phi_index, float phi_ratio, str isa) -> (Tensor, Tensor, Tensor)",
      TORCH_BOX(&residual_decode_backward));
}

}  // namespace hitsr_fast
