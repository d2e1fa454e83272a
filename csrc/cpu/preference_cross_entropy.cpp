// CPU backend of preference_cross_entropy: the products of a block of rows are shared out to threads by codes or channels,
// one product after the other. Each sum has one thread and a fixed order, so that no bit depends on their number.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/buffer.h"
#include "cpu/instruction_sets.h"
#include "cpu/share_out.h"
#include "tensor.h"

namespace hitsr_fast {
namespace {

constexpr int64_t kChunk = 128;           // steps of a product whose vectors stay in the first-level cache
constexpr int64_t kCodes = 128;           // of one task: packed, they stay in the second-level cache
constexpr int64_t kChannels = 256;        // of one task
constexpr int64_t kPad = 16;              // floats between packed rows: else they would all begin at the same cache line
constexpr int64_t kBlockRows = 576;       // at most; whole panels on each instruction set
constexpr int64_t kMostLogits = 5 << 19;  // of a block, but for one of a single panel

// The parts that read what is given. See the kernels for their arguments.
template <typename T>
struct Kernels {
  void (*pack_hidden)(const T* hidden, int64_t count, int64_t rows, int64_t C, float* of_rows, float* of_channels);
  void (*pack_codes)(const T* weight, int64_t count, int64_t C, float* to);
  void (*pack_channels)(const T* weight, int64_t codes, int64_t count, int64_t C, float* to, int64_t stride);
  void (*add)(const T* from, float factor, int64_t count, float* to);
};

struct Products {
  int64_t rows, wide;  // of a tile: codes or channels that are packed together, and rows of hidden of a panel
  void (*multiply_codes)(
      const float* codes, const float* bias, int64_t count, const float* hidden, int64_t panels, int64_t C, float* to,
      int64_t stride);
  void (*entropy)(
      float* logits, int64_t K, int64_t count, const int64_t* target, const int64_t* rejected, float smoothing,
      bool differentiate, const float* grad_loss, const float* grad_gap, float* loss, float* gap, float* lse);
  void (*multiply_channels)(
      const float* channels, int64_t packed_stride, int64_t codes, int64_t count, const float* logits, int64_t stride,
      int64_t panels, float* to);
  void (*multiply_rows)(
      const float* logits, int64_t stride, int64_t count, const float* hidden, int64_t panels, int64_t C, bool more,
      float* sums, float* grad_weight, float* grad_bias);
};

#define HITSR_OP preference_cross_entropy
#include "cpu/foreach_isa.h"

int64_t cdiv(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t round_up(int64_t count, int64_t size) { return cdiv(count, size) * size; }

// Gradients to be written, and those of the results: null for ones and zeros.
struct Gradients {
  float *hidden, *weight, *bias;
  const float *loss, *gap;
};

// H of hidden, W of the weight.
template <typename H, typename W>
class Head {
 public:
  Head(
      const std::string& isa, const Tensor& hidden, const Tensor& weight, const float* bias, const Tensor& target,
      const Tensor& rejected, float smoothing)
      : products_(HITSR_SELECT(isa, kProducts)),
        rows_(HITSR_SELECT(isa, kKernels<H>)),
        codes_(HITSR_SELECT(isa, kKernels<W>)),
        hidden_(data<const H>(hidden)),
        weight_(data<const W>(weight)),
        bias_(bias),
        target_(data<const int64_t>(target)),
        rejected_(data<const int64_t>(rejected)),
        smoothing_(smoothing),
        N_(hidden.size(0)),
        C_(hidden.size(1)),
        K_(weight.size(0)),
        wide_(products_.wide),
        stride_(round_up(K_, products_.rows) * wide_),
        panels_(panels_of_a_block(cdiv(N_, wide_), stride_, wide_)) {}

  void run(float* loss, float* gap, float* lse, const Gradients* gradients) const {
    const Buffer<float> logits(panels_ * stride_), of_rows(panels_ * wide_ * C_);
    const Buffer<float> of_channels(gradients == nullptr ? 0 : panels_ * wide_ * round_up(C_, wide_));
    for (int64_t first = 0; first < N_; first += panels_ * wide_) {
      const int64_t count = std::min(panels_ * wide_, N_ - first), panels = cdiv(count, wide_);
      const Block block{first, count, panels, logits.at(0), of_rows.at(0), of_channels.at(0)};
      pack(block, gradients != nullptr);
      multiply_codes(block);
      torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t row = first + panel * wide_;
          const auto of = [&](const float* values) { return values == nullptr ? nullptr : values + row; };
          products_.entropy(
              block.logits + panel * stride_, K_, std::min(wide_, N_ - row), target_ + row, rejected_ + row, smoothing_,
              gradients != nullptr, gradients == nullptr ? nullptr : of(gradients->loss),
              gradients == nullptr ? nullptr : of(gradients->gap), loss + row, gap + row, lse + row);
        }
      });
      if (gradients != nullptr) differentiate(block, *gradients);
    }
  }

