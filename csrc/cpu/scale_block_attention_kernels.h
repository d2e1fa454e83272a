// The kernels of scale_block_attention (foreach_isa.h): the softmax, for any instruction set, and around it products on
// vectors of floats or, on AMX with BF16, of 16 keys or channels with 16 queries in one instruction.

#include "cpu/vectors/power_of_two.h"

#if defined(HITSR_TILES)
constexpr Format kFormat{32, 32, 32, true};
#else
constexpr Format kFormat{3 * Vectors::kLanes, Vectors::kRegisters / 4, 16, false};
#endif

using Isa = Vectors;
using Scores = Isa::Scores;
constexpr int64_t kLanes = Isa::kLanes, kQueries = kFormat.queries;

constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
// The peak while all scores were -infinity: finite, so that their weights are next to nothing and not NaN.
constexpr float kNoPeak = -__FLT_MAX__;
// A new peak is taken over only where it is this much above the old one, in powers of two: the sums hold the weights
// of 2^8 as well as those of 1, and need rescaling almost never.
constexpr float kHeadroom = 8;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What is kept of a tile from one block of keys to the next.
struct State {
  float* sums;   // of weighted values, [channels][kQueries]
  float* peak;   // [kQueries]: near the largest score so far, in powers of two
  float* total;  // [kQueries]: of the weights 2^(score - peak)
};

inline State state_of(const Task& task, int64_t tile) {
  float* from = task.scratch + tile * (task.channels + 2) * kQueries;
  return {from, from + task.channels * kQueries, from + (task.channels + 1) * kQueries};
}
// What is left of the scratch.
inline float* scratch_of(const Task& task) { return state_of(task, kMostTiles).sums; }

inline void begin(const Task& task) {
  for (int64_t i = 0; i * kQueries < task.count; ++i) {
    const State state = state_of(task, i);
    std::memset(state.sums, 0, static_cast<size_t>(task.channels * kQueries) * sizeof(float));
    for (int64_t q = 0; q < kQueries; ++q) {
      state.peak[q] = kNoPeak;
      state.total[q] = 0;
    }
  }
}

// The sums of values over the totals, and the logarithms of these; as of the definition NaN where all scores are -infinity.
inline void finish(const Task& task) {
  for (int64_t i = 0; i * kQueries < task.count; ++i) {
    const State state = state_of(task, i);
    float* out = task.out + i * task.channels * kQueries;
    for (int64_t v = 0; v < kQueries; v += kLanes) {
      const Scores found = Isa::fill(1) / Isa::load(state.total + v);
      const Scores share = Isa::load(state.peak + v) == Isa::fill(kNoPeak) ? Isa::fill(kNan) : found;
      for (int64_t d = v; d < v + task.channels * kQueries; d += kQueries) {
        Isa::store(out + d, Isa::load(state.sums + d) * share);
      }
    }
    for (int64_t q = 0; q < smaller(kQueries, task.count - i * kQueries); ++q) {
      constexpr float kLog2 = 0.693147180559945f;
      const float log = (state.peak[q] + log2f(state.total[q])) * kLog2;
      task.lse[i * kQueries + q] = state.peak[q] == kNoPeak ? -kInfinity : log;
    }
  }
}

// The softmax of one tile, V vectors wide, over one block of keys.
template <int V>
struct Softmax {
  const State state;
  Scores peak[V];
  Scores total[V];  // of this block
  const Scores scale;

