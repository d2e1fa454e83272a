// What the kernels of the residual quantizer's gradient are given, how the work is cut, and how a block lays out its
// shared memory. How it is cut depends on shapes alone, so that results do, too.
#pragma once

#include "../residual_quantize/spread.h"

namespace hitsr_fast::residual_backward {

using residual::kMaxScales;
using residual::Scale;
using residual::Taps;

constexpr int kThreads = 256;
constexpr int kTile = 64;       // most tokens whose gradients a block makes at once
constexpr int kStrip = 6144;    // most floats of a tile's strip: token rows of map columns
constexpr int kMaxSides = 320;  // of a map, height and width together, and of a scale
constexpr int kBlocks = 768;    // about as many share the tiles of all scales: a few for each multiprocessor
constexpr int kChunk = 64;      // sorted tokens that a group of threads sums
constexpr int kPad = 4;         // floats after each place of a strip and of a tile, so that neighbours share no bank

// A scale, and its share of the work. `rows` x `columns` tokens are a tile, of which an image has `tiles`. Each row of
// phi's taps has `blocks` blocks, the first row from block `first` on.
struct Part {
  Scale scale;
  int start;  // tokens of the scales before
  int rows, columns, tiles, blocks, first;
};

// Pointers are to contiguous tensors. N = B T.
struct Arguments {
  const float* grad;            // (B, C, H, W)
  const float* grad_per_scale;  // (S, B, C, H, W), or null
  const int64_t* indices;       // (B, T)
  const int32_t* codes;         // (N): the same, sorted
  const int64_t* order;         // (N): where each of them was
  const float* codebook;        // (K, C)
  const block::Float4* weight;  // (P, 9, C / 4, C, 4): of a tap, four output channels of each input channel
  float* grad_codebook;         // (K, C), zeros
  float* grad_weight;           // (P, C, C, 3, 3)
  float* grad_bias;             // (P, C)
  // What one kernel leaves for the next.
  float* reached;   // (S, B, C, H, W): the gradient that reaches each scale; null where all have `grad`
  float* rows;      // (tap_rows, N, C): of the tokens, through a row of phi's taps
  float* edges;     // (2, chunks, C): of the run of codes that began before a chunk, of the one that goes on after it
  float* partials;  // (blocks, shares, 3 C C + C): of a row of phi's taps, and of the bias
  int batch, height, width, tokens, phis, num_scales;
  int tap_rows;  // 3, or the middle one alone where phi is not used
  int blocks, work, strip;  // of all scales; tiles of each block; most floats of a strip
  float ratio;
  Part parts[kMaxScales];
};

HITSR_BOTH int ceil_div(int count, int size) { return (count + size - 1) / size; }
HITSR_BOTH int chunks_of(const Arguments& args) { return ceil_div(args.batch * args.tokens, kChunk); }

// Whether there is room for a row of a map, and for the filters of a map or the spans of a scale.
constexpr bool has_width(int channels, int64_t width) { return width * (channels + kPad) <= kStrip; }
constexpr bool has_sides(int64_t height, int64_t width) { return height + width <= kMaxSides; }

// Cuts the work; batch, height, width, num_scales, ratio and the scales of `parts` are given.
inline void plan(Arguments& args, int channels, int blocks = kBlocks) {
  const int row = args.width * (channels + kPad);
  args.tap_rows = args.ratio != 0 ? 3 : 1;
  int64_t tiles = 0;
  args.tokens = args.strip = args.blocks = 0;
  for (int s = 0; s < args.num_scales; ++s) {
    Part& part = args.parts[s];
    part.start = args.tokens;
    args.tokens += part.scale.height * part.scale.width;
    // As many tokens as fit, in tiles as equal as can be.
    part.columns = ceil_div(part.scale.width, ceil_div(part.scale.width, kTile));
    const int most = kTile / part.columns < kStrip / row ? kTile / part.columns : kStrip / row;
    part.rows = ceil_div(part.scale.height, ceil_div(part.scale.height, most));
    part.tiles = ceil_div(part.scale.height, part.rows) * ceil_div(part.scale.width, part.columns);
    args.strip = part.rows * row > args.strip ? part.rows * row : args.strip;
    tiles += int64_t(part.tiles) * args.batch * args.tap_rows;
  }
  args.work = static_cast<int>((tiles + blocks - 1) / blocks);
  for (int s = 0; s < args.num_scales; ++s) {
    Part& part = args.parts[s];
    part.first = args.blocks;
    part.blocks = args.work ? ceil_div(part.tiles * args.batch, args.work) : 0;
    args.blocks += part.blocks * args.tap_rows;
  }
}

// A block's share of phi's gradients, (3, C, C) and (C); and how many of them it leaves.
HITSR_BOTH constexpr int share_size(int channels) { return 3 * channels * channels + channels; }
HITSR_BOTH constexpr int shares_of(int channels, int threads) {
  return channels * channels < threads ? threads / (channels * channels) : 1;
}

// Floats of what the kernels leave for each other.
struct Workspace {
  int64_t reached, rows, edges, partials;
};

inline Workspace workspace_of(const Arguments& args, int channels, int threads, bool per_scale) {
  const int64_t map = int64_t(args.batch) * channels * args.height * args.width;
  return {
      per_scale ? map * args.num_scales : 0,
      int64_t(args.tap_rows) * args.batch * args.tokens * channels,
      int64_t(2) * chunks_of(args) * channels,
      args.ratio != 0 ? int64_t(args.blocks) * shares_of(channels, threads) * share_size(channels) : 0};
}

// Byte offsets in the shared memory of a block that makes gradients of tokens. `gap` bytes of nothing lie between.
struct Layout {
  size_t filters, spans, strip, codes, tile, bytes;
};

HITSR_BOTH constexpr int pitch_of(int channels) { return 3 * channels + kPad; }

HITSR_BOTH Layout layout_of(const Arguments& args, int channels, size_t gap = 0) {
  const auto padded = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
  int sides = 0;
  for (int s = 0; s < args.num_scales; ++s) {
    const int own = args.parts[s].scale.height + args.parts[s].scale.width;
    sides = own > sides ? own : sides;
  }
  Layout layout;
  layout.filters = gap;
  layout.spans = layout.filters + padded((args.height + args.width) * sizeof(Taps)) + gap;
  layout.strip = layout.spans + padded(sides * 2 * sizeof(int)) + gap;
  layout.codes = layout.strip + args.strip * sizeof(float) + gap;
  layout.tile = layout.codes + kTile * channels * sizeof(float) + gap;
  layout.bytes = layout.tile + kTile * pitch_of(channels) * sizeof(float) + gap;
  return layout;
}

// What a block may have on sm_86, sm_89 and sm_120; other chips have more.
constexpr size_t kLeastShared = 101376;
static_assert(
    kMaxSides * (sizeof(Taps) + 2 * sizeof(int)) + 2 * 16 + kStrip * sizeof(float) +
        kTile * (64 + pitch_of(64)) * sizeof(float) <= kLeastShared,
    "a call within the limits fits");

}  // namespace hitsr_fast::residual_backward
