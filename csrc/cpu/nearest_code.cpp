// CPU backend of nearest_code: the choice of an instruction set, packing of codebooks, and the loop over chunks of rows.
#include "cpu/nearest_code.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "check.h"

namespace hitsr_fast {
namespace {

using nearest::Codebook;
using nearest::kClass;

struct IsaTraits {
  const char* name;
  int64_t lanes;
  bool pairs;
};

// Quickest first.
const std::vector<IsaTraits>& available_isas() {
  static const std::vector<IsaTraits> isas = [] {
    std::vector<IsaTraits> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back({"avx512_bf16", 16, true});
    if (avx512) found.push_back({"avx512", 16, false});
    if (avx2) found.push_back({"avx2", 8, false});
#endif
    found.push_back({"portable", 4, false});
    return found;
  }();
  return isas;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const auto& isa : available_isas()) names.emplace_back(isa.name);
  return names;
}

const IsaTraits& isa_by_name(const std::string& name) {
  for (const auto& isa : available_isas()) {
    if (name == isa.name) return isa;
  }
  TORCH_CHECK_VALUE(false, "isa: expected one of ", isa_names(), ", found ", name);
}

std::atomic<int64_t> full_scans{0};

// Rows that are worth a thread.
constexpr int64_t kSmallestShare = 48;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The parts of a packed codebook, in this order, each with a leading dimension of groups; bounds are the floats of
// nearest::Codebook.
constexpr int64_t kParts = 5;
constexpr const char* kPartNames[kParts] = {"mean", "screen", "half_norms", "exact", "bounds"};

std::vector<std::vector<int64_t>> part_shapes(int64_t G, int64_t K, int64_t C, const IsaTraits& isa) {
  const int64_t steps = isa.pairs ? ceil_div(C, 2) : C, tiles = ceil_div(K, kClass * isa.lanes);
  return {
      {G, C},
      {G, tiles, kClass, steps, isa.lanes},
      {G, tiles, kClass, isa.lanes},
      {G, ceil_div(K, kClass), C, kClass},
      {G, 4}};
}

std::vector<at::ScalarType> part_dtypes(bool cosine) {
  return {at::kFloat, at::kInt, at::kFloat, cosine ? at::kDouble : at::kFloat, at::kFloat};
}

uint32_t float_bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

// `value` as the screen keeps it: a float's bits, or those of the nearest bfloat16 with the lower half zero.
uint32_t screen_word(float value, bool pairs) {
  const uint32_t word = float_bits(value);
  return pairs ? (word + 0x7fffu + ((word >> 16) & 1u)) & 0xffff0000u : word;
}

float word_value(uint32_t word) {
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void pack_group(
    const double* codes, int64_t K, int64_t C, bool cosine, const IsaTraits& isa, float* mean, uint32_t* screen,
    float* half_norms, void* exact, float* bounds) {
  const int64_t steps = isa.pairs ? ceil_div(C, 2) : C;
  std::vector<double> centre(C, 0.0), unit;
  if (cosine) {
    unit.resize(K * C);
    for (int64_t k = 0; k < K; ++k) {
      double energy = 0;
      for (int64_t c = 0; c < C; ++c) energy += codes[k * C + c] * codes[k * C + c];
      const double norm = std::sqrt(energy);
      for (int64_t c = 0; c < C; ++c) unit[k * C + c] = codes[k * C + c] / (norm > 0 ? norm : 1.0);
    }
    codes = unit.data();
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t c = 0; c < C; ++c) centre[c] += codes[k * C + c];
  }
  // Any float near the mean will do: what matters is that rows and codes are centred by the same one. For cosine only
  // the codes are: that moves all scores of a row alike.
  for (int64_t c = 0; c < C; ++c) {
    centre[c] = static_cast<float>(centre[c] / static_cast<double>(K));
    mean[c] = cosine ? 0.0f : static_cast<float>(centre[c]);
  }

  double longest = 0;
  for (int64_t k = 0; k < K; ++k) {
    double energy = 0;
    for (int64_t c = 0; c < C; ++c) {
      const double value = codes[k * C + c] - centre[c];
      energy += value * value;
    }
    longest = std::max(longest, energy);
  }
  longest = std::sqrt(longest);
  int exponent = 0;
  std::frexp(longest, &exponent);
  const double scale = std::ldexp(1.0, -std::clamp(exponent, -126, 126));

  double most_lost = 0;
  const int64_t tile_codes = kClass * isa.lanes;
  std::vector<uint32_t> words(2 * steps);
  for (int64_t k = 0; k < ceil_div(K, tile_codes) * tile_codes; ++k) {
    const int64_t tile = k / tile_codes, lane = k % tile_codes / kClass, block = k % kClass;
    const int64_t place = tile * kClass + block;
    double energy = 0, lost = 0;
    std::fill(words.begin(), words.end(), 0u);
    for (int64_t c = 0; k < K && c < C; ++c) {
      const double value = (codes[k * C + c] - centre[c]) * scale;
      words[c] = screen_word(static_cast<float>(value), isa.pairs);
      energy += value * value;
      lost += (value - word_value(words[c])) * (value - word_value(words[c]));
    }
    most_lost = std::max(most_lost, lost);
    float& half_norm = half_norms[place * isa.lanes + lane];
    half_norm = k >= K ? std::numeric_limits<float>::infinity() : cosine ? 0.0f : static_cast<float>(energy / 2);
    for (int64_t s = 0; s < steps; ++s) {
      screen[(place * steps + s) * isa.lanes + lane] = isa.pairs ? words[2 * s] >> 16 | words[2 * s + 1] : words[s];
    }
  }
  for (int64_t k = 0; k < ceil_div(K, kClass) * kClass; ++k) {
    for (int64_t c = 0; c < C; ++c) {
      const double value = codes[std::min(k, K - 1) * C + c];  // padding is never nearer than the last code
      const int64_t place = (k / kClass * C + c) * kClass + k % kClass;
      if (cosine) {
        static_cast<double*>(exact)[place] = value;
      } else {
        static_cast<float*>(exact)[place] = static_cast<float>(value);
      }
    }
  }
  constexpr double kUp = 1.0 + 0x1p-20;  // over the rounding of the sums above and of the cast to float
  bounds[0] = static_cast<float>(scale);
  bounds[1] = static_cast<float>(longest * scale * kUp);
  bounds[2] = static_cast<float>(std::sqrt(most_lost) * kUp);
  bounds[3] = cosine ? static_cast<float>(scale * kUp) : bounds[1];
}

// codebook: (G, K, C) floating. Returns the parts.
std::vector<at::Tensor> nearest_code_pack(const at::Tensor& codebook, bool cosine, const std::string& isa_name) {
  check_cpu(codebook, "codebook");
  const IsaTraits& isa = isa_by_name(isa_name);
  const int64_t G = codebook.size(0), K = codebook.size(1), C = codebook.size(2);
  const auto shapes = part_shapes(G, K, C, isa);
  const auto dtypes = part_dtypes(cosine);
  std::vector<at::Tensor> parts;
  for (int64_t i = 0; i < kParts; ++i) parts.push_back(at::empty(shapes[i], codebook.options().dtype(dtypes[i])));
  const at::Tensor codes = codebook.to(at::kDouble).contiguous();
  for (int64_t g = 0; g < G; ++g) {
    pack_group(
        codes[g].data_ptr<double>(), K, C, cosine, isa, parts[0][g].data_ptr<float>(),
        reinterpret_cast<uint32_t*>(parts[1][g].data_ptr<int>()), parts[2][g].data_ptr<float>(),
        parts[3][g].data_ptr(), parts[4][g].data_ptr<float>());
  }
  return parts;
}

Codebook group_of(const std::vector<at::Tensor>& parts, int64_t g, int64_t K, bool cosine) {
  const float* bounds = parts[4].const_data_ptr<float>() + 4 * g;
  const auto group = [g](const at::Tensor& part) {
    return static_cast<const char*>(part.const_data_ptr()) + g * part.stride(0) * part.element_size();
  };
  return {
      K,
      parts[0].size(1),
      parts[1].size(1),
      cosine,
      reinterpret_cast<const float*>(group(parts[0])),
      group(parts[1]),
      reinterpret_cast<const float*>(group(parts[2])),
      group(parts[3]),
      bounds[0],
      bounds[1],
      bounds[2],
      bounds[3]};
}

template <typename T>
int64_t search_with(
    const IsaTraits& isa, const Codebook& book, const nearest::Rows<T>& rows, int64_t begin, int64_t end,
    int64_t* indices) {
  const std::string name = isa.name;
#if defined(__x86_64__)
  if (name == "avx512_bf16") return nearest::avx512_bf16::search(book, rows, begin, end, indices);
  if (name == "avx512") return nearest::avx512::search(book, rows, begin, end, indices);
  if (name == "avx2") return nearest::avx2::search(book, rows, begin, end, indices);
#endif
  return nearest::portable::search(book, rows, begin, end, indices);
}

// Parts that were not made for this call would be read out of bounds.
void check_parts(
    const std::vector<at::Tensor>& parts, int64_t G, int64_t K, int64_t C, bool cosine, const IsaTraits& isa) {
  TORCH_CHECK_VALUE(parts.size() == kParts, "parts: expected ", kParts, " tensors, found ", parts.size());
  const auto shapes = part_shapes(G, K, C, isa);
  const auto dtypes = part_dtypes(cosine);
  for (int64_t i = 0; i < kParts; ++i) {
    const at::Tensor& part = parts[i];
    const at::IntArrayRef shape = shapes[i];
    check_cpu(part, kPartNames[i]);
    check_contiguous(part, kPartNames[i]);
    check_dtype(part, dtypes[i], kPartNames[i]);
    TORCH_CHECK_VALUE(part.sizes() == shape, kPartNames[i], ": expected shape ", shape, ", found ", part.sizes());
  }
}

// x: (G, N, C), or (G, B, M, C) for rows in two strides, any strides; parts: of nearest_code_pack for the same isa.
at::Tensor nearest_code_search(
    const at::Tensor& x, const std::vector<at::Tensor>& parts, int64_t K, bool cosine, const std::string& isa_name) {
  check_cpu(x, "x");
  const IsaTraits& isa = isa_by_name(isa_name);
  const at::Tensor rows = x.dim() == 3 ? x.unsqueeze(1) : x;
  const int64_t G = rows.size(0), inner = rows.size(2), N = rows.size(1) * inner;
  check_parts(parts, G, K, rows.size(3), cosine, isa);
  at::Tensor indices = at::empty({G, N}, x.options().dtype(at::kLong));
  if (N == 0) return indices;
  std::vector<Codebook> books;
  for (int64_t g = 0; g < G; ++g) books.push_back(group_of(parts, g, K, cosine));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "nearest_code", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      at::parallel_for(0, G * N, kSmallestShare, [&](int64_t first, int64_t last) {
        int64_t scans = 0;
        for (int64_t row = first; row < last;) {
          const int64_t g = row / N, begin = row % N, end = std::min(N, begin + last - row);
          const nearest::Rows<scalar_t> view{
              rows.const_data_ptr<scalar_t>() + g * rows.stride(0), inner, rows.stride(1), rows.stride(2),
              rows.stride(3)};
          scans += search_with(isa, books[g], view, begin, end, indices.data_ptr<int64_t>() + row);
          row += end - begin;
        }
        full_scans += scans;
      });
    } else {
      TORCH_CHECK_TYPE(false, "x: expected float16, bfloat16 or float32, found float64");
    }
  });
  return indices;
}

int64_t nearest_code_full_scans() { return full_scans.load(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  library.def("_nearest_code_isas() -> str[]", &isa_names);
  library.def("_nearest_code_full_scans() -> int", &nearest_code_full_scans);
  library.def("_nearest_code_pack(Tensor codebook, bool cosine, str isa) -> Tensor[]", &nearest_code_pack);
  library.def(
      "_nearest_code_search(Tensor x, Tensor[] parts, int K, bool cosine, str isa) -> Tensor", &nearest_code_search);
}

}  // namespace hitsr_fast