  Softmax(const State& state, float scale) : state(state), scale(Isa::fill(scale)) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      peak[v] = Isa::load(state.peak + v * kLanes);
      total[v] = Isa::fill(0);
    }
  }
  ~Softmax() {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      Isa::store(state.peak + v * kLanes, peak[v]);
      Isa::store(state.total + v * kLanes, Isa::load(state.total + v * kLanes) + total[v]);
    }
  }
  Softmax(const Softmax&) = delete;
  Softmax& operator=(const Softmax&) = delete;

  // Takes the scores of the block into account, [count][kQueries]; if the peak moves, scales the sums so far.
  void raise(const float* scores, int64_t count, int64_t channels) {
    Scores most[2][V];  // two chains, to be twice as quick as one
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) most[0][v] = most[1][v] = Isa::load(scores + v * kLanes);
    for (int64_t k = count % 2; k < count; k += 2) {
      const float* score = scores + k * kQueries;
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        most[0][v] = Isa::maximum(most[0][v], Isa::load(score + v * kLanes));
        most[1][v] = Isa::maximum(most[1][v], Isa::load(score + kQueries + v * kLanes));
      }
    }
    Scores factor[V];
    bool moves = false;
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const Scores found = Isa::maximum(most[0][v], most[1][v]) * scale;
      const auto higher = found > peak[v] + Isa::fill(kHeadroom);
      const Scores next = higher ? found : peak[v];
      factor[v] = higher ? power_of_two<6>(peak[v] - next) : Isa::fill(1);
      peak[v] = next;
      moves = moves || Isa::at_most(factor[v], 0.5f) != 0;
    }
    if (!moves) return;
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      Isa::store(state.total + v * kLanes, Isa::load(state.total + v * kLanes) * factor[v]);
      for (int64_t d = 0; d < channels; ++d) {
        float* sum = state.sums + d * kQueries + v * kLanes;
        Isa::store(sum, Isa::load(sum) * factor[v]);
      }
    }
  }

  // Weight of a key, before rounding, which is added to the total.
  template <int kDegree>
  Scores weigh(const float* scores, int v) {
    const Scores weight = power_of_two<kDegree>(Isa::fused(Isa::load(scores + v * kLanes), scale, -peak[v]));
    total[v] = total[v] + weight;
    return weight;
  }
};

#if defined(HITSR_TILES)
using Pair = uint32_t;  // two bfloat16, the one of the even key or channel below

constexpr int64_t kRows = kFormat.rows, kStep = 32;  // bfloat16 in a row of a tile
static_assert(kQueries == 2 * kLanes && kRows == kStep);

// This thread's tile registers, all of 16 rows of 64 bytes.
struct Active {
  Active() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" : : "r"(&config) : "memory");  // GCC believes that only the first 8 bytes are read
    _tile_loadconfig(&config);
  }
  ~Active() { _tile_release(); }
  Active(const Active&) = delete;
  Active& operator=(const Active&) = delete;
};

// Products of 32 rows with V vectors of queries: to[r][q] (+)= sum over i of rows[r][i] * pairs[i / 2][q][i % 2], for
// `count` steps of 32 i. `row`: elements from one row to the next, `step`: from one step to the next.
template <int V, bool kAdd>
inline void multiply(const uint16_t* rows, int64_t row, int64_t step, const Pair* pairs, int64_t count, float* to) {
  constexpr int64_t kStride = 4 * kQueries;
  asm volatile("" ::: "memory");  // what the tiles load has been stored
  if constexpr (kAdd) {
    _tile_loadd(0, to, kStride);
    _tile_loadd(2, to + 16 * kQueries, kStride);
    if constexpr (V == 2) {
      _tile_loadd(1, to + kLanes, kStride);
      _tile_loadd(3, to + 16 * kQueries + kLanes, kStride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (V == 2) {
      _tile_zero(1);
      _tile_zero(3);
    }
  }
  for (int64_t s = 0; s < count; ++s, rows += step, pairs += kStep / 2 * kQueries) {
    _tile_loadd(4, rows, 2 * row);
    _tile_loadd(6, pairs, kStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, rows + 16 * row, 2 * row);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (V == 2) {
      _tile_loadd(7, pairs + kLanes, kStride);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, kStride);
  _tile_stored(2, to + 16 * kQueries, kStride);
  if constexpr (V == 2) {
    _tile_stored(1, to + kLanes, kStride);
    _tile_stored(3, to + 16 * kQueries + kLanes, kStride);
  }
}

// Positive numbers, rounded to bfloat16 (ties up).
inline __m512i pair_of(Scores even, Scores odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)even, half), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_add_epi32((__m512i)odd, half));
}

