// What the residual quantizer's kernel is given, and how it lays out its shared memory.
#pragma once

#include "../../block/block.h"

namespace hitsr_fast::residual {

constexpr int kMaxScales = 32;
constexpr int kMaxThreads = 256;
constexpr int kTile = 128;     // codes of a tile of the packed codebook
constexpr int kClasses = 4;    // of a tile
constexpr int kMembers = 32;   // codes of a class
constexpr int kRows = 32;      // rows that a warp screens at once
constexpr int kTogether = 4;   // rows that a warp re-checks at once
constexpr int kPixels = 16;    // neighbours of a row of the map that one thread convolves
constexpr int kMaxStrip = 8;   // rows of the map that are convolved between two barriers

constexpr bool has_channels(int channels) {
  return channels == 8 || channels == 16 || channels == 32 || channels == 64;
}

struct Scale {
  int height, width, phi;
};

// Pointers are to contiguous tensors. T0 is the number of tokens in `replay`.
struct Arguments {
  const float* z;                // (B, C, H, W); null to decode `replay`, which then has all tokens
  const float* codebook;         // (K, C)
  const float* mean;             // (C): this and the next four as hitsr_fast/ops/nearest_code_triton.py packs them
  const block::Word4* codes;     // (128 tiles, CP) float16
  const block::Float4* half_norms;  // (32 tiles): four each
  const block::Float4* exact;    // (4 tiles, C, 32)
  const float* bounds;           // (5)
  const block::Float4* weight;   // (P, 9, C / 4, C, 4): of a tap, four input channels of each output channel
  const float* bias;             // (P, C)
  const int64_t* replay;         // (B, T0)
  int64_t* indices;              // (B, T)
  float* reconstruction;         // (B, C, H, W)
  float* inputs;                 // (B, T - h0 w0, C), or null
  float* reconstructions;        // (S, B, C, H, W), or null
  // For tests, or null: the rows (B, T, C) that were searched, and where (B, T) the screen could not decide.
  float* rows;
  uint8_t* full_scans;
  int batch, height, width, size, tiles, tokens, replayed, num_scales, strip;
  float ratio;
  Scale scales[kMaxScales];
};

// Four taps of a bicubic filter, of which `first` may lie outside.
struct Taps {
  float weight[4];
  int first;
};

// Byte offsets in shared memory. `gap` bytes of nothing lie between the parts.
struct Layout {
  size_t work, residual, tokens, taps, bytes;
};

// Parts that only one stage uses share `work`: the search's (screen.h, recheck.h) and the ring of rows (spread.h).
HITSR_BOTH Layout layout_of(
    int channels, int height, int width, int ranks, int threads, int strip, int most_tokens, size_t gap = 0) {
  const auto padded = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
  const auto most = [](size_t a, size_t b) { return a > b ? a : b; };
  const size_t C = channels, CP = channels < 16 ? 16 : channels, warps = threads / block::kWarp;
  const size_t own = size_t(height) * width / ranks;
  const size_t tiles = 2 * kTile * (CP * 2 + 4), rounded = warps * kRows * CP * 2;
  const size_t recheck = warps * (kRows * 8 * sizeof(int) + kTogether * (C + 4) * sizeof(float));
  const size_t pitch = (width + kPixels - 1) / kPixels * kPixels + 2;
  Layout layout;
  layout.work = gap;
  layout.residual =
      layout.work + most(most(tiles, rounded), most(recheck, (strip + 2) * pitch * C * sizeof(float))) + gap;
  layout.tokens = layout.residual + padded(own * (C + 1) * sizeof(float)) + gap;
  layout.taps = layout.tokens + padded(size_t(ranks) * most_tokens * sizeof(int)) + gap;
  layout.bytes = layout.taps + padded(size_t(height + width) * sizeof(Taps)) + gap;
  return layout;
}

// Blocks of a cluster that share an image, and rows of a strip; ranks 0 where nothing fits.
struct Plan {
  int ranks, strip;
  size_t bytes;
};

// Two blocks where a cluster can have them and no window of the pooling lies in both; one else.
inline Plan plan_for(
    int channels, int height, int width, const Scale* scales, int num_scales, int threads, int max_ranks,
    size_t limit) {
  int most_tokens = 0;
  bool even = height % 2 == 0;
  for (int s = 0; s < num_scales; ++s) {
    const int tokens = scales[s].height * scales[s].width;
    most_tokens = tokens > most_tokens ? tokens : most_tokens;
    even = even && scales[s].height % 2 == 0;
  }
  const int lanes = channels < block::kWarp ? channels : block::kWarp;
  const int segments = (width + kPixels - 1) / kPixels;
  for (int ranks = even && max_ranks > 1 ? 2 : 1; ranks > 0; --ranks) {
    // Enough rows to keep every thread busy, or as many as fit.
    int strip = threads / lanes / segments;
    strip = strip < kMaxStrip ? strip : kMaxStrip;
    strip = strip < height / ranks ? strip : height / ranks;
    for (strip = strip > 1 ? strip : 1; strip > 0; --strip) {
      const size_t bytes = layout_of(channels, height, width, ranks, threads, strip, most_tokens).bytes;
      if (bytes <= limit) return {ranks, strip, bytes};
    }
  }
  return {0, 0, 0};
}

}  // namespace hitsr_fast::residual
