// The kernels of preference_cross_entropy (foreach_isa.h): three products on tiles that stay in registers, and between
// them the softmax. Rows of hidden lie in the lanes of vectors, kWide of them in a panel.

#include "cpu/vectors/power_of_two.h"

using Isa = Vectors;
using Scores = Isa::Scores;
constexpr int64_t kLanes = Isa::kLanes;
constexpr int kVectors = 3, kRows = Isa::kRegisters / 4;  // of a tile
constexpr int64_t kWide = kVectors * kLanes;
constexpr float kLog2E = 1.44269504088896340736f;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The sums of kRows rows times V vectors over `groups` of `count` steps: rows are kRow, their steps kStep and their groups
// rows_group floats apart; vectors of one step and of the next kWide floats.
template <int V, int64_t kStep, int64_t kRow>
struct Tile {
  Scores sums[kRows][V];

  __attribute__((always_inline)) Tile(
      const float* rows, int64_t rows_group, const float* vectors, int64_t groups, int64_t count) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[r][v] = Isa::fill(0);
    }
    for (int64_t g = 0; g < groups; ++g, rows += rows_group) {
      const float* row = rows;
      for (int64_t i = 0; i < count; ++i, row += kStep, vectors += kWide) {
        Scores vector[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) vector[v] = Isa::load(vectors + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Scores value = Isa::fill(row[r * kRow]);
#pragma GCC unroll 3
          for (int v = 0; v < V; ++v) sums[r][v] = Isa::fused(value, vector[v], sums[r][v]);
        }
      }
    }
  }

  // To a panel of kWide floats a row, in place of what is there or beside it: short sums of short sums round less.
  template <bool kAdd>
  __attribute__((always_inline)) void store(float* to) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        float* place = to + r * kWide + v * kLanes;
        Isa::store(place, kAdd ? Isa::load(place) + sums[r][v] : sums[r][v]);
      }
    }
  }
};

// hidden [count][C] as panels [C][kWide], of rows for the logits, and [rows][kWide], of channels for the gradient of the
// weight, if these are asked for; zeros fill both up. rows: whole panels.
template <typename T>
void pack_hidden(const T* hidden, int64_t count, int64_t rows, int64_t C, float* of_rows, float* of_channels) {
  for (int64_t n = 0; n < rows; ++n) {
    float* to = of_rows + n / kWide * C * kWide + n % kWide;
    if (n < count) {
      const T* from = hidden + n * C;
      for (int64_t c = 0; c < C; ++c) to[c * kWide] = wide(from[c]);
    } else {
      for (int64_t c = 0; c < C; ++c) to[c * kWide] = 0;
    }
  }
  if (of_channels == nullptr) return;
  for (int64_t first = 0; first < C; first += kWide, of_channels += rows * kWide) {
    const int64_t given = smaller(C - first, kWide);
    for (int64_t n = 0; n < rows; ++n) {
      float* to = of_channels + n * kWide;
      const int64_t here = n < count ? given : 0;
      for (int64_t c = 0; c < here; ++c) to[c] = wide(hidden[n * C + first + c]);
      for (int64_t c = here; c < kWide; ++c) to[c] = 0;
    }
  }
}

// `count` codes of the weight as [count / kRows][C][kRows], filled up with zeros.
template <typename T>
void pack_codes(const T* weight, int64_t count, int64_t C, float* to) {
  for (int64_t k = 0; k < count; k += kRows, to += C * kRows) {
    const int64_t given = smaller(count - k, kRows);
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t r = 0; r < given; ++r) to[c * kRows + r] = wide(weight[(k + r) * C + c]);
      for (int64_t r = given; r < kRows; ++r) to[c * kRows + r] = 0;
    }
  }
}

// `count` channels of `codes` rows of the weight as [count / kRows][codes][kRows], filled up with zeros; from one to the
// next of the first axis are `stride` floats.
template <typename T>
void pack_channels(const T* weight, int64_t codes, int64_t count, int64_t C, float* to, int64_t stride) {
  constexpr int64_t kAhead = 8;
  const int64_t whole = count - count % kRows;
  for (int64_t k = 0; k < codes; ++k, weight += C, to += kRows) {
    float* place = to;
    for (int64_t c = 0; c < whole; c += kRows, place += stride) {
      // Rows lie pages apart, over which no processor looks ahead.
      __builtin_prefetch(weight + smaller(kAhead, codes - 1 - k) * C + c);
      for (int64_t r = 0; r < kRows; ++r) place[r] = wide(weight[c + r]);
    }
    for (int64_t r = 0; whole < count && r < kRows; ++r) place[r] = whole + r < count ? wide(weight[whole + r]) : 0;
  }
}

