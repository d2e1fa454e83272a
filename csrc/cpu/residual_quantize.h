// What the parts of the CPU backend of the residual quantizer share.
#pragma once

#include <cstdint>

namespace hitsr_fast::residual {

// Maps lie with channels last: [height][stride][channels_stride]. The strides are padded to whole register tiles and
// vectors; what pads a row of a map is never read as part of it, and what pads channels is zero.
struct Geometry {
  int64_t height, width, channels;
  int64_t stride, channels_stride;
};

// Four taps for each place of a finer grid: bicubic, a = -0.75, half-pixel centres, edges repeated.
struct Taps {
  const int* place;     // [out][4]
  const float* weight;  // [out][4]
};

// One scale of the pyramid.
struct Scale {
  int64_t height, width, start;  // its tokens are [start, start + height * width) of an image's
  Taps y, x;                     // to the size of the map; not used along a side that has that size already
  const float* phi_weight;       // [3 * 3][C][channels_stride], the identity included; null: there is no phi
  const float* phi_bias;         // [channels_stride]
};

// Memory of one thread, for bands of a map.
struct Band {
  float* codes;     // [width of a scale][channels_stride]
  float* across;    // [height of a scale][stride][channels_stride]: codes, spread along x
  float* smoothed;  // [kBandRows + 2][stride + 2][channels_stride]: and along y, with a frame of zeros
};

constexpr int64_t kBandRows = 8;

// Rows of maps that a band is made of are `stride` wide; this many places are worked on at a time.
constexpr int64_t kPlacesAtATime = 8;

#define HITSR_RESIDUAL_KERNELS(isa)                                                                                   \
  namespace isa {                                                                                                     \
  /* Mean of the places of a map that each token [begin, end) of a grid covers, [end - begin][channels_stride]. */    \
  void pool(                                                                                                          \
      const Geometry&, const float* map, int64_t height, int64_t width, int64_t begin, int64_t end, float* rows);     \
  /* Spread an image's codes over rows [begin, end) of the map: add to `reconstruction`, take from `residual`, if */  \
  /* there is one. codes: [K][channels]. */                                                                           \
  void spread(                                                                                                        \
      const Geometry&, const Scale&, const float* codebook, const int64_t* indices, int64_t begin, int64_t end,       \
      const Band&, float* reconstruction, float* residual);                                                           \
  }
HITSR_RESIDUAL_KERNELS(portable)
#if defined(__x86_64__)
HITSR_RESIDUAL_KERNELS(avx2)
HITSR_RESIDUAL_KERNELS(avx512)
#endif
#undef HITSR_RESIDUAL_KERNELS

}  // namespace hitsr_fast::residual
