// CPU backend of attention_prologue: the loop over tokens.
#include <algorithm>
#include <optional>
#include <string>

#include "cpu/buffer.h"
#include "cpu/instruction_sets.h"
#include "tensor.h"

namespace hitsr_fast {
namespace {

constexpr int64_t kSmallestShare = 16384;  // values that are worth a thread

// What happens to q, k or v of one token.
struct Steps {
  const float* bias;    // [heads * D], or null
  bool norm;            // each head is brought to length one,
  const float* scale;   // and then multiplied: [heads], or null
  const float* rotary;  // [D / 2][2], or null
};

// from: [heads][D]. Head h goes to `to + h * stride`. memory: [heads * (D + 1)] floats.
template <typename T, typename U>
using Part = void (*)(
    const T* from, const Steps& steps, int64_t heads, int64_t D, float* memory, U* to, int64_t stride);

#define HITSR_OP attention_prologue
#include "cpu/foreach_isa.h"

void check_cache(const Tensor& cache, const Tensor& qkv, const Tensor& like, int64_t start, const char* name) {
  check_cpu(cache, name);
  check_dtype(cache, like.scalar_type(), name);
  HITSR_CHECK(
      cache.dim() == 4 && cache.sizes() == like.sizes() && cache.size(0) == qkv.size(0) &&
          3 * cache.size(2) * cache.size(3) == qkv.size(2),
      name, ": expected shape (B, Tmax, NH, D) for qkv of ", qkv.sizes(), ", found ", cache.sizes());
  HITSR_CHECK(
      cache.size(3) <= 1 || cache.stride(3) == 1, name, ": expected a stride of 1 over D, found strides ", cache.strides());
  HITSR_CHECK(
      start >= 0 && start + qkv.size(1) <= cache.size(1), "start: expected 0 to ", cache.size(1) - qkv.size(1), ", found ",
      start);
}

// So many values, of any floating dtype and strides, as floats in a row; or nothing.
class Floats {
 public:
  Floats(const std::optional<Tensor>& values, int64_t count, const char* name) {
    if (!values.has_value()) return;
    check_cpu(*values, name);
    HITSR_CHECK(values->numel() == count, name, ": expected ", count, " values, found ", values->numel());
    values_ = in_a_row(*values, ScalarType::Float);
    first = data<const float>(values_);
  }

  const float* first = nullptr;

 private:
  Tensor values_;
};

// The tokens of a call, from qkv to q and the caches.
template <typename T, typename U>
class Tokens {
 public:
  Tokens(
      const Tensor& qkv, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, int64_t start,
      const std::string& isa)
      : L(q.size(1)), heads(q.size(2)), D(q.size(3)), start(start), to_query(HITSR_SELECT(isa, kPart<T, T>)),
        to_cache(HITSR_SELECT(isa, kPart<T, U>)), qkv(data<const T>(qkv)), q(data<T>(q)), k_cache(k_cache),
        v_cache(v_cache) {}

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
        from + width, steps(1, norm, nullptr, turn), heads, D, memory, k_cache.row(image, start + token), k_cache.head);
    to_cache(
        from + 2 * width, steps(2, false, nullptr, nullptr), heads, D, memory, v_cache.row(image, start + token),
        v_cache.head);
  }

 private:
  struct Cache {
    U* first;
    int64_t image, token, head;  // strides

    explicit Cache(const Tensor& cache)
        : first(data<U>(cache)), image(cache.stride(0)), token(cache.stride(1)), head(cache.stride(2)) {}
    U* row(int64_t b, int64_t t) const { return first + b * image + t * token; }
  };

  int64_t L, heads, D, start;
  Part<T, T> to_query;
  Part<T, U> to_cache;
  const T* qkv;
  T* q;
  Cache k_cache, v_cache;
};

Tensor attention_prologue(
    const Tensor& given, const Tensor& k_cache, const Tensor& v_cache, int64_t start,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& q_scale,
    const std::optional<Tensor>& rotary, const std::string& isa) {
  check_cpu(given, "qkv");
  HITSR_CHECK(given.dim() == 3, "qkv: expected shape (B, L, 3 * NH * D), found ", given.sizes());
  const Tensor qkv = in_a_row(given, given.scalar_type());
  check_cache(k_cache, qkv, k_cache, start, "k_cache");
  check_cache(v_cache, qkv, k_cache, start, "v_cache");
  const int64_t B = qkv.size(0), L = qkv.size(1), heads = k_cache.size(2), D = k_cache.size(3);
  HITSR_CHECK(!rotary.has_value() || D % 2 == 0, "rotary: expected an even D, found ", D);
  const Floats biases(bias, 3 * heads * D, "bias"), scales(q_scale, heads, "q_scale"), turns(rotary, L * D, "rotary");
  const Tensor q = empty({B, L, heads, D}, qkv.scalar_type());
  const int64_t share = std::max<int64_t>(kSmallestShare / std::max<int64_t>(qkv.size(2), 1), 1);
  visit_dtype(qkv, "qkv", [&](auto value) {
    visit_dtype(k_cache, "k_cache", [&](auto cached) {
      const Tokens<decltype(value), decltype(cached)> tokens(qkv, q, k_cache, v_cache, start, isa);
      torch::stable::parallel_for(0, B * L, share, [&](int64_t begin, int64_t end) {
        const Buffer<float> memory(heads * (D + 1));
        for (int64_t row = begin; row < end; ++row) tokens(row, biases.first, scales.first, turns.first, memory.at(0));
      });
    });
  });
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library,
      "_attention_prologue(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, int start, Tensor? bias, Tensor? q_scale, "
      "Tensor? rotary, str isa) -> Tensor",
      TORCH_BOX(&attention_prologue));
}

}  // namespace hitsr_fast
