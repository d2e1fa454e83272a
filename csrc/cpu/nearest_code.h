// Packed codebooks of the CPU backend of nearest_code, and what searches them. docs/ops/nearest_code.md derives the
// bounds.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "tensor.h"

namespace hitsr_fast::nearest {

// Codes that are screened and re-checked together: a class. The exact layout is [class][C][kClass].
constexpr int64_t kClass = 16;

// A codebook of one group, packed for one instruction set.
//
// Screen layout: a tile holds kClass * lanes codes, block b of it one code of each of `lanes` neighbouring classes.
// Lane l of block b of tile t is thus code (t * lanes + l) * kClass + b, and the minimum over the blocks of a tile
// is, lane by lane, the minimum over classes of consecutive codes.
struct Codebook {
  int64_t codes;    // K
  int64_t channels; // C
  int64_t tiles;
  bool cosine;
  const float* mean;        // [C], taken off the rows before the screen; 0 for cosine
  const void* screen;       // [tiles][kClass][steps][lanes] of float, or of pairs of bfloat16
  const float* half_norms;  // [tiles][kClass][lanes]: |e|^2 / 2, infinite for padding; 0 for cosine
  const void* exact;        // [ceil(K / kClass)][C][kClass]: float as given, or double unit vectors for cosine
  float scale;              // power of two that brings centred values to the order of one
  float longest;            // E:  at least the length of every centred, scaled code
  float longest_error;      // EL: at least the length of what the screen's number format drops of a code
  float longest_given;      // at least the length of every scaled code before centring, for the cosine's own rounding
};

// Rows of one group: the positions of maps of `height` by `width`, one map after the other, row-major. Strides are of
// maps, of the two sides of a map, and of channels.
template <typename T>
struct Rows {
  const T* data;
  int64_t height, width, map_stride, y_stride, x_stride, channel_stride;
};

// Searches rows of one group, time and again, without allocating anything. Not for two threads at once.
template <typename T>
class Searcher {
 public:
  virtual ~Searcher() = default;

  // Indices of rows [begin, end), to `indices`. Returns how many the screen could not decide, so that they were searched
  // through the whole codebook.
  virtual int64_t search(const Rows<T>& rows, int64_t begin, int64_t end, int64_t* indices) = 0;
};

// The parts of a codebook (G, K, C) of float16, bfloat16 or float32, packed for an instruction set.
std::vector<Tensor> pack(const Tensor& codebook, bool cosine, const std::string& isa);

// The same as each group's Codebook, which points into the parts. Throws if they were not made for such a codebook:
// they would be read out of bounds.
std::vector<Codebook> codebooks(
    const std::vector<Tensor>& parts, int64_t G, int64_t K, int64_t C, bool cosine, const std::string& isa);

// For up to `rows` rows at a time as fits. The codebook must outlive it.
template <typename T>
std::unique_ptr<Searcher<T>> make_searcher(const std::string& isa, const Codebook& book, int64_t rows);

// Add to the count of rows that were searched in full, since the process began; what it is then.
int64_t count_full_scans(int64_t more);

}  // namespace hitsr_fast::nearest
