// The kernels of residual_decode_backward (foreach_isa.h).

using Isa = Vectors;
using Scores = Isa::Scores;
constexpr int64_t kLanes = Isa::kLanes;
constexpr int kTile = Isa::kRegisters / 4;  // tokens, or channels of a code, that are multiplied together
static_assert(kTokenTile % kTile == 0 && kLanes % kTile == 0);

void add_band(const Geometry& map, const float* from, int64_t count, float* band) {
  for (int64_t c = 0; c < map.channels; ++c) {
    const float* plane = from + c * map.height * map.width;
    float* to = band + c * count;
    for (int64_t i = 0; i < count; ++i) to[i] += plane[i];
  }
}

// Element by element: where gathers are mended against leaks they take longer.
void turn_row(const Geometry& map, const float* band, int64_t count, float* to, float* sum) {
  for (int64_t x = 0; x < map.width; ++x) {
    for (int64_t c = 0; c < map.channels; ++c) to[x * map.stride + c] = band[c * count + x];
    for (int64_t c = map.channels; c < map.stride; ++c) to[x * map.stride + c] = 0;
  }
  for (int64_t c = 0; c < map.stride; c += kLanes) {
    Scores total = Isa::load(sum + c);
    for (int64_t x = 0; x < map.width; ++x) total += Isa::load(to + x * map.stride + c);
    Isa::store(sum + c, total);
  }
}

void across(const Geometry& map, const Pull& pull, int64_t width, const float* row, float* to) {
  const int64_t shifted = width * map.stride;
  for (int64_t j = 0; j < width; ++j) {
    const int64_t first = pull.begin[j], count = pull.end[j] - first;
    const float* weight = pull.weight + j * pull.stride;
    for (int64_t c = 0; c < map.stride; c += kLanes) {
      Scores right = Isa::fill(0), same = right, left = right;
      const float* from = row + first * map.stride + c;
      for (int64_t x = 0; x < count; ++x, from += map.stride) {
        const Scores value = Isa::load(from);
        right = Isa::fused(Isa::fill(weight[x]), value, right);
        same = Isa::fused(Isa::fill(weight[x + 1]), value, same);
        left = Isa::fused(Isa::fill(weight[x + 2]), value, left);
      }
      float* place = to + j * map.stride + c;
      Isa::store(place, right);
      Isa::store(place + shifted, same);
      Isa::store(place + 2 * shifted, left);
    }
  }
}

void down(const Geometry& map, const Pull& pull, int64_t i, int64_t width, const float* across, float* to) {
  const int64_t count = pull.end[i] - pull.begin[i], shifted = width * map.stride;
  const float* weight = pull.weight + i * pull.stride;
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t c = 0; c < map.stride; c += kLanes) {
      Scores total[9];
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) total[t] = Isa::fill(0);
      const float* from = across + j * map.stride + c;
      for (int64_t y = 0; y < count; ++y, from += 3 * shifted) {
        Scores value[3];
#pragma GCC unroll 3
        for (int x = 0; x < 3; ++x) value[x] = Isa::load(from + x * shifted);
#pragma GCC unroll 3
        for (int t = 0; t < 3; ++t) {
          const Scores part = Isa::fill(weight[y + t]);
#pragma GCC unroll 3
          for (int x = 0; x < 3; ++x) total[3 * t + x] = Isa::fused(part, value[x], total[3 * t + x]);
        }
      }
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) Isa::store(to + (j * 9 + t) * map.stride + c, total[t]);
    }
  }
}

// The first `count` of kTile tokens, and kVectors vectors of channels from `channel` on, of what reaches the codes.
template <int kVectors>
inline void reach(
    const Geometry& map, const float* shifted, const float* weights, int64_t channel, int64_t count, float* to) {
  Scores total[kTile][kVectors];
#pragma GCC unroll 8
  for (int p = 0; p < kTile; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[p][v] = Isa::fill(0);
  }
  for (int64_t tap = 0; tap < 9; ++tap) {
    for (int64_t out = 0; out < map.channels; ++out) {
      const float* from = shifted + tap * map.stride + out;
      const float* row = weights + (tap * map.channels + out) * map.stride + channel;
      Scores weight[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) weight[v] = Isa::load(row + v * kLanes);
#pragma GCC unroll 8
      for (int p = 0; p < kTile; ++p) {
        const Scores value = Isa::fill(from[p * 9 * map.stride]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) total[p][v] = Isa::fused(value, weight[v], total[p][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kTile; ++p) {
    if (p >= count) return;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) Isa::store(to + p * map.stride + channel + v * kLanes, total[p][v]);
  }
}

void codes_gradient(const Geometry& map, const float* shifted, const float* weights, int64_t count, float* to) {
  int64_t channel = 0;
  for (; channel + 2 * kLanes <= map.stride; channel += 2 * kLanes) {
    for (int64_t m = 0; m < count; m += kTile) {
      reach<2>(map, shifted + m * 9 * map.stride, weights, channel, count - m, to + m * map.stride);
    }
  }
  for (int64_t m = 0; channel < map.stride && m < count; m += kTile) {
    reach<1>(map, shifted + m * 9 * map.stride, weights, channel, count - m, to + m * map.stride);
  }
}

// kTile channels of the codes by kVectors vectors of channels of one shifted gradient.
template <int kVectors>
inline void correlate(
    const Geometry& map, const float* shifted, const float* codes, int64_t count, int64_t tap, int64_t in,
    int64_t channel, float* sums) {
  Scores total[kTile][kVectors];
#pragma GCC unroll 8
  for (int p = 0; p < kTile; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) total[p][v] = Isa::fill(0);
  }
  const float* from = shifted + tap * map.stride + channel;
  for (int64_t m = 0; m < count; ++m, from += 9 * map.stride) {
    Scores value[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) value[v] = Isa::load(from + v * kLanes);
#pragma GCC unroll 8
    for (int p = 0; p < kTile; ++p) {
      const Scores code = Isa::fill(codes[m * map.stride + in + p]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[p][v] = Isa::fused(code, value[v], total[p][v]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kTile; ++p) {
    float* to = sums + (tap * map.stride + in + p) * map.stride + channel;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) Isa::store(to + v * kLanes, Isa::load(to + v * kLanes) + total[p][v]);
  }
}

void weight_gradient(const Geometry& map, const float* shifted, const float* codes, int64_t count, float* sums) {
  for (int64_t tap = 0; tap < 9; ++tap) {
    int64_t channel = 0;
    for (; channel + 2 * kLanes <= map.stride; channel += 2 * kLanes) {
      for (int64_t in = 0; in < map.channels; in += kTile) {
        correlate<2>(map, shifted, codes, count, tap, in, channel, sums);
      }
    }
    for (int64_t in = 0; channel < map.stride && in < map.channels; in += kTile) {
      correlate<1>(map, shifted, codes, count, tap, in, channel, sums);
    }
  }
}

void scatter(
    const Geometry& map, const float* rows, const int64_t* indices, int64_t count, int64_t begin, int64_t end,
    float* codebook) {
  for (int64_t n = 0; n < count; ++n) {
    if (indices[n] < begin || indices[n] >= end) continue;
    const float* from = rows + n * map.stride;
    float* to = codebook + indices[n] * map.channels;
    for (int64_t c = 0; c < map.channels; ++c) to[c] += from[c];
  }
}

constexpr Kernels kKernels{
    kLanes, add_band, turn_row, across, down, codes_gradient, weight_gradient, scatter};
