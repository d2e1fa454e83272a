// Gradients of the tokens of a scale, and their share of phi's.
//
// phi and the bicubic are linear, so the gradient of a tap of phi needs the map's gradient at the scale's own size
// alone: with D the tile (shrink.h), the token's gradient is (1 - r) D_centre + r * sum of W_tap^T D_tap, and tap's is
// r * sum over tokens of D_tap code^T. A block does that for a row of taps, and keeps its share of theirs in registers.
#pragma once

#include "../residual_quantize/lanes.h"
#include "shrink.h"

namespace hitsr_fast::residual_backward {

// A thread's part of the gradients of three taps, (3, C, C), and of the bias: OUT output by IN input channels. Where
// channels are few, `kParts` threads share each of them, over the tokens.
template <int C, int THREADS>
struct Share {
  static constexpr int kPairs = C * C > THREADS ? C * C / THREADS : 1;
  static constexpr int kIn = kPairs < 4 ? kPairs : 4, kOut = kPairs / kIn;
  static constexpr int kAcross = C / kIn, kParts = shares_of(C, THREADS), kSize = share_size(C);
  static_assert(kParts * kAcross * (C / kOut) == THREADS);

  float taps[3][kOut][kIn] = {};
  float bias[kOut] = {};
};

template <int COUNT>
HITSR_DEVICE void load(const float* from, float (&to)[COUNT]) {
  if constexpr (COUNT % 4 == 0) {
    HITSR_UNROLL
    for (int i = 0; i < COUNT; i += 4) {
      const block::Float4 four = *reinterpret_cast<const block::Float4*>(from + i);
      HITSR_UNROLL
      for (int j = 0; j < 4; ++j) to[i + j] = four.value[j];
    }
  } else {
    HITSR_UNROLL
    for (int i = 0; i < COUNT; ++i) to[i] = from[i];
  }
}

// Adds a tile's products with its codes to the gradients of the taps.
template <int C, int THREADS, class Block>
HITSR_DEVICE void add_products(
    Block& block, const float* values, const float* codes, int count, Share<C, THREADS>& share) {
  using Own = Share<C, THREADS>;
  const int pair = block.thread() % (THREADS / Own::kParts), part = block.thread() / (THREADS / Own::kParts);
  const float* out = values + pair / Own::kAcross * Own::kOut;
  const float* in = codes + pair % Own::kAcross * Own::kIn;
  HITSR_UNROLL_BY(C < 64 ? 2 : 1)
  for (int i = part; i < count; i += Own::kParts) {
    float code[Own::kIn];
    load(in + i * C, code);
    HITSR_UNROLL
    for (int tap = 0; tap < 3; ++tap) {
      float value[Own::kOut];
      load(out + i * pitch_of(C) + tap * C, value);
      HITSR_UNROLL
      for (int o = 0; o < Own::kOut; ++o) {
        if (tap == 1) share.bias[o] += value[o];
        HITSR_UNROLL
        for (int c = 0; c < Own::kIn; ++c) {
          share.taps[tap][o][c] = fmaf(value[o], code[c], share.taps[tap][o][c]);
        }
      }
    }
  }
}

// Leaves a block's gradients of the taps: (3, C, C), then (C).
template <int C, int THREADS, class Block>
HITSR_DEVICE void store_share(Block& block, const Arguments& args, int number, const Share<C, THREADS>& share) {
  using Own = Share<C, THREADS>;
  const int pair = block.thread() % (THREADS / Own::kParts), part = block.thread() / (THREADS / Own::kParts);
  const int out = pair / Own::kAcross * Own::kOut, in = pair % Own::kAcross * Own::kIn;
  float* to = args.partials + (size_t(number) * Own::kParts + part) * Own::kSize;
  HITSR_UNROLL
  for (int o = 0; o < Own::kOut; ++o) {
    HITSR_UNROLL
    for (int tap = 0; tap < 3; ++tap) {
      HITSR_UNROLL
      for (int c = 0; c < Own::kIn; ++c) to[(tap * C + out + o) * C + in + c] = share.taps[tap][o][c];
    }
    if (in == 0) to[3 * C * C + out + o] = share.bias[o];
  }
}

// The gradients of a tile's tokens through a row of taps, to global memory.
template <int C, int THREADS, class Block>
HITSR_DEVICE void store_rows(
    Block& block, const Arguments& args, const Part& part, const Tile& tile, int tap_row, const float* values) {
  using Lane = residual::Lanes<C>;
  constexpr int kGroups = THREADS / Lane::kGroup, kEach = Lane::kEach, kTokens = kTile / kGroups;
  const int group = block.thread() / Lane::kGroup, channel = block.thread() % Lane::kGroup;
  const bool phi = args.ratio != 0, centre = !phi || tap_row == 1;
  float sums[kTokens][kEach] = {};
  if (phi) {
    const block::Float4* weight = args.weight + (size_t(part.scale.phi) * 3 + tap_row) * (3 * C / 4) * C + channel;
    HITSR_UNROLL_BY(1)
    for (int quad = 0; quad < 3 * C / 4; ++quad, weight += C) {
      block::Float4 taps[kEach];
      HITSR_UNROLL
      for (int each = 0; each < kEach; ++each) taps[each] = weight[each * Lane::kGroup];
      HITSR_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        const auto value =
            *reinterpret_cast<const block::Float4*>(values + (group + i * kGroups) * pitch_of(C) + quad * 4);
        HITSR_UNROLL
        for (int each = 0; each < kEach; ++each) {
          HITSR_UNROLL
          for (int c = 0; c < 4; ++c) {
            sums[i][each] = fmaf(taps[each].value[c], value.value[c], sums[i][each]);
          }
        }
      }
    }
  }
  const size_t slice = phi ? size_t(tap_row) * args.batch * args.tokens : 0;
  const size_t first = slice + size_t(tile.image) * args.tokens + part.start;
  HITSR_UNROLL
  for (int i = 0; i < kTokens; ++i) {
    const int own = group + i * kGroups;
    if (own >= tile.count) continue;
    float* row = args.rows + (first + tile.token(own, part.scale.width)) * C;
    HITSR_UNROLL
    for (int each = 0; each < kEach; ++each) {
      const int c = channel + each * Lane::kGroup;
      const float rest = centre ? (1 - args.ratio) * values[own * pitch_of(C) + C + c] : 0.f;
      row[c] = fmaf(args.ratio, sums[i][each], rest);
    }
  }
}

