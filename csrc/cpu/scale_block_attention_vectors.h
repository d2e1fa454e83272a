// scale_block_attention in float32, once for each instruction set: a file that includes this defines, in the namespace of
// its kFormat and compiled for that instruction set, `struct Isa` as in plain_lanes.h.

#include "cpu/scale_block_attention_softmax.h"

namespace {

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

}  // namespace

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

#include "cpu/scale_block_attention_backward_vectors.h"
