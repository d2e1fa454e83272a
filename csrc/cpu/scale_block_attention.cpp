// CPU backend of scale_block_attention: packs a few heads at a time, then shares their tiles of queries out to threads.
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

// Heads and tokens that are packed together: tokens often lie a page apart, and all heads of one are then read while
// the processor knows the page. Whole groups of every format.
constexpr int64_t kHeadsAtATime = 4, kTokensAtATime = 32;
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
void attend(
    const Kernel& kernel, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef block_lengths,
    float scale, const at::Tensor& out, const at::Tensor& lse) {
  const Format& format = kernel.format;
  const int64_t B = q.size(0), L = q.size(1), NH = q.size(2), D = q.size(3), T_all = k.size(1);
  const int64_t padded = round_up(D, format.channels), tokens = round_up(T_all, kBlockKeys);
  const std::vector<Span> spans = spans_of(block_lengths, T_all - L, kMostTiles * format.queries);
  const auto tasks = static_cast<int64_t>(spans.size());
  const int64_t heads = std::min(kHeadsAtATime, B * NH);
  const Packer<T, E> packer(format, padded);
  const Buffer<E> keys(heads * tokens * padded), values(heads * tokens * padded);
  T* to = out.data_ptr<T>();
  for (int64_t head = 0; head < B * NH; head += heads) {
    const int64_t together = std::min(heads, B * NH - head);
    at::parallel_for(0, tokens / kTokensAtATime, 1, [&](int64_t first, int64_t last) {
      for (int64_t begin = first * kTokensAtATime; begin < last * kTokensAtATime; begin += kTokensAtATime) {
        for (int64_t n = 0; n < together; ++n) {
          const int64_t b = (head + n) / NH, h = (head + n) % NH, end = begin + kTokensAtATime;
          packer.keys(Tokens<T>(k, b, h), begin, end, keys.at(n * tokens * padded));
          packer.values(Tokens<T>(v, b, h), begin, end, values.at(n * tokens * padded));
        }
      }
    });
    share_out(together * tasks, [&](const auto& next) {
      const int64_t most = kMostTiles * format.queries;
      const Buffer<E> queries(most * padded);
      const Buffer<float> scratch(scratch_floats(format.queries, padded)), rows(most * padded);
      for (int64_t i = next(); i < together * tasks; i = next()) {
        // Head by head, whose keys and values a cache then holds; the longest tasks first, so that all threads come to
        // an end together.
        const Span& span = spans[tasks - 1 - i % tasks];
        const int64_t n = i / tasks, b = (head + n) / NH, h = (head + n) % NH;
        for (int64_t first = 0; first < span.count; first += format.queries) {
          const int64_t count = std::min(format.queries, span.count - first);
          packer.queries(Tokens<T>(q, b, h), span.first + first, count, scale < 0, queries.at(first * padded));
        }
        kernel.attend(
            {queries.at(0), keys.at(n * tokens * padded), values.at(n * tokens * padded), span.count, span.visible,
             padded, std::abs(scale) * static_cast<float>(kLog2E), scratch.at(0), rows.at(0),
             lse.data_ptr<float>() + (b * NH + h) * L + span.first});
        for (int64_t r = 0; r < span.count; ++r) {
          T* row = to + ((b * L + span.first + r) * NH + h) * D;
          for (int64_t d = 0; d < D; ++d) row[d] = static_cast<T>(*rows.at(r * padded + d));
        }
      }
    });
  }
}

// q: (B, L, NH, D), the last L of the tokens of k and v; blocks of q. Any strides. -> out, lse (B, NH, L).
std::tuple<at::Tensor, at::Tensor> scale_block_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::IntArrayRef block_lengths, double softmax_scale,
    const std::string& isa) {
  check_cpu(q, "q");
  const int64_t total = std::accumulate(block_lengths.begin(), block_lengths.end(), int64_t{0});
  TORCH_CHECK_VALUE(
      total == q.size(1) && total <= k.size(1), "block_lengths: expected ", q.size(1), " tokens, found ", total);
  TORCH_CHECK_VALUE(k.sizes() == v.sizes(), "v: expected shape ", k.sizes(), ", found ", v.sizes());
  const at::Tensor out = at::empty(q.sizes(), q.options());
  const at::Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};
  const Kernel kernel = kernel_of(isa, q.scalar_type());
  const auto scale = static_cast<float>(softmax_scale);
  if (kernel.format.tiles) {
    attend<at::BFloat16, uint16_t>(kernel, q, k, v, block_lengths, scale, out, lse);
  } else {
    AT_DISPATCH_SWITCH(q.scalar_type(), "scale_block_attention", HITSR_DISPATCH_CASES([&] {
      attend<scalar_t, float>(kernel, q, k, v, block_lengths, scale, out, lse);
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
