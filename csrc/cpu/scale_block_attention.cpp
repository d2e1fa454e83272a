// CPU backend of scale_block_attention: packs a few heads at a time, then shares their tiles of queries out to threads.
// Where a head is one task anyway, as while sampling, its task packs the keys as they are needed. The backward, in
// float32, takes one head a thread, whose tiles of queries are walked in order, so that the sums of keys and values are
// the same for any number of threads.
#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/instruction_sets.h"
#include "cpu/scale_block_attention_layouts.h"
#include "cpu/share_out.h"

namespace hitsr_fast {
namespace {

// Heads that are packed together: tokens often lie a page apart, and all heads of one are then read while the processor
// knows the page.
constexpr int64_t kHeadsAtATime = 4;
constexpr int64_t kTasksOfAThread = 4;  // at least, between two times of packing
// Keys that are packed by the task that needs them: they and their values stay in the second-level cache.
constexpr int64_t kKeysAtATime = 8 * kBlockKeys;
constexpr double kLog2E = 1.44269504088896340736;

struct Kernels {
  Format format;
  void (*attend)(const Task&);
  void (*differentiate)(const BackwardTask&);  // null for the layouts of AMX
};

#define HITSR_OP scale_block_attention
#define HITSR_AMX_BF16
#include "cpu/foreach_isa.h"

template <typename T, typename E>
class Attention {
 public:
  Attention(
      const Kernels& kernel, const Tensor& q, const Tensor& k, const Tensor& v, Shape block_lengths,
      float scale, const Tensor& out, const Tensor& lse)
      : kernel_(kernel),
        q_(q),
        k_(k),
        v_(v),
        scale_(scale),
        L_(q.size(1)),
        NH_(q.size(2)),
        D_(q.size(3)),
        heads_(q.size(0) * NH_),
        keys_(k.size(1)),
        most_(kMostTiles * kernel.format.queries),
        padded_(round_up(D_, kernel.format.channels)),
        spans_(spans_of(block_lengths, keys_ - L_, most_)),
        packer_(kernel.format, padded_),
        out_(data<T>(out)),
        lse_(data<float>(lse)) {}

  void run() const {
    if (spans_.size() > 1) {
      pack_first();
    } else {
      pack_on_the_way();
    }
  }

 private:
  // The memory of one thread, and what it does with one span of one head.
  class Worker {
   public:
    explicit Worker(const Attention& attention)
        : a_(attention),
          queries_(a_.most_ * a_.padded_),
          scratch_(scratch_floats(a_.kernel_.format.queries, a_.padded_)),
          out_(a_.most_ * a_.padded_) {}

    void begin(int64_t head, const Span& span) {
      head_ = head;
      span_ = span;
      const int64_t whole = round_up(span.count, a_.kernel_.format.queries);
      a_.packer_.queries(a_.tokens(a_.q_, head).part(span.first, span.count), whole, a_.scale_ < 0, queries_.at(0));
    }

    // Keys [first, last) of those that the span sees.
    void attend(const E* keys, const E* values, int64_t first, int64_t last) const {
      const float scale = std::abs(a_.scale_) * static_cast<float>(kLog2E);
      a_.kernel_.attend(
          {queries_.at(0), keys, values, span_.count, last - first, first == 0, last == span_.visible, a_.padded_, scale,
           scratch_.at(0), out_.at(0), a_.lse_ + head_ * a_.L_ + span_.first});
    }

    void end() const {
      const int64_t b = head_ / a_.NH_, h = head_ % a_.NH_;
      unpack(
          out_.at(0), span_.count, a_.kernel_.format.queries, a_.padded_, a_.D_, a_.NH_ * a_.D_,
          a_.out_ + ((b * a_.L_ + span_.first) * a_.NH_ + h) * a_.D_);
    }

   private:
    const Attention& a_;
    const Buffer<E> queries_;
    const Buffer<float> scratch_, out_;
    int64_t head_ = 0;
    Span span_{};
  };

  Tokens<T> tokens(const Tensor& tensor, int64_t head) const {
    return Tokens<T>(tensor, head / NH_, head % NH_);
  }

