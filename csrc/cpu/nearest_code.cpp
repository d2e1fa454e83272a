// CPU backend of nearest_code: packs codebooks, and searches the rows of all groups.
#include "cpu/nearest_code.h"

#include <algorithm>
#include <atomic>
#include <numeric>

#include "cpu/instruction_sets.h"

namespace hitsr_fast::nearest {
namespace {

constexpr int64_t kPackedClasses = 32;  // that are worth a thread
constexpr int64_t kSmallestShare = 48;  // rows that are worth a thread

// How a set's screen lies.
struct Layout {
  int64_t lanes;                       // floats in a vector
  int64_t (*steps)(int64_t channels);  // of a score
  bool pairs;                          // of bfloat16 channels in a step
};

template <typename T>
struct Kernels {
  Layout layout;
  Searcher<T>* (*make_searcher)(const Codebook&, int64_t rows);  // the caller owns it
};

#define HITSR_OP nearest_code
#define HITSR_AVX512_BF16
#define HITSR_AMX_BF16
#include "cpu/foreach_isa.h"

const Layout& layout_of(const std::string& isa) { return HITSR_SELECT(isa, kKernels<float>).layout; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The parts of a packed codebook, in this order, each with a leading dimension of groups; bounds are the floats of
// Codebook.
constexpr int64_t kParts = 5;
constexpr const char* kPartNames[kParts] = {"mean", "screen", "half_norms", "exact", "bounds"};

std::vector<std::vector<int64_t>> part_shapes(int64_t G, int64_t K, int64_t C, const Layout& layout) {
  const int64_t tiles = ceil_div(K, kClass * layout.lanes);
  return {
      {G, C},
      {G, tiles, kClass, layout.steps(C), layout.lanes},
      {G, tiles, kClass, layout.lanes},
      {G, ceil_div(K, kClass), C, kClass},
      {G, 4}};
}

std::vector<ScalarType> part_dtypes(bool cosine) {
  const ScalarType exact = cosine ? ScalarType::Double : ScalarType::Float;
  return {ScalarType::Float, ScalarType::Int, ScalarType::Float, exact, ScalarType::Float};
}

// `value` as the screen keeps it: a float's bits, or those of the nearest bfloat16 with the lower half zero.
uint32_t screen_word(float value, bool pairs) {
  const uint32_t word = bits_of(value);
  return pairs ? (word + 0x7fffu + ((word >> 16) & 1u)) & 0xffff0000u : word;
}

constexpr double kUp = 1.0 + 0x1p-20;  // over the rounding of sums in float64 and of casts to float

// The codes as the definition wants them: classes of kClass, [class][C][kClass]; as given, or unit vectors for cosine.
// Padding repeats the last code, so it is never nearer than that.
template <typename T, typename E>
void pack_exact(const T* codes, int64_t K, int64_t C, bool cosine, E* exact) {
  torch::stable::parallel_for(0, ceil_div(K, kClass), kPackedClasses, [&](int64_t first, int64_t last) {
    for (int64_t k = first * kClass; k < last * kClass; ++k) {
      const T* code = codes + std::min(k, K - 1) * C;
      double norm = 1;
      if (cosine) {
        double energy = 0;
        for (int64_t c = 0; c < C; ++c) energy += double{wide(code[c])} * double{wide(code[c])};
        norm = energy > 0 ? std::sqrt(energy) : 1.0;
      }
      E* to = exact + k / kClass * C * kClass + k % kClass;
      for (int64_t c = 0; c < C; ++c) {
        const float value = wide(code[c]);
        to[c * kClass] = cosine ? static_cast<E>(value / norm) : static_cast<E>(value);
      }
    }
  });
}

// What the screen needs of `exact`, for one group.
template <typename E>
void pack_screen(
    const E* exact, int64_t K, int64_t C, bool cosine, const Layout& layout, float* mean, uint32_t* screen,
    float* half_norms, float* bounds) {
  const int64_t classes = ceil_div(K, kClass), tiles = ceil_div(classes, layout.lanes), steps = layout.steps(C);
  const auto over_tiles = [&](const auto& task) {
    torch::stable::parallel_for(0, tiles, ceil_div(kPackedClasses, layout.lanes), [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) task(tile, std::min(layout.lanes, classes - tile * layout.lanes));
    });
  };

  // Any float near the mean will do: what matters is that rows and codes are centred by the same one. For cosine only
  // the codes are: that moves all scores of a row alike.
  std::vector<double> sums(tiles * C, 0.0), centre(C, 0.0);
  over_tiles([&](int64_t tile, int64_t lanes) {
    for (int64_t number = tile * layout.lanes; number < tile * layout.lanes + lanes; ++number) {
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
    for (int64_t number = tile * layout.lanes; number < tile * layout.lanes + lanes; ++number) {
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
    uint32_t* tile_screen = screen + tile * kClass * steps * layout.lanes;
    float* tile_norms = half_norms + tile * kClass * layout.lanes;
    std::fill_n(tile_screen, kClass * steps * layout.lanes, 0u);
    std::fill_n(tile_norms, kClass * layout.lanes, std::numeric_limits<float>::infinity());
    most[tile] = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t number = tile * layout.lanes + lane, members = std::min(kClass, K - number * kClass);
      double energy[kClass] = {}, lost[kClass] = {};
      for (int64_t c = 0; c < C; ++c) {
        const E* codes = exact + (number * C + c) * kClass;
        const int64_t step = layout.pairs ? c / 2 : c, shift = layout.pairs && c % 2 == 0 ? 16 : 0;
        for (int64_t k = 0; k < members; ++k) {
          const double value = (codes[k] - centre[c]) * scale;
          const uint32_t word = screen_word(static_cast<float>(value), layout.pairs);
          const double dropped = value - float_of(word);
          energy[k] += value * value;
          lost[k] += dropped * dropped;
          tile_screen[(k * steps + step) * layout.lanes + lane] |= word >> shift;
        }
      }
      for (int64_t k = 0; k < members; ++k) {
        tile_norms[k * layout.lanes + lane] = cosine ? 0.0f : static_cast<float>(energy[k] / 2);
        most[tile] = std::max(most[tile], lost[k]);
      }
    }
  });
  bounds[0] = static_cast<float>(scale);
  bounds[1] = static_cast<float>(longest * scale * kUp);
  bounds[2] = static_cast<float>(std::sqrt(*std::max_element(most.begin(), most.end())) * kUp);
  bounds[3] = cosine ? static_cast<float>(scale * kUp) : bounds[1];
}

Codebook group_of(const std::vector<Tensor>& parts, int64_t g, int64_t K, bool cosine) {
  const float* bounds = data<const float>(parts[4]) + 4 * g;
  const auto group = [g](const Tensor& part) {
    return data<const char>(part) + g * part.stride(0) * static_cast<int64_t>(part.element_size());
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
    const std::vector<Tensor>& parts, int64_t G, int64_t K, int64_t C, bool cosine, const Layout& layout) {
  HITSR_CHECK(parts.size() == kParts, "parts: expected ", kParts, " tensors, found ", parts.size());
  const auto shapes = part_shapes(G, K, C, layout);
  const auto dtypes = part_dtypes(cosine);
  for (int64_t i = 0; i < kParts; ++i) {
    check_cpu(parts[i], kPartNames[i]);
    check_contiguous(parts[i], kPartNames[i]);
    check_dtype(parts[i], dtypes[i], kPartNames[i]);
    check_shape(parts[i], shapes[i], kPartNames[i]);
  }
}

}  // namespace

std::vector<Tensor> pack(const Tensor& codebook, bool cosine, const std::string& isa) {
  check_cpu(codebook, "codebook");
  const Layout& layout = layout_of(isa);
  const int64_t G = codebook.size(0), K = codebook.size(1), C = codebook.size(2);
  const auto shapes = part_shapes(G, K, C, layout);
  const auto dtypes = part_dtypes(cosine);
  std::vector<Tensor> parts;
  for (int64_t i = 0; i < kParts; ++i) parts.push_back(empty(shapes[i], dtypes[i]));
  const Tensor given = in_a_row(codebook, codebook.scalar_type());
  visit_dtype(codebook, "codebook", [&](auto value) {
    using T = decltype(value);
    for (int64_t g = 0; g < G; ++g) {
      const Codebook group = group_of(parts, g, K, cosine);
      const auto pack_group = [&](auto* exact) {
        pack_exact(data<const T>(given) + g * K * C, K, C, cosine, exact);
        pack_screen(
            exact, K, C, cosine, layout, const_cast<float*>(group.mean),
            static_cast<uint32_t*>(const_cast<void*>(group.screen)), const_cast<float*>(group.half_norms),
            data<float>(parts[4]) + 4 * g);
      };
      void* exact = const_cast<void*>(group.exact);
      cosine ? pack_group(static_cast<double*>(exact)) : pack_group(static_cast<float*>(exact));
    }
  });
  return parts;
}

std::vector<Codebook> codebooks(
    const std::vector<Tensor>& parts, int64_t G, int64_t K, int64_t C, bool cosine, const std::string& isa) {
  check_parts(parts, G, K, C, cosine, layout_of(isa));
  std::vector<Codebook> books;
  for (int64_t g = 0; g < G; ++g) books.push_back(group_of(parts, g, K, cosine));
  return books;
}

template <typename T>
std::unique_ptr<Searcher<T>> make_searcher(const std::string& isa, const Codebook& book, int64_t rows) {
  return std::unique_ptr<Searcher<T>>(HITSR_SELECT(isa, kKernels<T>).make_searcher(book, rows));
}

template std::unique_ptr<Searcher<float>> make_searcher(const std::string&, const Codebook&, int64_t);

int64_t count_full_scans(int64_t more) {
  static std::atomic<int64_t> total{0};
  return total += more;
}

namespace {

// maps: (G, B, H, W, C), of any strides; parts: of a codebook packed for the same isa. Returns (G, B * H * W).
Tensor nearest_code_search(
    const Tensor& maps, const std::vector<Tensor>& parts, int64_t K, bool cosine, const std::string& isa) {
  check_cpu(maps, "maps");
  HITSR_CHECK(maps.dim() == 5, "maps: expected shape (G, B, H, W, C), found ", maps.sizes());
  const int64_t G = maps.size(0), height = maps.size(2), width = maps.size(3), N = maps.size(1) * height * width;
  const auto books = codebooks(parts, G, K, maps.size(4), cosine, isa);
  Tensor indices = empty({G, N}, ScalarType::Long);
  if (N == 0) return indices;
  visit_dtype(maps, "maps", [&](auto value) {
    using T = decltype(value);
    const Rows<T> first_group{
        data<const T>(maps), height, width, maps.stride(1), maps.stride(2), maps.stride(3), maps.stride(4)};
    const int64_t group_stride = maps.stride(0);
    torch::stable::parallel_for(0, G * N, kSmallestShare, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last;) {
        const int64_t g = row / N, begin = row % N, end = std::min(N, begin + last - row);
        Rows<T> rows = first_group;
        rows.data += g * group_stride;
        const auto searcher = make_searcher<T>(isa, books[g], end - begin);
        count_full_scans(searcher->search(rows, begin, end, data<int64_t>(indices) + row));
        row += end - begin;
      }
    });
  });
  return indices;
}

int64_t nearest_code_full_scans() { return count_full_scans(0); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(library, "_nearest_code_full_scans() -> int", TORCH_BOX(&nearest_code_full_scans));
  define(library, "_nearest_code_pack(Tensor codebook, bool cosine, str isa) -> Tensor[]", TORCH_BOX(&pack));
  define(
      library, "_nearest_code_search(Tensor maps, Tensor[] parts, int K, bool cosine, str isa) -> Tensor",
      TORCH_BOX(&nearest_code_search));
}

}  // namespace hitsr_fast::nearest
