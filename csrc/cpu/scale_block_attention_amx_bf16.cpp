// scale_block_attention on AMX with BF16: products of 16 keys or channels with 16 queries in one instruction.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/scale_block_attention.h"
#include "cpu/targets.h"

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt,amx-tile,amx-bf16")
namespace hitsr_fast::attention::amx_bf16 {
namespace {

#include "cpu/avx512.h"

using Isa = Avx512;

}  // namespace
#include "cpu/scale_block_attention_softmax.h"
namespace {

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

}  // namespace

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

}  // namespace hitsr_fast::attention::amx_bf16
HITSR_TARGET_END
#endif
