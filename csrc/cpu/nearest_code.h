// What the parts of the CPU backend of nearest_code share. docs/ops/nearest_code.md derives the bounds.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

namespace hitsr_fast::nearest {

// Codes that are screened and re-checked together: a class. The exact layout is [class][C][kClass].
constexpr int64_t kClass = 16;

// Screen steps of AMX: a tile register holds this many pairs of channels. More channels come in whole tiles.
constexpr int64_t kTileSteps = 16;
constexpr int64_t tile_steps(int64_t channels) {
  const int64_t steps = (channels + 1) / 2;
  return steps <= kTileSteps ? steps : (steps + kTileSteps - 1) / kTileSteps * kTileSteps;
}

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

// For up to `rows` rows at a time as fits; the caller owns it, and the codebook must outlive it.
#define HITSR_NEAREST_SEARCHER(isa)                            \
  namespace isa {                                              \
  template <typename T>                                        \
  Searcher<T>* make_searcher(const Codebook&, int64_t rows);   \
  }
HITSR_NEAREST_SEARCHER(portable)
#if defined(__x86_64__)
HITSR_NEAREST_SEARCHER(avx2)
HITSR_NEAREST_SEARCHER(avx512)
HITSR_NEAREST_SEARCHER(avx512_bf16)
HITSR_NEAREST_SEARCHER(amx_bf16)
#endif
#undef HITSR_NEAREST_SEARCHER

}  // namespace hitsr_fast::nearest