 private:
  // Blocks of much the same size.
  static int64_t panels_of_a_block(int64_t panels, int64_t logits, int64_t wide) {
    const int64_t most = std::clamp<int64_t>(kMostLogits / logits, 1, kBlockRows / wide);
    return cdiv(panels, std::max<int64_t>(cdiv(panels, most), 1));
  }

  struct Block {
    int64_t first, count, panels;
    float *logits, *of_rows, *of_channels;
  };

  void pack(const Block& block, bool differentiate) const {
    rows_.pack_hidden(
        hidden_ + block.first * C_, block.count, block.panels * wide_, C_, block.of_rows,
        differentiate ? block.of_channels : nullptr);
  }

  void multiply_codes(const Block& block) const {
    const int64_t tasks = cdiv(K_, kCodes);
    share_out(tasks, [&](const auto& next) {
      const Buffer<float> packed(kCodes * C_);
      for (int64_t task = next(); task < tasks; task = next()) {
        const int64_t first = task * kCodes, count = std::min(kCodes, K_ - first);
        codes_.pack_codes(weight_ + first * C_, count, C_, packed.at(0));
        products_.multiply_codes(
            packed.at(0), bias_ == nullptr ? nullptr : bias_ + first, count, block.of_rows, block.panels, C_,
            block.logits + first * wide_, stride_);
      }
    });
  }

  void differentiate(const Block& block, const Gradients& gradients) const {
    // The gradient of hidden is shared out by channels and, where there are fewer of these than threads, by panels.
    const int64_t by_channels = cdiv(C_, kChannels), threads = torch::stable::get_num_threads();
    const int64_t together = cdiv(block.panels, cdiv(threads, by_channels)), by_panels = cdiv(block.panels, together);
    const int64_t of_hidden = by_channels * by_panels, tasks = of_hidden + cdiv(K_, kCodes);
    share_out(tasks, [&](const auto& next) {
      const Buffer<float> packed(kChannels / products_.rows * (kCodes * products_.rows + kPad));
      const Buffer<float> sums(std::max(together * kChannels, kCodes) * wide_);
      for (int64_t task = next(); task < tasks; task = next()) {
        if (task < of_hidden) {
          const int64_t panel = task % by_panels * together;
          hidden_gradient(
              block, task / by_panels * kChannels, panel, std::min(together, block.panels - panel), packed.at(0), sums.at(0),
              gradients.hidden);
        } else {
          const int64_t first = (task - of_hidden) * kCodes;
          products_.multiply_rows(
              block.logits + first * wide_, stride_, std::min(kCodes, K_ - first), block.of_channels, block.panels, C_,
              block.first > 0, sums.at(0), gradients.weight + first * C_,
              gradients.bias == nullptr ? nullptr : gradients.bias + first);
        }
      }
    });
  }

