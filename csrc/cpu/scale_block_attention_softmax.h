// The softmax of scale_block_attention, for any instruction set. As in nearest_code_search.h, everything has internal
// linkage and nothing is a template of the standard library.

namespace {

#include "cpu/power_of_two.h"

using Scores = typename Isa::Scores;
constexpr int64_t kLanes = Isa::kLanes, kQueries = kFormat.queries;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
// The peak while all scores were -infinity: finite, so that their weights are next to nothing and not NaN.
constexpr float kNoPeak = -std::numeric_limits<float>::max();
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

}  // namespace