// Keys [first, first + count) for one tile of V vectors.
template <int V>
void attend_block(const Task& task, int64_t tile, int64_t first, int64_t count) {
  const int64_t channels = task.channels, group = channels * kRows;  // elements of kRows keys
  const auto* queries = static_cast<const Pair*>(task.queries) + tile * channels / 2 * kQueries;
  const auto* keys = static_cast<const uint16_t*>(task.keys) + first * channels;
  const auto* values = static_cast<const uint16_t*>(task.values) + first * channels;
  float* scores = scratch_of(task);
  auto* pairs = reinterpret_cast<Pair*>(scores + kBlockKeys * kQueries);
  auto* rest = reinterpret_cast<uint16_t*>(pairs + kBlockKeys / 2 * kQueries);
  Softmax<V> softmax(state_of(task, tile), task.scale);
  for (int64_t k = 0; k < count; k += kRows) {
    multiply<V, false>(keys + k * channels, channels, kStep, queries, channels / kStep, scores + k * kQueries);
  }
  softmax.raise(scores, count, channels);
  for (int64_t k = 0; k < count; k += 2) {
    const float* score = scores + k * kQueries;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Scores even = softmax.template weigh<3>(score, v);
      const Scores odd = k + 1 < count ? softmax.template weigh<3>(score + kQueries, v) : Isa::fill(0);
      _mm512_storeu_si512(pairs + k / 2 * kQueries + v * kLanes, pair_of(even, odd));
    }
  }
  const int64_t whole = count / kRows, left = count % kRows;
  for (int64_t d = 0; whole > 0 && d < channels; d += kRows) {
    multiply<V, true>(values + d * kRows, kRows, group, pairs, whole, softmax.state.sums + d * kQueries);
  }
  if (left == 0) return;
  // The last keys are less than a group: whatever the values beyond them are, they must not be seen.
  const int64_t used = (left + 1) / 2;
  Pair* last = pairs + whole * kRows / 2 * kQueries;
  std::memset(last + used * kQueries, 0, static_cast<size_t>((kRows / 2 - used) * kQueries) * sizeof(Pair));
  for (int64_t d = 0; d < channels; ++d) {
    for (int64_t k = 0; k < kRows; ++k) rest[d * kRows + k] = k < left ? values[whole * group + d * kRows + k] : 0;
  }
  for (int64_t d = 0; d < channels; d += kRows) {
    multiply<V, true>(rest + d * kRows, kRows, group, last, 1, softmax.state.sums + d * kQueries);
  }
}

void attend(const Task& task) {
  const Active active;
  if (task.begins) begin(task);
  for (int64_t first = 0; first < task.visible; first += kBlockKeys) {
    const int64_t count = smaller(kBlockKeys, task.visible - first);
    for (int64_t tile = 0; tile * kQueries < task.count; ++tile) {
      if (task.count - tile * kQueries <= kLanes) {
        attend_block<1>(task, tile, first, count);
      } else {
        attend_block<2>(task, tile, first, count);
      }
    }
  }
  if (task.ends) finish(task);
}

constexpr Kernels kBfloat16{kFormat, attend, nullptr};
using avx512::kFloat;

#else
constexpr int kRows = kFormat.rows, kVectors = kFormat.queries / Isa::kLanes;

