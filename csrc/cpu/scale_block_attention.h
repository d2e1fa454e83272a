// What the parts of the CPU backend of scale_block_attention share.
//
// Queries lie in the lanes of vectors and keys one after the other, so that the softmax needs no sum across lanes, and
// its weights are the second operand of the product with the values as they stand.
#pragma once

#include <cstdint>

namespace hitsr_fast::attention {

// Keys whose scores are made together. A block of keys, its values, the scores and the sums of a tile of queries share
// the first-level cache.
constexpr int64_t kBlockKeys = 64;

// How the operands lie for one instruction set.
struct Format {
  int64_t queries;   // of a tile
  int64_t rows;      // keys or channels that a register tile takes
  int64_t channels;  // are padded to a multiple of this
  bool tiles;        // the layouts of AMX
};

// Tiles of queries that go through the keys together, so that each block of keys is fetched once for all of them.
constexpr int64_t kMostTiles = 4;

// Some tiles of queries of one head, all of which see the same keys, and those keys. Layouts, with D the padded channels:
//
//            floats                              bfloat16, for AMX
//   queries  [tiles][D][queries]                 [tiles][D / 2][queries][2]
//   keys     [keys / rows][D][rows]              [keys][D]
//   values   [keys / N][D / rows][N][rows]       [keys / rows][D][rows]
//   out      [tiles][D][queries]                 the same, floats
//
// with `queries` and `rows` of the Format and N = kBlockKeys. Keys are padded to a multiple of N, with zeros as the
// channels are.
struct Task {
  const void* queries;  // with their sign turned where the factor of the scores is negative
  const void* keys;
  const void* values;
  int64_t count;     // of queries
  int64_t visible;   // keys; all of them, or some that follow those of the call before
  bool begins, ends;  // whether these are the first keys, and the last: what is known of the queries stays in the scratch
  int64_t channels;  // padded
  float scale;       // of the scores, in powers of two; not negative
  float* scratch;    // scratch_floats() of them
  float* out;        // written when the keys end, as is lse
  float* lse;        // [count], natural logarithms
};

// The same for the gradients, all in float. Layouts, of tokens or of keys:
//
//   queries, grads, grad_queries     [tiles][D][queries]
//   query_rows, grad_rows            [tiles][queries][D]
//   keys, values                     [keys / rows][D][rows]
//   key_rows                         [keys / N][D / rows][N][rows]
//   grad_keys, grad_values           [keys][D]
struct BackwardTask {
  const float *queries, *grads, *query_rows, *grad_rows;
  const float *keys, *values, *key_rows;
  const float* lse;    // of each query, in powers of two; whole tiles
  const float* delta;  // sum over channels of gradient times output; whole tiles
  int64_t count, visible, channels;  // channels: padded to whole pairs of vectors
  float scale;
  float* scratch;       // scratch_floats() of them
  float* grad_queries;  // all three are added to
  float *grad_keys, *grad_values;
};

constexpr int64_t scratch_floats(int64_t queries, int64_t channels) {
  return (2 * kBlockKeys + kMostTiles * (channels + 2) + channels) * queries;
}

#define HITSR_ATTENTION_KERNELS(isa, ...)  \
  namespace isa {                          \
  constexpr Format kFormat{__VA_ARGS__};   \
  void attend(const Task&);                \
  void differentiate(const BackwardTask&); \
  }
HITSR_ATTENTION_KERNELS(portable, 12, 4, 16, false)
#if defined(__x86_64__)
HITSR_ATTENTION_KERNELS(avx2, 24, 4, 16, false)
HITSR_ATTENTION_KERNELS(avx512, 48, 8, 16, false)
HITSR_ATTENTION_KERNELS(amx_bf16, 32, 32, 32, true)  // without `differentiate`
#endif
#undef HITSR_ATTENTION_KERNELS

}  // namespace hitsr_fast::attention
