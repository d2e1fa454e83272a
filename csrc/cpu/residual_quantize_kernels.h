// The kernels of residual_quantize (foreach_isa.h).

using Isa = Vectors;
using Scores = Isa::Scores;
constexpr int64_t kLanes = Isa::kLanes;
constexpr int kPlaces = Isa::kRegisters / 4;  // of a map that are convolved together
static_assert(kPlacesAtATime % kPlaces == 0);

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// to = sum of four rows of `count` floats, each times its weight.
inline void blend(const float* const* from, const float* weight, int64_t count, float* to) {
  const Scores w0 = Isa::fill(weight[0]), w1 = Isa::fill(weight[1]), w2 = Isa::fill(weight[2]), w3 = Isa::fill(weight[3]);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Scores outer = Isa::fused(w0, Isa::load(from[0] + i), w3 * Isa::load(from[3] + i));
    const Scores inner = Isa::fused(w1, Isa::load(from[1] + i), w2 * Isa::load(from[2] + i));
    Isa::store(to + i, outer + inner);
  }
}

// The codes of one row of tokens, [width][channels_stride].
inline void gather(const Geometry& map, const float* codebook, const int64_t* indices, int64_t width, float* to) {
  for (int64_t x = 0; x < width; ++x) {
    std::memcpy(
        to + x * map.channels_stride, codebook + indices[x] * map.channels,
        static_cast<size_t>(map.channels) * sizeof(float));
  }
}

// Rows [begin, end) of a scale, spread along x.
inline void spread_across(
    const Geometry& map, const Scale& scale, const float* codebook, const int64_t* indices, int64_t begin, int64_t end,
    const Band& band) {
  for (int64_t y = begin; y < end; ++y) {
    float* to = band.across + y * map.stride * map.channels_stride;
    const bool same = scale.width == map.width;
    gather(map, codebook, indices + y * scale.width, scale.width, same ? to : band.codes);
    for (int64_t x = 0; !same && x < map.width; ++x) {
      const float* from[4];
      for (int t = 0; t < 4; ++t) from[t] = band.codes + scale.x.place[4 * x + t] * map.channels_stride;
      blend(from, scale.x.weight + 4 * x, map.channels_stride, to + x * map.channels_stride);
    }
  }
}

// Row y of the map, from rows that are spread along x; zeros if y is outside.
inline void spread_down(const Geometry& map, const Scale& scale, int64_t y, const float* across, float* to) {
  const int64_t row = map.stride * map.channels_stride, used = map.width * map.channels_stride;
  if (y < 0 || y >= map.height) {
    std::memset(to, 0, static_cast<size_t>(used) * sizeof(float));
  } else if (scale.height == map.height) {
    std::memcpy(to, across + y * row, static_cast<size_t>(used) * sizeof(float));
  } else {
    const float* from[4];
    for (int t = 0; t < 4; ++t) from[t] = across + scale.y.place[4 * y + t] * row;
    blend(from, scale.y.weight + 4 * y, used, to);
  }
}

inline void add_step(Scores step, float* reconstruction, float* residual) {
  Isa::store(reconstruction, Isa::load(reconstruction) + step);
  if (residual != nullptr) Isa::store(residual, Isa::load(residual) - step);
}

