// The backward of scale_block_attention in float32; included by scale_block_attention_vectors.h.

namespace {

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

}  // namespace

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
