// What the residual quantizer and its gradient share.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "tensor.h"

namespace hitsr_fast {

// Four taps for each place of a finer grid: bicubic, a = -0.75, half-pixel centres, edges repeated.
struct BicubicTaps {
  std::vector<int> place;     // [to][4]
  std::vector<float> weight;  // [to][4]

  BicubicTaps(int64_t from, int64_t to) : place(4 * to), weight(4 * to) {
    constexpr double a = -0.75;
    const auto near = [](double x) { return ((a + 2) * x - (a + 3)) * x * x + 1; };
    const auto far = [](double x) { return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a; };
    for (int64_t i = 0; i < to; ++i) {
      const double centre = (static_cast<double>(i) + 0.5) * static_cast<double>(from) / static_cast<double>(to) - 0.5;
      const double below = std::floor(centre), part = centre - below;
      const double values[4] = {far(part + 1), near(part), near(1 - part), far(2 - part)};
      for (int64_t t = 0; t < 4; ++t) {
        place[4 * i + t] = static_cast<int>(std::clamp<int64_t>(static_cast<int64_t>(below) - 1 + t, 0, from - 1));
        weight[4 * i + t] = static_cast<float>(values[t]);
      }
    }
  }
};

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

inline void check_scale(int64_t height, int64_t width, int64_t map_height, int64_t map_width) {
  HITSR_CHECK(
      0 < height && height <= map_height && 0 < width && width <= map_width, "scales: expected at most the map's ",
      map_height, " x ", map_width, ", found ", height, " x ", width);
}

inline void check_indices(const Tensor& indices, int64_t codes, const char* name) {
  const int64_t* first = data<const int64_t>(indices);
  const auto found = std::find_if(first, first + indices.numel(), [&](int64_t k) { return k < 0 || k >= codes; });
  HITSR_CHECK(
      found == first + indices.numel(), name, ": expected indices from 0 to ", codes - 1, ", found ", *found);
}

}  // namespace hitsr_fast