  void pack_first() const {
    const int64_t whole = round_up(keys_, kBlockKeys), tasks = static_cast<int64_t>(spans_.size());
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t busy = round_up(kTasksOfAThread * threads, tasks) / tasks;  // heads that keep all threads so
    const int64_t together = std::min(std::max(kHeadsAtATime, busy), heads_);
    const Buffer<E> keys(together * whole * padded_), values(together * whole * padded_);
    for (int64_t head = 0; head < heads_; head += together) {
      const int64_t count = std::min(together, heads_ - head);
      torch::stable::parallel_for(0, whole / kBlockKeys, 1, [&](int64_t first, int64_t last) {
        for (int64_t begin = first * kBlockKeys; begin < last * kBlockKeys; begin += kBlockKeys) {
          const int64_t given = std::min(keys_ - begin, kBlockKeys);
          for (int64_t n = 0; n < count; ++n) {
            const int64_t to = (n * whole + begin) * padded_;
            packer_.keys(tokens(k_, head + n).part(begin, given), kBlockKeys, keys.at(to));
            packer_.values(tokens(v_, head + n).part(begin, given), kBlockKeys, values.at(to));
          }
        }
      });
      share_out(count * tasks, [&](const auto& next) {
        Worker worker(*this);
        for (int64_t i = next(); i < count * tasks; i = next()) {
          // Head by head, whose keys and values a cache then holds; the longest tasks first, so that all threads come
          // to an end together.
          const Span& span = spans_[tasks - 1 - i % tasks];
          const int64_t n = i / tasks, from = n * whole * padded_;
          worker.begin(head + n, span);
          worker.attend(keys.at(from), values.at(from), 0, span.visible);
          worker.end();
        }
      });
    }
  }

  void pack_on_the_way() const {
    share_out(heads_, [&](const auto& next) {
      Worker worker(*this);
      const Buffer<E> keys(kKeysAtATime * padded_), values(kKeysAtATime * padded_);
      for (int64_t head = next(); head < heads_; head = next()) {
        worker.begin(head, spans_[0]);
        for (int64_t first = 0; first < keys_; first += kKeysAtATime) {
          const int64_t count = std::min(kKeysAtATime, keys_ - first), whole = round_up(count, kBlockKeys);
          packer_.keys(tokens(k_, head).part(first, count), whole, keys.at(0));
          packer_.values(tokens(v_, head).part(first, count), whole, values.at(0));
          worker.attend(keys.at(0), values.at(0), first, first + count);
        }
        worker.end();
      }
    });
  }

