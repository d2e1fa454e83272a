// CPU backend of sample_codes: the loop over rows, and each row's random numbers. docs/ops/sample_codes.md has the
// definition.
#include <algorithm>
#include <optional>
#include <string>

#include "cpu/buffer.h"
#include "cpu/instruction_sets.h"
#include "tensor.h"

namespace hitsr_fast {
namespace {

constexpr int64_t kSmallestShare = 4096;  // logits that are worth a thread

// Of 2^-62: a share of a sum of weights.
struct Fraction {
  int64_t high, low;  // 31 bits each
};

struct Options {
  float cond, uncond;  // factors of the two logits: 1 + guidance and guidance
  float scale;         // log2(e) / temperature
  int64_t top_k;       // 0: all
  bool top_p;
  Fraction dropped;    // 1 - top_p
};

// Memory of one thread, [V] each.
struct Workspace {
  int32_t* keys;
  int32_t* places;
  int32_t* weights;
};

struct Kernels {
  // Index of the first of the largest logits of a row. uncond_logits: null without guidance.
  int64_t (*largest)(const Options&, const float* logits, const float* uncond_logits, int64_t V, const Workspace&);
  // Index that a random fraction draws from a row.
  int64_t (*draw)(
      const Options&, const float* logits, const float* uncond_logits, int64_t V, const Fraction& random,
      const Workspace&);
};

#define HITSR_OP sample_codes
#include "cpu/foreach_isa.h"

// Two words of a row's block of Philox 4x32-10 (Salmon et al., SC 2011), 31 bits of each.
Fraction random_fraction(uint64_t seed, uint64_t offset, uint64_t row) {
  uint32_t a = static_cast<uint32_t>(offset), b = static_cast<uint32_t>(offset >> 32);
  uint32_t c = static_cast<uint32_t>(row), d = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53} * a, right = uint64_t{0xCD9E8D57} * c;
    a = static_cast<uint32_t>(right >> 32) ^ b ^ k0;
    b = static_cast<uint32_t>(right);
    c = static_cast<uint32_t>(left >> 32) ^ d ^ k1;
    d = static_cast<uint32_t>(left);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {a >> 1, b >> 1};
}

// logits, uncond_logits: float32 (N, V), contiguous. dropped: 1 - top_p in units of 2^-62; 0: no top-p.
Tensor sample_codes(
    const Tensor& logits, const std::optional<Tensor>& uncond_logits, const std::optional<Tensor>& state,
    double cond, double uncond, double scale, int64_t top_k, int64_t dropped, const std::string& isa) {
  check_cpu(logits, "logits");
  check_dtype(logits, ScalarType::Float, "logits");
  check_contiguous(logits, "logits");
  HITSR_CHECK(
      logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= 1 << 20,
      "logits: expected shape (N, V) with V from 1 to 2^20, found ", logits.sizes());
  const int64_t N = logits.size(0), V = logits.size(1);
  const float* second = nullptr;
  if (uncond_logits) {
    check_cpu(*uncond_logits, "uncond_logits");
    check_dtype(*uncond_logits, ScalarType::Float, "uncond_logits");
    check_contiguous(*uncond_logits, "uncond_logits");
    check_shape(*uncond_logits, logits.sizes(), "uncond_logits");
    second = data<const float>(*uncond_logits);
  }
  uint64_t seed = 0, offset = 0;
  if (state) {
    check_dtype(*state, ScalarType::Long, "state");
    check_cpu(*state, "state");
    check_shape(*state, {2}, "state");
    seed = static_cast<uint64_t>(data<const int64_t>(*state)[0]);
    offset = static_cast<uint64_t>(data<const int64_t>(*state)[state->stride(0)]);
  }
  const Options options{
      static_cast<float>(cond), static_cast<float>(uncond), static_cast<float>(scale), top_k, dropped > 0,
      {dropped >> 31, dropped & 0x7fffffff}};
  const Kernels& kernels = HITSR_SELECT(isa, kKernels);
  const Tensor codes = empty({N}, ScalarType::Long);
  const float* first = data<const float>(logits);
  int64_t* out = data<int64_t>(codes);
  torch::stable::parallel_for(0, N, std::max<int64_t>(kSmallestShare / V, 1), [&](int64_t begin, int64_t end) {
    const Buffer<int32_t> memory(3 * V);
    const Workspace work{memory.at(0), memory.at(V), memory.at(2 * V)};
    for (int64_t row = begin; row < end; ++row) {
      const float* other = second == nullptr ? nullptr : second + row * V;
      if (!state) {
        out[row] = kernels.largest(options, first + row * V, other, V, work);
      } else {
        const Fraction random = random_fraction(seed, offset, static_cast<uint64_t>(row));
        out[row] = kernels.draw(options, first + row * V, other, V, random, work);
      }
    }
  });
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(
      library,
      "_sample_codes(Tensor logits, Tensor? uncond_logits, Tensor? state, float cond, float uncond, float scale, "
      "int top_k, int dropped, str isa) -> Tensor",
      TORCH_BOX(&sample_codes));
}

}  // namespace hitsr_fast