// to [count] += factor * from.
template <typename T>
void add(const T* from, float factor, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * wide(from[i]);
}

// Logits of `count` packed codes for `panels` of rows: panels [K][kWide] from `to` on, `stride` floats apart.
void multiply_codes(
    const float* codes, const float* bias, int64_t count, const float* hidden, int64_t panels, int64_t C, float* to,
    int64_t stride) {
  for (int64_t panel = 0; panel < panels; ++panel, hidden += C * kWide, to += stride) {
    for (int64_t c = 0; c < C; c += kChunk) {
      const int64_t given = smaller(kChunk, C - c);
      for (int64_t k = 0; k < count; k += kRows) {
        const Tile<kVectors, kRows, 1> tile(codes + k * C + c * kRows, 0, hidden + c * kWide, 1, given);
        if (c > 0) {
          tile.template store<true>(to + k * kWide);
        } else {
          tile.template store<false>(to + k * kWide);
        }
      }
    }
    for (int64_t k = 0; bias != nullptr && k < count; ++k) {
      for (int64_t v = 0; v < kWide; v += kLanes) {
        float* place = to + k * kWide + v;
        Isa::store(place, Isa::load(place) + bias[k]);
      }
    }
  }
}

// The rows of one panel of logits [K][kWide]: loss, gap and lse, and in place of the logits their gradient, if it is asked
// for: grad_loss and grad_gap, null for ones and zeros, are those of the results. count: of the rows.
void entropy(
    float* logits, int64_t K, int64_t count, const int64_t* target, const int64_t* rejected, float smoothing,
    bool differentiate, const float* grad_loss, const float* grad_gap, float* loss, float* gap, float* lse) {
  constexpr int64_t kPart = 64;  // codes that are summed by themselves: short sums of short sums round less
  float peak[kWide], total[kWide], mean[kWide], factor[kWide], offset[kWide];
  for (int64_t v = 0; v < kWide; v += kLanes) {
    Scores highest = Isa::load(logits + v), sum = Isa::fill(0);
    for (int64_t first = 0; first < K; first += kPart) {
      Scores part = Isa::fill(0);
      for (int64_t k = first; k < smaller(K, first + kPart); ++k) {
        const Scores logit = Isa::load(logits + k * kWide + v);
        highest = Isa::maximum(logit, highest);
        part = part + logit;
      }
      sum = sum + part;
    }
    Isa::store(peak + v, highest);
    Isa::store(mean + v, sum * (1.0f / static_cast<float>(K)));
  }
  for (int64_t l = 0; l < count; ++l) {
    const float chosen = logits[target[l] * kWide + l];
    gap[l] = chosen - logits[rejected[l] * kWide + l];
    loss[l] = -chosen - smoothing * (mean[l] - chosen);
  }
  for (int64_t v = 0; v < kWide; v += kLanes) {
    const Scores highest = Isa::load(peak + v);
    Scores sum = Isa::fill(0);
    for (int64_t first = 0; first < K; first += kPart) {
      Scores part = Isa::fill(0);
      for (int64_t k = first; k < smaller(K, first + kPart); ++k) {
        float* place = logits + k * kWide + v;
        const Scores weight = power_of_two<6>((Isa::load(place) - highest) * kLog2E);
        Isa::store(place, weight);
        part = part + weight;
      }
      sum = sum + part;
    }
    Isa::store(total + v, sum);
  }
  for (int64_t l = 0; l < kWide; ++l) {
    const float log = peak[l] + logf(total[l]), given = l >= count ? 0 : grad_loss == nullptr ? 1 : grad_loss[l];
    factor[l] = given / total[l];
    offset[l] = given * smoothing / static_cast<float>(K);
    if (l >= count) continue;
    lse[l] = log;
    loss[l] += log;
  }
  if (!differentiate) return;
  for (int64_t v = 0; v < kWide; v += kLanes) {
    const Scores times = Isa::load(factor + v), less = Isa::load(offset + v);
    for (int64_t k = 0; k < K; ++k) {
      float* place = logits + k * kWide + v;
      Isa::store(place, Isa::load(place) * times - less);
    }
  }
  for (int64_t l = 0; l < count; ++l) {
    const float of_gap = grad_gap == nullptr ? 0 : grad_gap[l], of_loss = grad_loss == nullptr ? 1 : grad_loss[l];
    logits[target[l] * kWide + l] += of_gap - (1 - smoothing) * of_loss;
    logits[rejected[l] * kWide + l] -= of_gap;
  }
}

