// One scale's step: codes, interpolated to the size of the map, through phi, onto the reconstruction and off the
// residual.
//
// The interpolated map h is never stored whole: a ring of strip + 2 rows rolls over it, zero beyond the map's edges as
// the convolution pads it. A group of threads takes kPixels neighbours of a row, a thread one or two channels of them.
#pragma once

#include "lanes.h"

namespace hitsr_fast::residual {

// Bicubic filters (a = -0.75, half-pixel centres) from `from` to `to` places, in the arithmetic of torch's CPU kernel.
HITSR_DEVICE Taps taps_of(int place, int from, int to) {
  constexpr float a = -0.75f;
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  const float centre = scale * (static_cast<float>(place) + 0.5f) - 0.5f, whole = floorf(centre);
  const float t = centre - whole;
  const auto near = [](float x) { return ((a + 2) * x - (a + 3)) * x * x + 1; };
  const auto far = [](float x) { return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a; };
  return {{far(t + 1), near(t), near(1 - t), far(2 - t)}, static_cast<int>(whole) - 1};
}

HITSR_DEVICE int clamped(int value, int size) { return value < 0 ? 0 : value < size ? value : size - 1; }

template <class Block>
HITSR_DEVICE void fill_taps(Block& block, const Arguments& args, Scale scale, Taps* taps) {
  for (int i = block.thread(); i < args.height + args.width; i += block.threads()) {
    taps[i] = i < args.height ? taps_of(i, scale.height, args.height)
                              : taps_of(i - args.height, scale.width, args.width);
  }
}

// The ring of rows of h: row y of the map lies in slot (y + 1) % slots, its column x at place x + 1.
template <int C>
struct Ring {
  float* memory;
  int slots, pitch;

  HITSR_DEVICE float* row(int y) const { return memory + (y + 1) % slots * pitch * C; }
};

// One channel of a token column, interpolated to a row of the map.
template <int C>
HITSR_DEVICE float column_value(
    const Arguments& args, const Part& part, const Taps& taps, int column, int channel) {
  const int x = clamped(column, part.scale.width);
  float value = 0;
  HITSR_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int y = clamped(taps.first + i, part.scale.height);
    const int token = part.tokens[y * part.scale.width + x];
    value = fmaf(taps.weight[i], args.codebook[size_t(token) * C + channel], value);
  }
  return value;
}

// Writes h at [left, right) of row y, one channel.
template <int C>
HITSR_DEVICE void interpolate(
    const Arguments& args, const Part& part, float* row, int y, int left, int right, int channel) {
  row += C + channel;
  if (y < 0 || y >= args.height) {
    for (int x = left; x < right; ++x) row[x * C] = 0;
    return;
  }
  if (part.scale.height == args.height && part.scale.width == args.width) {
    for (int x = left; x < right; ++x) {
      row[x * C] = args.codebook[size_t(part.tokens[y * args.width + x]) * C + channel];
    }
    return;
  }
  // Token columns come in order: a window of four slides over them, each interpolated once.
  const Taps down = part.taps[y];
  const Taps* across = part.taps + args.height;
  int first = across[left].first;
  float window[4];
  HITSR_UNROLL
  for (int i = 0; i < 4; ++i) window[i] = column_value<C>(args, part, down, first + i, channel);
  for (int x = left; x < right; ++x) {
    for (; first < across[x].first; ++first) {
      window[0] = window[1];
      window[1] = window[2];
      window[2] = window[3];
      window[3] = column_value<C>(args, part, down, first + 4, channel);
    }
    float value = 0;
    HITSR_UNROLL
    for (int i = 0; i < 4; ++i) value = fmaf(across[x].weight[i], window[i], value);
    row[x * C] = value;
  }
}