// Products of R rows with V vectors: to[r][v] (+)= sum over i of rows[i * kStep + r * kRow] * vectors[i][v], with strides
// from one i and one r to the next. What is there already is added last: short sums of short sums round less.
template <int R, int V, bool kAdd, int64_t kStep, int64_t kRow>
inline void multiply(
    const float* rows, const float* vectors, int64_t vectors_stride, int64_t count, float* to, int64_t to_stride) {
  Scores sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sums[r][v] = Isa::fill(0);
  }
  for (int64_t i = 0; i < count; ++i, rows += kStep, vectors += vectors_stride) {
    Scores vector[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) vector[v] = Isa::load(vectors + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Scores row = Isa::fill(rows[r * kRow]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[r][v] = Isa::fused(row, vector[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      float* sum = to + r * to_stride + v * kLanes;
      Isa::store(sum, kAdd ? Isa::load(sum) + sums[r][v] : sums[r][v]);
    }
  }
}

// Scores of keys, in panels [keys / kRows][channels][kRows], with V vectors of queries, [channels][kQueries]; there is
// room for whole panels of them.
template <int V>
void score(const float* keys, int64_t count, const float* queries, int64_t channels, float* to) {
  for (int64_t k = 0; k < count; k += kRows) {
    multiply<kRows, V, false, kRows, 1>(keys + k * channels, queries, kQueries, channels, to + k * kQueries, kQueries);
  }
}

// sums += values, in panels [channels / kRows][kBlockKeys][kRows], times the weights of `count` keys.
template <int V>
void gather(const float* values, int64_t count, const float* weights, int64_t channels, float* sums) {
  for (int64_t d = 0; d < channels; d += kRows) {
    multiply<kRows, V, true, kRows, 1>(values + d * kBlockKeys, weights, kQueries, count, sums + d * kQueries, kQueries);
  }
}

// Keys [first, first + count) for one tile of V vectors.
template <int V>
void attend_block(const Task& task, int64_t tile, int64_t first, int64_t count) {
  const int64_t channels = task.channels;
  const auto* queries = static_cast<const float*>(task.queries) + tile * channels * kQueries;
  const auto* keys = static_cast<const float*>(task.keys) + first * channels;
  const auto* values = static_cast<const float*>(task.values) + first * channels;
  float* scores = scratch_of(task);
  Softmax<V> softmax(state_of(task, tile), task.scale);
  score<V>(keys, count, queries, channels, scores);
  softmax.raise(scores, count, channels);
  for (int64_t k = 0; k < count; ++k) {
    float* score = scores + k * kQueries;
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) Isa::store(score + v * kLanes, softmax.template weigh<6>(score, v));
  }
  gather<V>(values, count, scores, channels, softmax.state.sums);
}

void attend(const Task& task) {
  static_assert(kVectors == 3);
  if (task.begins) begin(task);
  for (int64_t first = 0; first < task.visible; first += kBlockKeys) {
    const int64_t count = smaller(kBlockKeys, task.visible - first);
    for (int64_t tile = 0; tile * kQueries < task.count; ++tile) {
      const int64_t queries = task.count - tile * kQueries;
      if (queries <= kLanes) {
        attend_block<1>(task, tile, first, count);
      } else if (queries <= 2 * kLanes) {
        attend_block<2>(task, tile, first, count);
      } else {
        attend_block<3>(task, tile, first, count);
      }
    }
  }
  if (task.ends) finish(task);
}

// to[k] += sum over queries of weights[k][q] * rows[q], for keys [0, count) and all channels.
inline void spread(
    const float* weights, int64_t count, const float* rows, int64_t queries, int64_t channels, float* to) {
  const int64_t whole = count / kRows * kRows;
  for (int64_t d = 0; d < channels; d += 2 * kLanes) {
    for (int64_t k = 0; k < whole; k += kRows) {
      multiply<kRows, 2, true, 1, kQueries>(
          weights + k * kQueries, rows + d, channels, queries, to + k * channels + d, channels);
    }
    for (int64_t k = whole; k < count; ++k) {
      multiply<1, 2, true, 1, kQueries>(
          weights + k * kQueries, rows + d, channels, queries, to + k * channels + d, channels);
    }
  }
}

// Keys [first, first + count) and one tile of V vectors.
template <int V>
void differentiate_block(const BackwardTask& task, int64_t tile, int64_t first, int64_t count) {
  const int64_t channels = task.channels, offset = tile * kQueries * channels;
  const int64_t queries = smaller(kQueries, task.count - tile * kQueries);
  float *weights = task.scratch, *gradients = weights + kBlockKeys * kQueries;
  score<V>(task.keys + first * channels, count, task.queries + offset, channels, weights);
  score<V>(task.values + first * channels, count, task.grads + offset, channels, gradients);
  const Scores power = Isa::fill(task.scale * 1.44269504088896341f), scale = Isa::fill(task.scale);
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    const Scores lse = Isa::load(task.lse + tile * kQueries + v * kLanes);
    const Scores delta = Isa::load(task.delta + tile * kQueries + v * kLanes);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t place = k * kQueries + v * kLanes;
      const Scores weight = power_of_two<6>(Isa::fused(Isa::load(weights + place), power, -lse));
      Isa::store(weights + place, weight);
      Isa::store(gradients + place, (Isa::load(gradients + place) - delta) * weight * scale);
    }
  }
  spread(weights, count, task.grad_rows + offset, queries, channels, task.grad_values + first * channels);
  spread(gradients, count, task.query_rows + offset, queries, channels, task.grad_keys + first * channels);
  gather<V>(task.key_rows + first * channels, count, gradients, channels, task.grad_queries + offset);
}

void differentiate(const BackwardTask& task) {
  for (int64_t first = 0; first < task.visible; first += kBlockKeys) {
    const int64_t count = smaller(kBlockKeys, task.visible - first);
    for (int64_t tile = 0; tile * kQueries < task.count; ++tile) {
      const int64_t queries = task.count - tile * kQueries;
      if (queries <= kLanes) {
        differentiate_block<1>(task, tile, first, count);
      } else if (queries <= 2 * kLanes) {
        differentiate_block<2>(task, tile, first, count);
      } else {
        differentiate_block<3>(task, tile, first, count);
      }
    }
  }
}

constexpr Kernels kFloat{kFormat, attend, differentiate};
constexpr const Kernels& kBfloat16 = kFloat;
#endif