// phi at kPlaces places and kVectors vectors of channels. smoothed: the place above and to the left of the first.
template <int kVectors>
inline void convolve(
    const Geometry& map, const Scale& scale, int64_t channel, const float* smoothed, float* reconstruction,
    float* residual) {
  const int64_t place = map.channels_stride, row = (map.stride + 2) * place;
  Scores total[kPlaces][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const Scores bias = Isa::load(scale.phi_bias + channel + v * kLanes);
#pragma GCC unroll 8
    for (int p = 0; p < kPlaces; ++p) total[p][v] = bias;
  }
  for (int64_t tap = 0; tap < 9; ++tap) {
    const float* from = smoothed + tap / 3 * row + tap % 3 * place;
    const float* weights = scale.phi_weight + tap * map.channels * place + channel;
    for (int64_t c = 0; c < map.channels; ++c) {
      Scores weight[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) weight[v] = Isa::load(weights + c * place + v * kLanes);
#pragma GCC unroll 8
      for (int p = 0; p < kPlaces; ++p) {
        const Scores value = Isa::fill(from[p * place + c]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) total[p][v] = Isa::fused(value, weight[v], total[p][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPlaces; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = p * place + channel + v * kLanes;
      add_step(total[p][v], reconstruction + at, residual == nullptr ? nullptr : residual + at);
    }
  }
}

// Row of the map whose three rows of smoothed codes start at `smoothed`.
inline void finish_row(
    const Geometry& map, const Scale& scale, const float* smoothed, float* reconstruction, float* residual) {
  const int64_t place = map.channels_stride;
  if (scale.phi_weight == nullptr) {
    const float* middle = smoothed + (map.stride + 3) * place;
    for (int64_t i = 0; i < map.width * place; i += kLanes) {
      add_step(Isa::load(middle + i), reconstruction + i, residual == nullptr ? nullptr : residual + i);
    }
    return;
  }
  for (int64_t x = 0; x < map.stride; x += kPlaces) {
    float* taken = residual == nullptr ? nullptr : residual + x * place;
    int64_t channel = 0;
    for (; channel + 2 * kLanes <= place; channel += 2 * kLanes) {
      convolve<2>(map, scale, channel, smoothed + x * place, reconstruction + x * place, taken);
    }
    if (channel < place) convolve<1>(map, scale, channel, smoothed + x * place, reconstruction + x * place, taken);
  }
}

void pool(
    const Geometry& map, const float* from, int64_t height, int64_t width, int64_t begin, int64_t end, float* rows) {
  const int64_t place = map.channels_stride;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t y = token / width, x = token % width;
    const int64_t top = y * map.height / height, bottom = ((y + 1) * map.height + height - 1) / height;
    const int64_t left = x * map.width / width, right = ((x + 1) * map.width + width - 1) / width;
    const Scores count = Isa::fill(static_cast<float>((bottom - top) * (right - left)));
    for (int64_t c = 0; c < place; c += kLanes) {
      Scores total = Isa::fill(0);
      for (int64_t i = top; i < bottom; ++i) {
        for (int64_t j = left; j < right; ++j) total += Isa::load(from + (i * map.stride + j) * place + c);
      }
      Isa::store(rows + (token - begin) * place + c, total / count);
    }
  }
}

void spread(
    const Geometry& map, const Scale& scale, const float* codebook, const int64_t* indices, int64_t begin, int64_t end,
    const Band& band, float* reconstruction, float* residual) {
  int64_t first = 0, last = scale.height;  // rows of the scale that the band and its frame are made of
  if (scale.height != map.height) {
    first = scale.y.place[4 * larger(begin - 1, 0)];
    last = scale.y.place[4 * smaller(end, map.height - 1) + 3] + 1;
  } else {
    first = larger(begin - 1, 0);
    last = smaller(end + 1, map.height);
  }
  spread_across(map, scale, codebook, indices, first, last, band);
  const int64_t row = map.stride * map.channels_stride, framed = (map.stride + 2) * map.channels_stride;
  for (int64_t top = begin; top < end; top += kBandRows) {
    const int64_t bottom = smaller(top + kBandRows, end);
    for (int64_t y = top - 1; y <= bottom; ++y) {
      spread_down(map, scale, y, band.across, band.smoothed + (y - top + 1) * framed + map.channels_stride);
    }
    for (int64_t y = top; y < bottom; ++y) {
      float* taken = residual == nullptr ? nullptr : residual + y * row;
      finish_row(map, scale, band.smoothed + (y - top) * framed, reconstruction + y * row, taken);
    }
  }
}

constexpr Kernels kKernels{kLanes, pool, spread};