  // Channels from `first` on, of some panels.
  void hidden_gradient(
      const Block& block, int64_t first, int64_t panel, int64_t panels, float* packed, float* sums,
      float* grad_hidden) const {
    const int64_t count = std::min(kChannels, C_ - first), whole = round_up(count, products_.rows);
    const int64_t packed_stride = kCodes * products_.rows + kPad;
    std::fill_n(sums, panels * whole * wide_, 0.0f);
    for (int64_t k = 0; k < K_; k += kCodes) {
      const int64_t codes = std::min(kCodes, K_ - k);
      codes_.pack_channels(weight_ + k * C_ + first, codes, count, C_, packed, packed_stride);
      products_.multiply_channels(
          packed, packed_stride, codes, whole, block.logits + panel * stride_ + k * wide_, stride_, panels, sums);
    }
    const int64_t row = panel * wide_;
    for (int64_t n = 0; n < std::min(panels * wide_, block.count - row); ++n) {
      const float* from = sums + n / wide_ * whole * wide_ + n % wide_;
      float* to = grad_hidden + (block.first + row + n) * C_ + first;
      for (int64_t c = 0; c < count; ++c) to[c] = from[c * wide_];
    }
  }

  const Products& products_;
  const Kernels<H>& rows_;
  const Kernels<W>& codes_;
  const H* const hidden_;
  const W* const weight_;
  const float* const bias_;
  const int64_t *const target_, *const rejected_;
  const float smoothing_;
  const int64_t N_, C_, K_, wide_, stride_, panels_;
};

// The checked arguments, each in a row.
struct Arguments {
  Tensor hidden, weight;
  std::optional<Tensor> bias;
  Tensor target, rejected;

  Arguments(
      const Tensor& hidden_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in, const Tensor& target_in,
      const Tensor& rejected_in)
      : hidden(matrix(hidden_in, "hidden")),
        weight(matrix(weight_in, "weight")),
        target(tokens(target_in, "target")),
        rejected(tokens(rejected_in, "rejected")) {
    HITSR_CHECK(
        weight.size(1) == hidden.size(1) && weight.numel() > 0, "weight: expected shape (K, C=", hidden.size(1),
        "), found ", weight.sizes());
    if (!bias_in.has_value()) return;
    check_cpu(*bias_in, "bias");
    check_shape(*bias_in, {weight.size(0)}, "bias");
    bias = in_a_row(*bias_in, ScalarType::Float);
  }

  static Tensor matrix(const Tensor& values, const char* name) {
    check_cpu(values, name);
    HITSR_CHECK(values.dim() == 2, name, ": expected two axes, found shape ", values.sizes());
    return in_a_row(values, values.scalar_type());
  }

  Tensor tokens(const Tensor& values, const char* name) const {
    check_cpu(values, name);
    check_dtype(values, ScalarType::Long, name);
    check_shape(values, {hidden.size(0)}, name);
    const Tensor found = in_a_row(values, ScalarType::Long);
    for (int64_t n = 0; n < found.numel(); ++n) {
      const int64_t token = data<const int64_t>(found)[n];
      HITSR_CHECK(0 <= token && token < weight.size(0), name, ": expected 0 to ", weight.size(0) - 1, ", found ", token);
    }
    return found;
  }

  template <typename F>
  void visit(const F& run) const {
    visit_dtype(hidden, "hidden", [&](auto of_rows) {
      visit_dtype(weight, "weight", [&](auto of_codes) { run(of_rows, of_codes); });
    });
  }

  Shape bias_shape() const { return bias.has_value() ? bias->sizes() : Shape(kNone, 1); }
  static constexpr int64_t kNone[1] = {0};
};

void compute(
    const Arguments& given, double smoothing, const std::string& isa, float* loss, float* gap, float* lse,
    const Gradients* gradients) {
  given.visit([&](auto of_rows, auto of_codes) {
    const float* bias = given.bias.has_value() ? data<const float>(*given.bias) : nullptr;
    const Head<decltype(of_rows), decltype(of_codes)> head(
        isa, given.hidden, given.weight, bias, given.target, given.rejected, static_cast<float>(smoothing));
    head.run(loss, gap, lse, gradients);
  });
}