template <int C, class Block>
HITSR_DEVICE void load_codes(
    Block& block, const Arguments& args, const Part& part, const Tile& tile, float* codes) {
  const int64_t* indices = args.indices + size_t(tile.image) * args.tokens + part.start;
  for (int i = block.thread(); i < tile.count * C; i += block.threads()) {
    codes[i] = args.codebook[static_cast<size_t>(indices[tile.token(i / C, part.scale.width)]) * C + i % C];
  }
}

// Block `number` of all: some tiles of one scale, through one row of taps.
template <int C, int THREADS, class Block>
HITSR_DEVICE void token_gradients(Block& block, const Arguments& args, int number) {
  const Layout layout = layout_of(args, C, Block::kGap);
  unsigned char* const shared = block.shared();
  const Tables tables{
      reinterpret_cast<Taps*>(shared + layout.filters), reinterpret_cast<Span*>(shared + layout.spans)};
  float* const strip = reinterpret_cast<float*>(shared + layout.strip);
  float* const codes = reinterpret_cast<float*>(shared + layout.codes);
  float* const values = reinterpret_cast<float*>(shared + layout.tile);
  int s = 0;
  while (s + 1 < args.num_scales && number >= args.parts[s + 1].first) ++s;
  const Part& part = args.parts[s];
  const int own = number - part.first, tap_row = args.tap_rows == 3 ? own / part.blocks : 1;
  const size_t map = size_t(C) * args.height * args.width;
  const float* grad = args.reached == nullptr ? args.grad : args.reached + s * args.batch * map;
  fill_tables(block, args, part.scale, tables);
  Share<C, THREADS> share;
  const int begin = own % part.blocks * args.work, all = part.tiles * args.batch;
  const int end = begin + args.work < all ? begin + args.work : all;
  for (int work = begin; work < end; ++work) {
    const Tile tile = tile_of(args, part, tables, work);
    if (args.ratio != 0) load_codes<C>(block, args, part, tile, codes);
    shrink_down<C>(block, args, tables, tile, grad + tile.image * map, tap_row - 1, strip);
    block.sync();
    shrink_across<C>(block, args, part, tables, tile, strip, values);
    block.sync();
    store_rows<C, THREADS>(block, args, part, tile, tap_row, values);
    if (args.ratio != 0) add_products<C, THREADS>(block, values, codes, tile.count, share);
    block.sync();
  }
  if (args.ratio != 0) store_share<C, THREADS>(block, args, number, share);
}

}  // namespace hitsr_fast::residual_backward