  const Kernels& kernel_;
  const Tensor &q_, &k_, &v_;
  const float scale_;
  const int64_t L_, NH_, D_, heads_, keys_, most_, padded_;
  const std::vector<Span> spans_;
  const Packer<T, E> packer_;
  T* const out_;
  float* const lse_;
};

// q: (B, L, NH, D) and its blocks, of which the last one sees all of k and v, and each other one what the next one does
// but for a key a token of that. Any strides. -> out, lse (B, NH, L).
std::tuple<Tensor, Tensor> scale_block_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, Shape block_lengths, double softmax_scale,
    const std::string& isa) {
  check_cpu(q, "q");
  const int64_t total = std::accumulate(block_lengths.begin(), block_lengths.end(), int64_t{0});
  HITSR_CHECK(total == q.size(1), "block_lengths: expected ", q.size(1), " tokens, found ", total);
  HITSR_CHECK(
      q.size(1) == 0 || k.size(1) - q.size(1) + block_lengths[0] > 0, "k: expected keys for the first block, found ",
      k.size(1), " tokens");
  HITSR_CHECK(k.sizes() == v.sizes(), "v: expected shape ", k.sizes(), ", found ", v.sizes());
  const Tensor out = empty(q.sizes(), q.scalar_type());
  const Tensor lse = empty({q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  const auto scale = static_cast<float>(softmax_scale);
  const Kernels& bfloat16 = HITSR_SELECT(isa, kBfloat16);
  if (q.scalar_type() == ScalarType::BFloat16 && bfloat16.format.tiles) {
    Attention<Bfloat16, uint16_t>(bfloat16, q, k, v, block_lengths, scale, out, lse).run();
  } else {
    visit_dtype(q, "q", [&](auto value) {
      const Kernels& kernels = HITSR_SELECT(isa, kFloat);
      Attention<decltype(value), float>(kernels, q, k, v, block_lengths, scale, out, lse).run();
    });
  }
  return {out, lse};
}

// What all heads share, and the memory of one thread.
class BackwardWorker {
 public:
  BackwardWorker(const Kernels& kernel, int64_t T, int64_t D, Shape block_lengths, float scale)
      : kernel_(kernel),
        format_(kernel.format),
        D_(D),
        padded_(round_up(D, 32)),
        tokens_(round_up(T, kBlockKeys)),
        most_(kMostTiles * format_.queries),
        scale_(scale),
        spans_(spans_of(block_lengths, 0, most_)),
        keys_(tokens_ * padded_),
        values_(tokens_ * padded_),
        key_rows_(tokens_ * padded_),
        grad_keys_(tokens_ * padded_),
        grad_values_(tokens_ * padded_),
        queries_(most_ * padded_),
        grads_(most_ * padded_),
        query_rows_(most_ * padded_),
        grad_rows_(most_ * padded_),
        grad_queries_(most_ * padded_),
        lse_(most_),
        delta_(most_),
        scratch_(scratch_floats(format_.queries, padded_)) {}

  using Head = Tokens<float>;

  // Outputs are (T, D) with `stride` floats from one token to the next.
  void differentiate(
      const Head& grad, const Head& q, const Head& k, const Head& v, const Head& out, const float* lse, int64_t stride,
      float* grad_q, float* grad_k, float* grad_v) const {
    const Packer<float, float> packer(format_, padded_);
    packer.keys(k, tokens_, keys_.at(0));
    packer.keys(v, tokens_, values_.at(0));
    packer.values(k, tokens_, key_rows_.at(0));
    std::fill_n(grad_keys_.at(0), tokens_ * padded_, 0.0f);
    std::fill_n(grad_values_.at(0), tokens_ * padded_, 0.0f);
    for (const Span& span : spans_) {
      const int64_t whole = round_up(span.count, format_.queries);
      const Head queries = q.part(span.first, span.count), grads = grad.part(span.first, span.count);
      packer.queries(queries, whole, false, queries_.at(0));
      packer.queries(grads, whole, false, grads_.at(0));
      packer.rows(queries, whole, query_rows_.at(0));
      packer.rows(grads, whole, grad_rows_.at(0));
      std::fill_n(grad_queries_.at(0), whole * padded_, 0.0f);
      for (int64_t n = 0; n < whole; ++n) {
        *lse_.at(n) = n < span.count ? lse[span.first + n] * 1.44269504088896341f : 0;
        double sum = 0;
        for (int64_t d = 0; n < span.count && d < D_; ++d) {
          sum += static_cast<double>(grads.row(n)[d * grads.channel_stride]) *
                 out.row(span.first + n)[d * out.channel_stride];
        }
        *delta_.at(n) = static_cast<float>(sum);
      }
      kernel_.differentiate(
          {queries_.at(0), grads_.at(0), query_rows_.at(0), grad_rows_.at(0), keys_.at(0), values_.at(0),
           key_rows_.at(0), lse_.at(0), delta_.at(0), span.count, span.visible, padded_, scale_, scratch_.at(0),
           grad_queries_.at(0), grad_keys_.at(0), grad_values_.at(0)});
      for (int64_t n = 0; n < span.count; ++n) {
        const int64_t tile = n / format_.queries, q_lane = n % format_.queries;
        const float* from = grad_queries_.at(tile * format_.queries * padded_ + q_lane);
        for (int64_t d = 0; d < D_; ++d) grad_q[(span.first + n) * stride + d] = from[d * format_.queries];
      }
    }
    for (int64_t n = 0; n < k.count; ++n) {
      std::copy_n(grad_keys_.at(n * padded_), D_, grad_k + n * stride);
      std::copy_n(grad_values_.at(n * padded_), D_, grad_v + n * stride);
    }
  }

 private:
  const Kernels& kernel_;
  const Format format_;
  const int64_t D_, padded_, tokens_, most_;
  const float scale_;
  const std::vector<Span> spans_;
  const Buffer<float> keys_, values_, key_rows_, grad_keys_, grad_values_;
  const Buffer<float> queries_, grads_, query_rows_, grad_rows_, grad_queries_, lse_, delta_, scratch_;
};

// All (B, T, NH, D) of any strides, lse (B, NH, T) -> gradients in q, k and v.
std::tuple<Tensor, Tensor, Tensor> scale_block_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, Shape block_lengths, double softmax_scale, const std::string& isa) {
  check_cpu(q, "q");
  for (const Tensor* tensor : {&grad, &q, &k, &v, &out, &lse}) {
    check_dtype(*tensor, ScalarType::Float, "grad, q, k, v, out, lse");
  }
  const int64_t B = q.size(0), T = q.size(1), NH = q.size(2), D = q.size(3);
  const Tensor grad_q = empty(q.sizes(), q.scalar_type()), grad_k = empty(q.sizes(), ScalarType::Float);
  const Tensor grad_v = empty(q.sizes(), ScalarType::Float), logs = in_a_row(lse, ScalarType::Float);
  const Kernels& kernel = HITSR_SELECT(isa, kFloat);
  torch::stable::parallel_for(0, B * NH, 1, [&](int64_t first, int64_t last) {
    const BackwardWorker worker(kernel, T, D, block_lengths, static_cast<float>(softmax_scale));
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / NH, h = i % NH, to = (b * T * NH + h) * D;
      const auto head = [&](const Tensor& tensor) { return Tokens<float>(tensor, b, h); };
      worker.differentiate(
          head(grad), head(q), head(k), head(v), head(out), data<const float>(logs) + i * T, NH * D,
          data<float>(grad_q) + to, data<float>(grad_k) + to, data<float>(grad_v) + to);
    }
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library,
      "_scale_block_attention(Tensor q, Tensor k, Tensor v, int[] block_lengths, float softmax_scale, str isa) "
      "-> (Tensor, Tensor)",
      TORCH_BOX(&scale_block_attention));
  define(
      library,
      "_scale_block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "int[] block_lengths, float softmax_scale, str isa) -> (Tensor, Tensor, Tensor)",
      TORCH_BOX(&scale_block_attention_backward));
}

}  // namespace hitsr_fast