// Without rows there is nothing to add up.
void clear_without_rows(const Arguments& given, const Gradients& to) {
  if (given.hidden.size(0) > 0) return;
  std::fill_n(to.weight, given.weight.numel(), 0.0f);
  if (to.bias != nullptr) std::fill_n(to.bias, given.weight.size(0), 0.0f);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss(
    const Tensor& hidden_in, const Tensor& weight_in, std::optional<Tensor> bias_in, const Tensor& target_in,
    const Tensor& rejected_in, double smoothing, bool units, const std::string& isa) {
  const Arguments given(hidden_in, weight_in, bias_in, target_in, rejected_in);
  const auto floats = [](Shape shape) { return empty(shape, ScalarType::Float); };
  const Shape none(Arguments::kNone, 1), rows(given.hidden.sizes().data(), 1);
  const Tensor loss = floats(rows), gap = floats(rows), lse = floats(rows);
  const Tensor of_hidden = floats(units ? given.hidden.sizes() : none);
  const Tensor of_weight = floats(units ? given.weight.sizes() : none);
  const Tensor of_bias = floats(units ? given.bias_shape() : none);
  const Gradients to{
      data<float>(of_hidden), data<float>(of_weight), given.bias.has_value() ? data<float>(of_bias) : nullptr, nullptr,
      nullptr};
  if (units) clear_without_rows(given, to);
  compute(given, smoothing, isa, data<float>(loss), data<float>(gap), data<float>(lse), units ? &to : nullptr);
  return {loss, gap, lse, of_hidden, of_weight, of_bias};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_loss_in, const Tensor& grad_gap_in, const Tensor& hidden_in, const Tensor& weight_in,
    std::optional<Tensor> bias_in, const Tensor& target_in, const Tensor& rejected_in, const Tensor&,
    double smoothing, const std::string& isa) {
  const Arguments given(hidden_in, weight_in, bias_in, target_in, rejected_in);
  const int64_t N = given.hidden.size(0);
  for (const Tensor* grad : {&grad_loss_in, &grad_gap_in}) {
    check_cpu(*grad, "grad");
    check_shape(*grad, {N}, "grad");
  }
  const Tensor grad_loss = in_a_row(grad_loss_in, ScalarType::Float), grad_gap = in_a_row(grad_gap_in, ScalarType::Float);
  const auto floats = [](Shape shape) { return empty(shape, ScalarType::Float); };
  const Tensor of_hidden = floats(given.hidden.sizes()), of_weight = floats(given.weight.sizes());
  const Tensor of_bias = floats(given.bias_shape());
  const Gradients to{
      data<float>(of_hidden), data<float>(of_weight), given.bias.has_value() ? data<float>(of_bias) : nullptr,
      data<const float>(grad_loss), data<const float>(grad_gap)};
  clear_without_rows(given, to);
  const Buffer<float> unused(3 * N);
  compute(given, smoothing, isa, unused.at(0), unused.at(N), unused.at(2 * N), &to);
  return {
      in_a_row(of_hidden, hidden_in.scalar_type()), in_a_row(of_weight, weight_in.scalar_type()),
      in_a_row(of_bias, bias_in.has_value() ? bias_in->scalar_type() : hidden_in.scalar_type())};
}

// Turns the gradients of the losses' sum, in place, into those of losses that have all the same factor and of the gaps,
// which concern two codes a row.
void rescale(
    const Tensor& unit_hidden, const Tensor& unit_weight, const Tensor& unit_bias, double factor, const Tensor& grad_gap_in,
    const Tensor& hidden_in, const Tensor& weight_in, const Tensor& target_in, const Tensor& rejected_in,
    const std::string& isa) {
  const Arguments given(hidden_in, weight_in, std::nullopt, target_in, rejected_in);
  const int64_t N = given.hidden.size(0), C = given.hidden.size(1), K = given.weight.size(0);
  check_shape(unit_hidden, {N, C}, "unit_hidden");
  check_shape(unit_weight, {K, C}, "unit_weight");
  check_shape(grad_gap_in, {N}, "grad_gap");
  HITSR_CHECK(unit_bias.numel() == 0 || unit_bias.numel() == K, "unit_bias: expected 0 or ", K, " values");
  for (const Tensor* unit : {&unit_hidden, &unit_weight, &unit_bias}) {
    check_dtype(*unit, ScalarType::Float, "units");
    check_contiguous(*unit, "units");
  }
  check_cpu(grad_gap_in, "grad_gap");
  const Tensor grad_gap = in_a_row(grad_gap_in, ScalarType::Float);
  const auto times = static_cast<float>(factor);
  const float* const gaps = data<const float>(grad_gap);
  const int64_t *const target = data<const int64_t>(given.target), *const rejected = data<const int64_t>(given.rejected);
  float *const to_hidden = data<float>(unit_hidden), *const to_weight = data<float>(unit_weight);
  float* const to_bias = data<float>(unit_bias);
  const auto apart = [&](int64_t n) { return target[n] != rejected[n] && gaps[n] != 0; };
  const auto scale = [&](float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] *= times;
  };
  given.visit([&](auto of_rows, auto of_codes) {
    using H = decltype(of_rows);
    using W = decltype(of_codes);
    const H* const rows = data<const H>(given.hidden);
    const W* const codes = data<const W>(given.weight);
    const auto add_row = HITSR_SELECT(isa, kKernels<H>).add;
    const auto add_code = HITSR_SELECT(isa, kKernels<W>).add;
    torch::stable::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        scale(to_hidden + n * C, C);
        if (!apart(n)) continue;
        add_code(codes + target[n] * C, gaps[n], C, to_hidden + n * C);
        add_code(codes + rejected[n] * C, -gaps[n], C, to_hidden + n * C);
      }
    });
    // A thread has some channels of all codes: a code's rows come in their order.
    torch::stable::parallel_for(0, cdiv(C, kChannels), 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kChannels, count = std::min(end * kChannels, C) - first;
      for (int64_t k = 0; k < K; ++k) scale(to_weight + k * C + first, count);
      for (int64_t n = 0; n < N; ++n) {
        if (!apart(n)) continue;
        add_row(rows + n * C + first, gaps[n], count, to_weight + target[n] * C + first);
        add_row(rows + n * C + first, -gaps[n], count, to_weight + rejected[n] * C + first);
      }
    });
  });
  scale(to_bias, unit_bias.numel());
  for (int64_t n = 0; unit_bias.numel() > 0 && n < N; ++n) {
    if (!apart(n)) continue;
    to_bias[target[n]] += gaps[n];
    to_bias[rejected[n]] -= gaps[n];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library,
      "_preference_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor rejected, "
      "float label_smoothing, bool units, str isa) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      TORCH_BOX(&loss));
  define(
      library,
      "_preference_cross_entropy_backward(Tensor grad_loss, Tensor grad_gap, Tensor hidden, Tensor weight, Tensor? bias, "
      "Tensor target, Tensor rejected, Tensor lse, float label_smoothing, str isa) -> (Tensor, Tensor, Tensor)",
      TORCH_BOX(&backward));
  define(
      library,
      "_preference_cross_entropy_rescale(Tensor(a!) unit_hidden, Tensor(b!) unit_weight, Tensor(c!) unit_bias, "
      "float factor, Tensor grad_gap, Tensor hidden, Tensor weight, Tensor target, Tensor rejected, str isa) -> ()",
      TORCH_BOX(&rescale));
}

}  // namespace hitsr_fast
