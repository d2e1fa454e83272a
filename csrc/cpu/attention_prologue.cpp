// CPU backend of attention_prologue: the loop over tokens.
#include "cpu/attention_prologue.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/instruction_sets.h"

namespace hitsr_fast {
namespace {

using prologue::Steps;

constexpr int64_t kSmallestShare = 16384;  // values that are worth a thread

template <typename T, typename U>
decltype(&prologue::portable::part<T, U>) kernel_of(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx_bf16" || isa == "avx512_bf16" || isa == "avx512") return prologue::avx512::part<T, U>;
  if (isa == "avx2") return prologue::avx2::part<T, U>;
#endif
  return prologue::portable::part<T, U>;
}

void check_values(const at::Tensor& values, const char* name) {
  check_cpu(values, name);
  const auto dtype = values.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, name,
      ": expected dtype float16, bfloat16 or float32, found ", dtype);
}

void check_cache(const at::Tensor& cache, const at::Tensor& qkv, const at::Tensor& like, int64_t start, const char* name) {
  check_values(cache, name);
  check_dtype(cache, like.scalar_type(), name);
  TORCH_CHECK_VALUE(
      cache.dim() == 4 && cache.sizes() == like.sizes() && cache.size(0) == qkv.size(0) &&
          3 * cache.size(2) * cache.size(3) == qkv.size(2),
      name, ": expected shape (B, Tmax, NH, D) for qkv of ", qkv.sizes(), ", found ", cache.sizes());
  TORCH_CHECK_VALUE(
      cache.size(3) <= 1 || cache.stride(3) == 1, name, ": expected a stride of 1 over D, found strides ", cache.strides());
  TORCH_CHECK_VALUE(
      start >= 0 && start + qkv.size(1) <= cache.size(1), "start: expected 0 to ", cache.size(1) - qkv.size(1), ", found ",
      start);
}

// So many values, of any floating dtype and strides, as floats in a row; or nothing.
class Floats {
 public:
  Floats(const std::optional<at::Tensor>& values, int64_t count, const char* name) {
    if (!values.has_value()) return;
    check_cpu(*values, name);
    TORCH_CHECK_VALUE(values->numel() == count, name, ": expected ", count, " values, found ", values->numel());
    values_ = values->to(at::kFloat).contiguous();
    data = static_cast<const float*>(values_.data_ptr());
  }

  const float* data = nullptr;

 private:
  at::Tensor values_;
};

template <typename F>
void with_dtype(const at::Tensor& values, const F& run) {
  switch (values.scalar_type()) {
    case at::kFloat:
      return run(float{});
    case at::kHalf:
      return run(Half{});
    default:
      return run(Bfloat16{});
  }
}

// The tokens of a call, from qkv to q and the caches.
template <typename T, typename U>
class Tokens {
 public:
  Tokens(
      const at::Tensor& qkv, const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache, int64_t start,
      const std::string& isa)
      : L(q.size(1)), heads(q.size(2)), D(q.size(3)), start(start), to_query(kernel_of<T, T>(isa)),
        to_cache(kernel_of<T, U>(isa)), qkv(data<const T>(qkv)), q(data<T>(q)), k_cache(k_cache), v_cache(v_cache) {}

  // bias, scale, rotary: of the whole call, or null. memory: [heads * (D + 1)] floats.
  void operator()(int64_t row, const float* bias, const float* scale, const float* rotary, float* memory) const {
    const int64_t image = row / L, token = row % L, width = heads * D;
    const T* const from = qkv + row * 3 * width;
    const float* const turn = rotary == nullptr ? nullptr : rotary + token * D;
    const auto steps = [&](int64_t part, bool norm, const float* factor, const float* turned) {
      return Steps{bias == nullptr ? nullptr : bias + part * width, norm, factor, turned};
    };
    const bool norm = scale != nullptr;
    to_query(from, steps(0, norm, scale, turn), heads, D, memory, q + row * width, D);
    to_cache(
        from + width, steps(1, norm, nullptr, turn), heads, D, memory, row_of(k_cache, image, token), k_cache.stride(2));
    to_cache(
        from + 2 * width, steps(2, false, nullptr, nullptr), heads, D, memory, row_of(v_cache, image, token),
        v_cache.stride(2));
  }

 private:
  template <typename V>
  static V* data(const at::Tensor& tensor) {
    return static_cast<V*>(tensor.data_ptr());
  }

  U* row_of(const at::Tensor& cache, int64_t image, int64_t token) const {
    return data<U>(cache) + image * cache.stride(0) + (start + token) * cache.stride(1);
  }

  int64_t L, heads, D, start;
  decltype(kernel_of<T, T>("")) to_query;
  decltype(kernel_of<T, U>("")) to_cache;
  const T* qkv;
  T* q;
  const at::Tensor &k_cache, &v_cache;
};

at::Tensor attention_prologue(
    const at::Tensor& given, const at::Tensor& k_cache, const at::Tensor& v_cache, int64_t start,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& q_scale,
    const std::optional<at::Tensor>& rotary, const std::string& isa) {
  check_values(given, "qkv");
  TORCH_CHECK_VALUE(given.dim() == 3, "qkv: expected shape (B, L, 3 * NH * D), found ", given.sizes());
  const at::Tensor qkv = given.contiguous();
  check_cache(k_cache, qkv, k_cache, start, "k_cache");
  check_cache(v_cache, qkv, k_cache, start, "v_cache");
  const int64_t B = qkv.size(0), L = qkv.size(1), heads = k_cache.size(2), D = k_cache.size(3);
  TORCH_CHECK_VALUE(!rotary.has_value() || D % 2 == 0, "rotary: expected an even D, found ", D);
  const Floats biases(bias, 3 * heads * D, "bias"), scales(q_scale, heads, "q_scale"), turns(rotary, L * D, "rotary");
  const at::Tensor q = at::empty({B, L, heads, D}, qkv.options());
  const std::string set = isa_by_name(isa).name;
  const int64_t share = std::max<int64_t>(kSmallestShare / std::max<int64_t>(qkv.size(2), 1), 1);
  with_dtype(qkv, [&](auto value) {
    with_dtype(k_cache, [&](auto cached) {
      const Tokens<decltype(value), decltype(cached)> tokens(qkv, q, k_cache, v_cache, start, set);
      at::parallel_for(0, B * L, share, [&](int64_t begin, int64_t end) {
        std::vector<float> memory(static_cast<size_t>(heads * (D + 1)));
        for (int64_t row = begin; row < end; ++row) tokens(row, biases.data, scales.data, turns.data, memory.data());
      });
    });
  });
  return q;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  library.def(
      "_attention_prologue(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, int start, Tensor? bias, Tensor? q_scale, "
      "Tensor? rotary, str isa) -> Tensor",
      &attention_prologue);
}

}  // namespace hitsr_fast
