// From the gradient of a map to that of a scale: the transposed bicubic of the gradient, shifted as a tap of phi shifts
// it. It goes down columns first, from global memory to a strip of token rows, then across, to a tile: of each token the
// C channels of three taps.
#pragma once

#include "arguments.h"

namespace hitsr_fast::residual_backward {

// The gradient that reaches each scale, from the last one up.
template <int C, int THREADS, class Block>
HITSR_DEVICE void add_up(Block& block, const Arguments& args, int number) {
  const size_t size = size_t(args.batch) * C * args.height * args.width;
  const size_t i = size_t(number) * THREADS + block.thread();
  if (i >= size) return;
  float sum = args.grad[i];
  for (int s = args.num_scales - 1; s >= 0; --s) {
    sum += args.grad_per_scale[s * size + i];
    args.reached[s * size + i] = sum;
  }
}

// Places [begin, end) of a map's side that a token is interpolated to.
struct Span {
  int begin, end;
};

// The filters of a map's rows and then of its columns, with what they take beyond the scale's edges added to its edges:
// all of their taps lie inside, if the scale has four tokens. And the spans of the scale's rows and columns.
struct Tables {
  Taps* filters;
  Span* spans;
};

// How many of the filters of a side begin before a token. They are in order.
HITSR_DEVICE int beginning_before(const Taps* filters, int count, int token) {
  int low = 0;
  while (low < count) {
    const int middle = (low + count) / 2;
    if (filters[middle].first < token) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

template <class Block>
HITSR_DEVICE void fill_tables(Block& block, const Arguments& args, Scale scale, const Tables& tables) {
  for (int i = block.thread(); i < args.height + args.width; i += block.threads()) {
    const bool down = i < args.height;
    const int tokens = down ? scale.height : scale.width;
    const Taps taps =
        down ? residual::taps_of(i, tokens, args.height) : residual::taps_of(i - args.height, tokens, args.width);
    Taps& filter = tables.filters[i];
    const int last = tokens < 4 ? 0 : tokens - 4;
    filter.first = taps.first < 0 ? 0 : taps.first < last ? taps.first : last;
    HITSR_UNROLL
    for (int tap = 0; tap < 4; ++tap) filter.weight[tap] = 0;
    HITSR_UNROLL
    for (int tap = 0; tap < 4; ++tap) {
      filter.weight[residual::clamped(taps.first + tap, tokens) - filter.first] += taps.weight[tap];
    }
  }
  block.sync();
  for (int i = block.thread(); i < scale.height + scale.width; i += block.threads()) {
    const bool down = i < scale.height;
    const int token = down ? i : i - scale.height, places = down ? args.height : args.width;
    const Taps* filters = tables.filters + (down ? 0 : args.height);
    tables.spans[i] = {beginning_before(filters, places, token - 3), beginning_before(filters, places, token + 1)};
  }
  block.sync();
}

HITSR_DEVICE float weight_at(const Taps* filters, Span span, int token, int place) {
  return place < span.begin || place >= span.end ? 0.f : filters[place].weight[token - filters[place].first];
}

// Tokens of a scale of one image: rows [top, top + rows) and columns [side, side + columns), `count` in all; and the
// map's columns [left, right) that they see.
struct Tile {
  int image, top, side, columns, count, left, right;

  HITSR_DEVICE int token(int i, int width) const { return (top + i / columns) * width + side + i % columns; }
};

HITSR_DEVICE Tile tile_of(const Arguments& args, const Part& part, const Tables& tables, int number) {
  const int across = ceil_div(part.scale.width, part.columns), within = number % part.tiles;
  Tile tile;
  tile.image = number / part.tiles;
  tile.top = within / across * part.rows;
  tile.side = within % across * part.columns;
  const int down = part.scale.height - tile.top, along = part.scale.width - tile.side;
  tile.columns = along < part.columns ? along : part.columns;
  tile.count = (down < part.rows ? down : part.rows) * tile.columns;
  const Span* spans = tables.spans + part.scale.height + tile.side;
  const int left = spans[0].begin - 1, right = spans[tile.columns - 1].end + 1;
  tile.left = left > 0 ? left : 0;
  tile.right = right < args.width ? right : args.width;
  return tile;
}

// The strip: (tile's rows, right - left, C and pad). `map` is an image's gradient, shifted down by `shift`, zero beyond.
template <int C, class Block>
HITSR_DEVICE void shrink_down(
    Block& block, const Arguments& args, const Tables& tables, const Tile& tile, const float* map, int shift,
    float* strip) {
  const int width = tile.right - tile.left, plane = args.height * args.width;
  for (int item = block.thread(); item < tile.count / tile.columns * (C / 4) * width; item += block.threads()) {
    const int x = item % width, row = item / width / (C / 4), token = tile.top + row;
    const int channel = item / width % (C / 4) * 4;
    const Span span = tables.spans[token];
    const int begin = span.begin > shift ? span.begin : shift;
    const int end = span.end < args.height + shift ? span.end : args.height + shift;
    const float* place = map + size_t(channel) * plane + (begin - shift) * args.width + tile.left + x;
    block::Float4 sum = {};
    HITSR_UNROLL_BY(2)
    for (int y = begin; y < end; ++y, place += args.width) {
      const float weight = tables.filters[y].weight[token - tables.filters[y].first];
      HITSR_UNROLL
      for (int i = 0; i < 4; ++i) sum.value[i] = fmaf(weight, place[size_t(i) * plane], sum.value[i]);
    }
    *reinterpret_cast<block::Float4*>(strip + (row * width + x) * (C + kPad) + channel) = sum;
  }
}

// The tile: of each token 3 C values and pad, for the taps of a row from left to right.
template <int C, class Block>
HITSR_DEVICE void shrink_across(
    Block& block, const Arguments& args, const Part& part, const Tables& tables, const Tile& tile,
    const float* strip, float* values) {
  const int width = tile.right - tile.left;
  const Taps* filters = tables.filters + args.height;
  for (int item = block.thread(); item < tile.count * (C / 4); item += block.threads()) {
    const int quad = item % (C / 4), i = item / (C / 4), token = tile.side + i % tile.columns;
    const Span span = tables.spans[part.scale.height + token];
    const float* row = strip + (i / tile.columns * width - tile.left) * (C + kPad) + quad * 4;
    block::Float4 sums[3] = {};
    // Of the places x - 1, x, x + 1: tap t takes to place x + t - 1 what the map has at x.
    float weights[3] = {0, 0, weight_at(filters, span, token, span.begin)};
    HITSR_UNROLL_BY(1)
    for (int x = span.begin - 1; x <= span.end; ++x) {
      if (x >= 0 && x < args.width) {
        const block::Float4 value = *reinterpret_cast<const block::Float4*>(row + x * (C + kPad));
        HITSR_UNROLL
        for (int tap = 0; tap < 3; ++tap) {
          HITSR_UNROLL
          for (int c = 0; c < 4; ++c) sums[tap].value[c] = fmaf(weights[tap], value.value[c], sums[tap].value[c]);
        }
      }
      weights[0] = weights[1];
      weights[1] = weights[2];
      weights[2] = weight_at(filters, span, token, x + 2);
    }
    HITSR_UNROLL
    for (int tap = 0; tap < 3; ++tap) {
      *reinterpret_cast<block::Float4*>(values + i * pitch_of(C) + tap * C + quad * 4) = sums[tap];
    }
  }
}

}  // namespace hitsr_fast::residual_backward
