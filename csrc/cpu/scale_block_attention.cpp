// CPU backend of scale_block_attention: packs a few heads at a time, then shares their tiles of queries out to threads.
// Where a head is one task anyway, as while sampling, its task packs the keys as they are needed.
#include "cpu/scale_block_attention.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/instruction_sets.h"
#include "cpu/nearest_code_book.h"
#include "cpu/scale_block_attention_pack.h"

namespace hitsr_fast {
namespace {

using namespace attention;

// Heads that are packed together: tokens often lie a page apart, and all heads of one are then read while the processor
// knows the page.
constexpr int64_t kHeadsAtATime = 4;
constexpr int64_t kTasksOfAThread = 4;  // at least, between two times of packing
// Keys that are packed by the task that needs them: they and their values stay in the second-level cache.
constexpr int64_t kKeysAtATime = 8 * kBlockKeys;
constexpr double kLog2E = 1.44269504088896340736;

struct Kernel {
  Format format;
  void (*attend)(const Task&);
};

Kernel kernel_of(const std::string& name, at::ScalarType dtype) {
  const std::string isa = isa_by_name(name).name;  // which this machine has
#if defined(__x86_64__)
  if (isa == "amx_bf16" && dtype == at::kBFloat16) return {amx_bf16::kFormat, amx_bf16::attend};
  if (isa == "amx_bf16" || isa == "avx512_bf16" || isa == "avx512") {
    return {avx512::kFormat, avx512::attend};
  }
  if (isa == "avx2") return {avx2::kFormat, avx2::attend};
#endif
  return {portable::kFormat, portable::attend};
}

// A task for each of [0, count), taken by whichever thread is free: none of their results depends on which.
template <typename F>
void share_out(int64_t count, const F& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    task([&] { return next.fetch_add(1, std::memory_order_relaxed); });
  });
}

template <typename T, typename E>
class Attention {
 public:
  Attention(
      const Kernel& kernel, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef block_lengths,
      float scale, const at::Tensor& out, const at::Tensor& lse)
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
        out_(out.data_ptr<T>()),
        lse_(lse.data_ptr<float>()) {}

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

  Tokens<T> tokens(const at::Tensor& tensor, int64_t head) const {
    return Tokens<T>(tensor, head / NH_, head % NH_);
  }

  void pack_first() const {
    const int64_t whole = round_up(keys_, kBlockKeys), tasks = static_cast<int64_t>(spans_.size());
    const int64_t busy = round_up(kTasksOfAThread * at::get_num_threads(), tasks) / tasks;  // heads that keep all threads so
    const int64_t together = std::min(std::max(kHeadsAtATime, busy), heads_);
    const Buffer<E> keys(together * whole * padded_), values(together * whole * padded_);
    for (int64_t head = 0; head < heads_; head += together) {
      const int64_t count = std::min(together, heads_ - head);
      at::parallel_for(0, whole / kBlockKeys, 1, [&](int64_t first, int64_t last) {
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

  const Kernel kernel_;
  const at::Tensor q_, k_, v_;
  const float scale_;
  const int64_t L_, NH_, D_, heads_, keys_, most_, padded_;
  const std::vector<Span> spans_;
  const Packer<T, E> packer_;
  T* const out_;
  float* const lse_;
};

// q: (B, L, NH, D) and its blocks, of which the last one sees all of k and v, and each other one what the next one does
// but for a key a token of that. Any strides. -> out, lse (B, NH, L).
std::tuple<at::Tensor, at::Tensor> scale_block_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef block_lengths, double softmax_scale,
    const std::string& isa) {
  check_cpu(q, "q");
  const int64_t total = std::accumulate(block_lengths.begin(), block_lengths.end(), int64_t{0});
  TORCH_CHECK_VALUE(total == q.size(1), "block_lengths: expected ", q.size(1), " tokens, found ", total);
  TORCH_CHECK_VALUE(
      q.size(1) == 0 || k.size(1) - q.size(1) + block_lengths[0] > 0, "k: expected keys for the first block, found ",
      k.size(1), " tokens");
  TORCH_CHECK_VALUE(k.sizes() == v.sizes(), "v: expected shape ", k.sizes(), ", found ", v.sizes());
  const at::Tensor out = at::empty(q.sizes(), q.options());
  const at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};
  const Kernel kernel = kernel_of(isa, q.scalar_type());
  const auto scale = static_cast<float>(softmax_scale);
  if (kernel.format.tiles) {
    Attention<at::BFloat16, uint16_t>(kernel, q, k, v, block_lengths, scale, out, lse).run();
  } else {
    AT_DISPATCH_SWITCH(q.scalar_type(), "scale_block_attention", HITSR_DISPATCH_CASES([&] {
      Attention<scalar_t, float>(kernel, q, k, v, block_lengths, scale, out, lse).run();
    }));
  }
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  library.def(
      "_scale_block_attention(Tensor q, Tensor k, Tensor v, int[] block_lengths, float softmax_scale, str isa) "
      "-> (Tensor, Tensor)",
      &scale_block_attention);
}

}  // namespace hitsr_fast
