#include "cpu/nearest_code_book.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <numeric>

#include "check.h"
#include "cpu/instruction_sets.h"

namespace hitsr_fast::nearest {
namespace {

constexpr int64_t kPackedClasses = 32;  // that are worth a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The parts of a packed codebook, in this order, each with a leading dimension of groups; bounds are the floats of
// nearest::Codebook.
constexpr int64_t kParts = 5;
constexpr const char* kPartNames[kParts] = {"mean", "screen", "half_norms", "exact", "bounds"};

std::vector<std::vector<int64_t>> part_shapes(int64_t G, int64_t K, int64_t C, const IsaTraits& isa) {
  const int64_t tiles = ceil_div(K, kClass * isa.lanes);
  return {
      {G, C},
      {G, tiles, kClass, isa.steps(C), isa.lanes},
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

constexpr double kUp = 1.0 + 0x1p-20;  // over the rounding of sums in float64 and of casts to float

// The codes as the definition wants them: classes of kClass, [class][C][kClass]; as given, or unit vectors for cosine.
// Padding repeats the last code, so it is never nearer than that.
template <typename T, typename E>
void pack_exact(const T* codes, int64_t K, int64_t C, bool cosine, E* exact) {
  at::parallel_for(0, ceil_div(K, kClass), kPackedClasses, [&](int64_t first, int64_t last) {
    for (int64_t k = first * kClass; k < last * kClass; ++k) {
      const T* code = codes + std::min(k, K - 1) * C;
      double norm = 1;
      if (cosine) {
        double energy = 0;
        for (int64_t c = 0; c < C; ++c) energy += static_cast<double>(code[c]) * static_cast<double>(code[c]);
        norm = energy > 0 ? std::sqrt(energy) : 1.0;
      }
      E* to = exact + k / kClass * C * kClass + k % kClass;
      for (int64_t c = 0; c < C; ++c) {
        to[c * kClass] = cosine ? static_cast<E>(static_cast<double>(code[c]) / norm) : static_cast<E>(code[c]);
      }
    }
  });
}

// What the screen needs of `exact`, for one group.
template <typename E>
void pack_screen(
    const E* exact, int64_t K, int64_t C, bool cosine, const IsaTraits& isa, float* mean, uint32_t* screen,
    float* half_norms, float* bounds) {
  const int64_t classes = ceil_div(K, kClass), tiles = ceil_div(classes, isa.lanes), steps = isa.steps(C);
  const auto over_tiles = [&](const auto& task) {
    at::parallel_for(0, tiles, ceil_div(kPackedClasses, isa.lanes), [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) task(tile, std::min(isa.lanes, classes - tile * isa.lanes));
    });
  };

  // Any float near the mean will do: what matters is that rows and codes are centred by the same one. For cosine only
  // the codes are: that moves all scores of a row alike.
  std::vector<double> sums(tiles * C, 0.0), centre(C, 0.0);
  over_tiles([&](int64_t tile, int64_t lanes) {
    for (int64_t number = tile * isa.lanes; number < tile * isa.lanes + lanes; ++number) {
      const int64_t members = std::min(kClass, K - number * kClass);
      for (int64_t c = 0; c < C; ++c) {
        const E* codes = exact + (number * C + c) * kClass;
        sums[tile * C + c] += std::accumulate(codes, codes + members, 0.0);
      }
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t tile = 0; tile < tiles; ++tile) centre[c] += sums[tile * C + c];
    centre[c] = static_cast<float>(centre[c] / static_cast<double>(K));
    mean[c] = cosine ? 0.0f : static_cast<float>(centre[c]);
  }

  std::vector<double> most(tiles, 0.0);
  over_tiles([&](int64_t tile, int64_t lanes) {
    for (int64_t number = tile * isa.lanes; number < tile * isa.lanes + lanes; ++number) {
      double energy[kClass] = {};
      for (int64_t c = 0; c < C; ++c) {
        const E* codes = exact + (number * C + c) * kClass;
        for (int64_t k = 0; k < kClass; ++k) energy[k] += (codes[k] - centre[c]) * (codes[k] - centre[c]);
      }
      most[tile] = std::max(most[tile], *std::max_element(energy, energy + kClass));
    }
  });
  const double longest = std::sqrt(*std::max_element(most.begin(), most.end()));
  int exponent = 0;
  std::frexp(longest, &exponent);
  const double scale = std::ldexp(1.0, -std::clamp(exponent, -126, 126));

  over_tiles([&](int64_t tile, int64_t lanes) {
    uint32_t* tile_screen = screen + tile * kClass * steps * isa.lanes;
    float* tile_norms = half_norms + tile * kClass * isa.lanes;
    std::fill_n(tile_screen, kClass * steps * isa.lanes, 0u);
    std::fill_n(tile_norms, kClass * isa.lanes, std::numeric_limits<float>::infinity());
    most[tile] = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t number = tile * isa.lanes + lane, members = std::min(kClass, K - number * kClass);
      double energy[kClass] = {}, lost[kClass] = {};
      for (int64_t c = 0; c < C; ++c) {
        const E* codes = exact + (number * C + c) * kClass;
        const int64_t step = isa.pairs ? c / 2 : c, shift = isa.pairs && c % 2 == 0 ? 16 : 0;
        for (int64_t k = 0; k < members; ++k) {
          const double value = (codes[k] - centre[c]) * scale;
          const uint32_t word = screen_word(static_cast<float>(value), isa.pairs);
          const double dropped = value - word_value(word);
          energy[k] += value * value;
          lost[k] += dropped * dropped;
          tile_screen[(k * steps + step) * isa.lanes + lane] |= word >> shift;
        }
      }
      for (int64_t k = 0; k < members; ++k) {
        tile_norms[k * isa.lanes + lane] = cosine ? 0.0f : static_cast<float>(energy[k] / 2);
        most[tile] = std::max(most[tile], lost[k]);
      }
    }
  });
  bounds[0] = static_cast<float>(scale);
  bounds[1] = static_cast<float>(longest * scale * kUp);
  bounds[2] = static_cast<float>(std::sqrt(*std::max_element(most.begin(), most.end())) * kUp);
  bounds[3] = cosine ? static_cast<float>(scale * kUp) : bounds[1];
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

}  // namespace

std::vector<at::Tensor> pack(const at::Tensor& codebook, bool cosine, const std::string& isa_name) {
  check_cpu(codebook, "codebook");
  const IsaTraits& isa = isa_by_name(isa_name);
  const int64_t G = codebook.size(0), K = codebook.size(1), C = codebook.size(2);
  const auto shapes = part_shapes(G, K, C, isa);
  const auto dtypes = part_dtypes(cosine);
  std::vector<at::Tensor> parts;
  for (int64_t i = 0; i < kParts; ++i) parts.push_back(at::empty(shapes[i], codebook.options().dtype(dtypes[i])));
  const at::Tensor given = codebook.contiguous();
  AT_DISPATCH_SWITCH(codebook.scalar_type(), "nearest_code_pack", HITSR_DISPATCH_CASES([&] {
    for (int64_t g = 0; g < G; ++g) {
      const auto pack_group = [&](auto* exact) {
        pack_exact(given.const_data_ptr<scalar_t>() + g * K * C, K, C, cosine, exact);
        pack_screen(
            exact, K, C, cosine, isa, parts[0][g].data_ptr<float>(),
            reinterpret_cast<uint32_t*>(parts[1][g].data_ptr<int>()), parts[2][g].data_ptr<float>(),
            parts[4][g].data_ptr<float>());
      };
      cosine ? pack_group(parts[3][g].data_ptr<double>()) : pack_group(parts[3][g].data_ptr<float>());
    }
  }));
  return parts;
}

std::vector<Codebook> codebooks(
    const std::vector<at::Tensor>& parts, int64_t G, int64_t K, int64_t C, bool cosine, const std::string& isa_name) {
  check_parts(parts, G, K, C, cosine, isa_by_name(isa_name));
  std::vector<Codebook> books;
  for (int64_t g = 0; g < G; ++g) books.push_back(group_of(parts, g, K, cosine));
  return books;
}

template <typename T>
std::unique_ptr<Searcher<T>> make_searcher(const std::string& isa_name, const Codebook& book, int64_t rows) {
  const std::string name = isa_by_name(isa_name).name;
  Searcher<T>* searcher = nullptr;
#if defined(__x86_64__)
  if (name == "amx_bf16") searcher = amx_bf16::make_searcher<T>(book, rows);
  if (name == "avx512_bf16") searcher = avx512_bf16::make_searcher<T>(book, rows);
  if (name == "avx512") searcher = avx512::make_searcher<T>(book, rows);
  if (name == "avx2") searcher = avx2::make_searcher<T>(book, rows);
#endif
  if (name == "portable") searcher = portable::make_searcher<T>(book, rows);
  return std::unique_ptr<Searcher<T>>(searcher);
}

template std::unique_ptr<Searcher<float>> make_searcher(const std::string&, const Codebook&, int64_t);
template std::unique_ptr<Searcher<c10::Half>> make_searcher(const std::string&, const Codebook&, int64_t);
template std::unique_ptr<Searcher<c10::BFloat16>> make_searcher(const std::string&, const Codebook&, int64_t);

int64_t count_full_scans(int64_t more) {
  static std::atomic<int64_t> total{0};
  return total += more;
}

}  // namespace hitsr_fast::nearest