// Gradient of hidden in `count` channels, [panels][count][kWide], to which it is added: of `codes` of the gradients of the
// logits, panels `stride` floats apart, and channels of those codes, packed with `packed_stride`.
void multiply_channels(
    const float* channels, int64_t packed_stride, int64_t codes, int64_t count, const float* logits, int64_t stride,
    int64_t panels, float* to) {
  for (int64_t panel = 0; panel < panels; ++panel, logits += stride, to += count * kWide) {
    for (int64_t c = 0; c < count; c += kRows) {
      const Tile<kVectors, kRows, 1> tile(channels + c / kRows * packed_stride, 0, logits, 1, codes);
      tile.template store<true>(to + c * kWide);
    }
  }
}

template <int V>
inline void multiply_panel(
    const float* logits, int64_t stride, const float* hidden, int64_t panels, int64_t count, float* sums) {
  constexpr int64_t kTogether = kChunk / kWide;  // panels, of which the hidden rows stay in the first-level cache
  for (int64_t first = 0; first < panels; first += kTogether) {
    const int64_t given = smaller(kTogether, panels - first);
    for (int64_t k = 0; k < count; k += kRows) {
      const Tile<V, 1, kWide> tile(
          logits + first * stride + k * kWide, stride, hidden + first * kWide * kWide, given, kWide);
      if (first > 0) {
        tile.template store<true>(sums + k * kWide);
      } else {
        tile.template store<false>(sums + k * kWide);
      }
    }
  }
}

// Gradients of `count` codes of the weight, [count][C], and of the bias, unless it is null: of the gradients of the logits
// and panels of channels of hidden. What is there already is kept if `more`. sums: [whole rows of tiles][kWide].
void multiply_rows(
    const float* logits, int64_t stride, int64_t count, const float* hidden, int64_t panels, int64_t C, bool more,
    float* sums, float* grad_weight, float* grad_bias) {
  for (int64_t first = 0; first < C; first += kWide, hidden += panels * kWide * kWide) {
    const int64_t given = smaller(kWide, C - first);
    if (given <= kLanes) {
      multiply_panel<1>(logits, stride, hidden, panels, count, sums);
    } else if (given <= 2 * kLanes) {
      multiply_panel<2>(logits, stride, hidden, panels, count, sums);
    } else {
      multiply_panel<3>(logits, stride, hidden, panels, count, sums);
    }
    for (int64_t k = 0; k < count; ++k) {
      float* to = grad_weight + k * C + first;
      const float* from = sums + k * kWide;
      if (more) {
        for (int64_t c = 0; c < given; ++c) to[c] += from[c];
      } else {
        for (int64_t c = 0; c < given; ++c) to[c] = from[c];
      }
    }
  }
  for (int64_t k = 0; grad_bias != nullptr && k < count; ++k) {
    Scores sum = Isa::fill(0);
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t v = 0; v < kWide; v += kLanes) sum = sum + Isa::load(logits + panel * stride + k * kWide + v);
    }
    float lanes[kLanes], total = more ? grad_bias[k] : 0;
    Isa::store(lanes, sum);
    for (int64_t l = 0; l < kLanes; ++l) total += lanes[l];
    grad_bias[k] = total;
  }
}

template <typename T>
constexpr Kernels<T> kKernels{pack_hidden<T>, pack_codes<T>, pack_channels<T>, add<T>};

constexpr Products kProducts{kRows, kWide, multiply_codes, entropy, multiply_channels, multiply_rows};
