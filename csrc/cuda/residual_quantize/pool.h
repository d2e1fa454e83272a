// Area averages: from the residual to the rows that are searched, from the reconstruction to the next scale's input;
// and the ways in and out of a block's memory.
#pragma once

#include "lanes.h"

namespace hitsr_fast::residual {

// The places that token (y, x) of a scale averages: [top, bottom) x [left, right) of the map.
struct Window {
  int top, bottom, left, right;
};

HITSR_DEVICE Window window_of(int y, int x, Scale scale, int height, int width) {
  return {
      y * height / scale.height,
      ((y + 1) * height + scale.height - 1) / scale.height,
      x * width / scale.width,
      ((x + 1) * width + scale.width - 1) / scale.width};
}

// Mean of one channel over a window: `map` starts at that channel of row `first`, with `pitch` floats to a place.
HITSR_DEVICE float mean_over(const float* map, Window window, int first, int width, int pitch) {
  float sum = 0;
  for (int y = window.top; y < window.bottom; ++y) {
    const float* place = map + ((y - first) * width + window.left) * pitch;
    for (int x = window.left; x < window.right; ++x, place += pitch) sum += *place;
  }
  return sum / static_cast<float>((window.bottom - window.top) * (window.right - window.left));
}

template <int C, class Block>
HITSR_DEVICE void load_residual(Block& block, const Arguments& args, const Part& part) {
  const int plane = args.height * args.width, own = part.rows * args.width;
  const float* z = args.z + size_t(part.image) * C * plane + part.top * args.width;
  for (int i = block.thread(); i < C * own; i += block.threads()) {
    const int channel = i / own, place = i % own;
    part.residual[place * (C + 1) + channel] = z[size_t(channel) * plane + place];
  }
}

// Averages of the reconstruction for the tokens of this part at scale s, which follows the one just added.
template <int C, class Block>
HITSR_DEVICE void store_inputs(Block& block, const Arguments& args, const Part& part, int s, int start) {
  using Lane = Lanes<C>;
  const Scale scale = args.scales[s];
  const int first = part.top * scale.height / args.height * scale.width;
  const int count = part.rows * scale.height / args.height * scale.width;
  const int skipped = args.scales[0].height * args.scales[0].width;
  float* inputs = args.inputs + (size_t(part.image) * (args.tokens - skipped) + start - skipped) * C;
  for (int i = block.thread() / Lane::kGroup; i < count; i += block.threads() / Lane::kGroup) {
    const int token = first + i;
    const Window window =
        window_of(token / scale.width, token % scale.width, scale, args.height, args.width);
    for (int channel = block.thread() % Lane::kGroup; channel < C; channel += Lane::kGroup) {
      inputs[size_t(token) * C + channel] =
          mean_over(part.reconstruction + channel, window, part.top, args.width, C);
    }
  }
}

// The reconstruction after scale s, channel by channel.
template <int C, class Block>
HITSR_DEVICE void store_reconstruction(Block& block, const Arguments& args, const Part& part, int s) {
  const int plane = args.height * args.width, own = part.rows * args.width;
  float* out = args.reconstructions + (size_t(s) * args.batch + part.image) * C * plane + part.top * args.width;
  for (int i = block.thread(); i < C * own; i += block.threads()) {
    const int channel = i / own, place = i % own;
    out[size_t(channel) * plane + place] = part.reconstruction[place * C + channel];
  }
}

// Turns the reconstruction from places to channels, in place: all blocks of an image read before any writes. The
// residual is not needed any more and lends its memory.
template <int C, class Block>
HITSR_DEVICE void finish(Block& block, const Arguments& args, const Part& part) {
  const int plane = args.height * args.width, own = part.rows * args.width;
  for (int i = block.thread(); i < C * own; i += block.threads()) {
    part.residual[i / C * (C + 1) + i % C] = part.reconstruction[i];
  }
  block.sync_cluster();
  float* out = args.reconstruction + size_t(part.image) * C * plane + part.top * args.width;
  for (int i = block.thread(); i < C * own; i += block.threads()) {
    const int channel = i / own, place = i % own;
    out[size_t(channel) * plane + place] = part.residual[place * (C + 1) + channel];
  }
}

}  // namespace hitsr_fast::residual
