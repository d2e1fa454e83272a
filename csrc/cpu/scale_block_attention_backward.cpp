// CPU backend of scale_block_attention_backward in float32: one head a thread, whose tiles of queries are walked in
// order, so that the sums of keys and values are the same for any number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "check.h"
#include "cpu/instruction_sets.h"
#include "cpu/scale_block_attention.h"
#include "cpu/scale_block_attention_pack.h"

namespace hitsr_fast {
namespace {

using namespace attention;

struct Kernel {
  Format format;
  void (*differentiate)(const BackwardTask&);
};

Kernel kernel_of(const std::string& name) {
  const std::string isa = isa_by_name(name).name;  // which this machine has
#if defined(__x86_64__)
  if (isa == "amx_bf16" || isa == "avx512_bf16" || isa == "avx512") return {avx512::kFormat, avx512::differentiate};
  if (isa == "avx2") return {avx2::kFormat, avx2::differentiate};
#endif
  return {portable::kFormat, portable::differentiate};
}

// What all heads share, and the memory of one thread.
class Worker {
 public:
  Worker(const Kernel& kernel, int64_t T, int64_t D, at::IntArrayRef block_lengths, float scale)
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
  const Kernel kernel_;
  const Format format_;
  const int64_t D_, padded_, tokens_, most_;
  const float scale_;
  const std::vector<Span> spans_;
  const Buffer<float> keys_, values_, key_rows_, grad_keys_, grad_values_;
  const Buffer<float> queries_, grads_, query_rows_, grad_rows_, grad_queries_, lse_, delta_, scratch_;
};

// All (B, T, NH, D) of any strides, lse (B, NH, T) -> gradients in q, k and v.
std::tuple<at::Tensor, at::Tensor, at::Tensor> scale_block_attention_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, at::IntArrayRef block_lengths, double softmax_scale, const std::string& isa) {
  check_cpu(q, "q");
  for (const at::Tensor* tensor : {&grad, &q, &k, &v, &out, &lse}) {
    check_dtype(*tensor, at::kFloat, "grad, q, k, v, out, lse");
  }
  const int64_t B = q.size(0), T = q.size(1), NH = q.size(2), D = q.size(3);
  const at::Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty_like(grad_q);
  const at::Tensor grad_v = at::empty_like(grad_q), logs = lse.contiguous();
  const Kernel kernel = kernel_of(isa);
  at::parallel_for(0, B * NH, 1, [&](int64_t first, int64_t last) {
    const Worker worker(kernel, T, D, block_lengths, static_cast<float>(softmax_scale));
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / NH, h = i % NH, to = (b * T * NH + h) * D;
      const auto head = [&](const at::Tensor& tensor) { return Tokens<float>(tensor, b, h); };
      worker.differentiate(
          head(grad), head(q), head(k), head(v), head(out), logs.const_data_ptr<float>() + i * T, NH * D,
          grad_q.data_ptr<float>() + to, grad_k.data_ptr<float>() + to, grad_v.data_ptr<float>() + to);
    }
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  library.def(
      "_scale_block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "int[] block_lengths, float softmax_scale, str isa) -> (Tensor, Tensor, Tensor)",
      &scale_block_attention_backward);
}

}  // namespace hitsr_fast