// conv3x3 of kPixels places from `left` on, with bias: one output channel for each of a thread's.
template <int C>
HITSR_DEVICE void convolve(
    const Arguments& args, const Ring<C>& ring, int phi, int y, int left, int channel,
    float (&sums)[Lanes<C>::kEach][kPixels]) {
  using Lane = Lanes<C>;
  HITSR_UNROLL
  for (int each = 0; each < Lane::kEach; ++each) {
    const float bias = args.bias[phi * C + channel + each * Lane::kGroup];
    HITSR_UNROLL
    for (int pixel = 0; pixel < kPixels; ++pixel) sums[each][pixel] = bias;
  }
  for (int down = 0; down < 3; ++down) {
    const float* row = ring.row(y + down - 1) + left * C;
    const block::Float4* weight = args.weight + size_t(phi * 9 + down * 3) * (C / 4) * C + channel;
    for (int quad = 0; quad < C / 4; ++quad) {
      block::Float4 taps[3][Lane::kEach];
      HITSR_UNROLL
      for (int tap = 0; tap < 3; ++tap) {
        HITSR_UNROLL
        for (int each = 0; each < Lane::kEach; ++each) {
          taps[tap][each] = weight[(tap * (C / 4) + quad) * C + each * Lane::kGroup];
        }
      }
      HITSR_UNROLL
      for (int place = 0; place < kPixels + 2; ++place) {
        const block::Float4 h = reinterpret_cast<const block::Float4*>(row + place * C)[quad];
        HITSR_UNROLL
        for (int tap = 0; tap < 3; ++tap) {
          const int pixel = place - tap;
          if (pixel < 0 || pixel >= kPixels) continue;
          HITSR_UNROLL
          for (int each = 0; each < Lane::kEach; ++each) {
            HITSR_UNROLL
            for (int i = 0; i < 4; ++i) {
              sums[each][pixel] = fmaf(taps[tap][each].value[i], h.value[i], sums[each][pixel]);
            }
          }
        }
      }
    }
  }
}

// phi of a work item, onto the reconstruction (which the first scale begins) and off the residual.
template <int C>
HITSR_DEVICE void update(
    const Arguments& args, const Part& part, const Ring<C>& ring, int y, int left, int channel) {
  using Lane = Lanes<C>;
  float sums[Lane::kEach][kPixels] = {};
  if (args.ratio != 0) convolve<C>(args, ring, part.scale.phi, y, left, channel, sums);
  const float* h = ring.row(y) + (left + 1) * C + channel;
  const int start = (y - part.top) * args.width + left;
  HITSR_UNROLL
  for (int pixel = 0; pixel < kPixels; ++pixel) {
    if (left + pixel >= args.width) break;
    HITSR_UNROLL
    for (int each = 0; each < Lane::kEach; ++each) {
      const int place = start + pixel, c = channel + each * Lane::kGroup;
      const float step = fmaf(args.ratio, sums[each][pixel], (1 - args.ratio) * h[pixel * C + each * Lane::kGroup]);
      float& sum = part.reconstruction[place * C + c];
      sum = part.start == 0 ? step : sum + step;
      if (args.z != nullptr) part.residual[place * (C + 1) + c] -= step;
    }
  }
}

template <int C, class Block>
HITSR_DEVICE void spread(Block& block, const Arguments& args, const Part& part) {
  using Lane = Lanes<C>;
  const int group = block.thread() / Lane::kGroup, groups = block.threads() / Lane::kGroup;
  const int channel = block.thread() % Lane::kGroup;
  const int segments = (args.width + kPixels - 1) / kPixels;
  const Ring<C> ring{reinterpret_cast<float*>(part.work), args.strip + 2, segments * kPixels + 2};
  // The columns beside the map. The sums of places beyond it are dropped, whatever their columns hold.
  for (int i = block.thread(); i < 2 * C * ring.slots; i += block.threads()) {
    const int slot = i / (2 * C), column = i / C % 2 * (args.width + 1);
    ring.memory[(slot * ring.pitch + column) * C + i % C] = 0;
  }
  int ready = part.top - 1;  // rows of h that have been made, up to here
  for (int top = part.top; top < part.top + part.rows; top += args.strip) {
    const int end = part.top + part.rows, bottom = top + args.strip < end ? top + args.strip : end;
    for (int item = group; item < (bottom + 1 - ready) * segments; item += groups) {
      const int y = ready + item / segments, left = item % segments * kPixels;
      const int right = left + kPixels < args.width ? left + kPixels : args.width;
      HITSR_UNROLL
      for (int each = 0; each < Lane::kEach; ++each) {
        interpolate<C>(args, part, ring.row(y), y, left, right, channel + each * Lane::kGroup);
      }
    }
    ready = bottom + 1;
    block.sync();
    for (int item = group; item < (bottom - top) * segments; item += groups) {
      update<C>(args, part, ring, top + item / segments, item % segments * kPixels, channel);
    }
    block.sync();
  }
}

}  // namespace hitsr_fast::residual
