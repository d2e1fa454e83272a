// CPU backend of sample_codes: the loop over rows, and each row's random numbers.
#include "cpu/sample_codes.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/instruction_sets.h"

namespace hitsr_fast {
namespace {

using sampling::Fraction;

constexpr int64_t kSmallestShare = 4096;  // logits that are worth a thread

struct Kernels {
  decltype(&sampling::portable::largest) largest;
  decltype(&sampling::portable::draw) draw;
};

Kernels kernels_of(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "amx_bf16" || isa == "avx512_bf16" || isa == "avx512") {
    return {sampling::avx512::largest, sampling::avx512::draw};
  }
  if (isa == "avx2") return {sampling::avx2::largest, sampling::avx2::draw};
#endif
  return {sampling::portable::largest, sampling::portable::draw};
}

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

// logits, uncond_logits: float32 (N, V), contiguous. dropped: 1 - top_p in units of 2^-62; negative: no top-p.
at::Tensor sample_codes(
    const at::Tensor& logits, const std::optional<at::Tensor>& uncond_logits, const std::optional<at::Tensor>& state,
    double guidance, int64_t top_k, int64_t dropped, double scale, const std::string& isa) {
  check_cpu(logits, "logits");
  check_dtype(logits, at::kFloat, "logits");
  check_contiguous(logits, "logits");
  TORCH_CHECK_VALUE(
      logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= 1 << 20,
      "logits: expected shape (N, V) with V from 1 to 2^20, found ", logits.sizes());
  const int64_t N = logits.size(0), V = logits.size(1);
  const float* uncond = nullptr;
  if (uncond_logits) {
    check_cpu(*uncond_logits, "uncond_logits");
    check_dtype(*uncond_logits, at::kFloat, "uncond_logits");
    check_contiguous(*uncond_logits, "uncond_logits");
    TORCH_CHECK_VALUE(
        uncond_logits->sizes() == logits.sizes(), "uncond_logits: expected shape ", logits.sizes(), ", found ",
        uncond_logits->sizes());
    uncond = uncond_logits->const_data_ptr<float>();
  }
  uint64_t seed = 0, offset = 0;
  if (state) {
    check_dtype(*state, at::kLong, "state");
    seed = static_cast<uint64_t>((*state)[0].item<int64_t>());
    offset = static_cast<uint64_t>((*state)[1].item<int64_t>());
  }
  const sampling::Options options{
      static_cast<float>(1 + guidance), static_cast<float>(guidance), static_cast<float>(scale), top_k, dropped >= 0,
      {dropped >> 31, dropped & 0x7fffffff}};
  const Kernels kernels = kernels_of(isa_by_name(isa).name);
  const at::Tensor codes = at::empty({N}, logits.options().dtype(at::kLong));
  const float* first = logits.const_data_ptr<float>();
  int64_t* out = codes.data_ptr<int64_t>();
  at::parallel_for(0, N, std::max<int64_t>(kSmallestShare / V, 1), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> memory(static_cast<size_t>(3 * V));
    const sampling::Workspace work{memory.data(), memory.data() + V, memory.data() + 2 * V};
    for (int64_t row = begin; row < end; ++row) {
      const float* other = uncond == nullptr ? nullptr : uncond + row * V;
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

TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  library.def(
      "_sample_codes(Tensor logits, Tensor? uncond_logits, Tensor? state, float guidance, int top_k, int dropped, "
      "float scale, str isa) -> Tensor",
      &sample_codes);
}

}  // namespace hitsr_fast
