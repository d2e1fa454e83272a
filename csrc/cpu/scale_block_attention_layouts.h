// How the operands of the CPU backend of scale_block_attention lie, and what brings them so.
//
// Queries lie in the lanes of vectors and keys one after the other, so that the softmax needs no sum across lanes, and
// its weights are the second operand of the product with the values as they stand.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "tensor.h"

namespace hitsr_fast {
namespace {

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

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// The tokens of one head.
template <typename T>
struct Tokens {
  const T* first;
  int64_t count, channels, stride, channel_stride;

  Tokens(const Tensor& tensor, int64_t batch, int64_t head)
      : first(data<const T>(tensor) + batch * tensor.stride(0) + head * tensor.stride(2)),
        count(tensor.size(1)),
        channels(tensor.size(3)),
        stride(tensor.stride(1)),
        channel_stride(tensor.stride(3)) {}

  // `count` of them, from `from` on.
  Tokens part(int64_t from, int64_t count) const {
    Tokens found = *this;
    found.first = row(from);
    found.count = count;
    return found;
  }
  const T* row(int64_t token) const { return first + token * stride; }
  // The same, and asks for a row that is read soon: rows often lie a page apart, where no processor looks by itself.
  const T* next_row(int64_t token) const {
    constexpr int64_t kAhead = 6, kLine = 64 / sizeof(T);
    for (int64_t d = 0; d < channels && channel_stride == 1; d += kLine) __builtin_prefetch(row(token + kAhead) + d);
    return row(token);
  }
};

// A number as a kernel reads it: a float, or the bits of a bfloat16.
template <typename E, typename T>
E packed(T value, bool negate = false) {
  if constexpr (std::is_same_v<E, float>) {
    return negate ? -wide(value) : wide(value);
  } else {
    static_assert(std::is_same_v<T, Bfloat16>);
    return negate ? value.bits ^ 0x8000 : value.bits;
  }
}

// The layouts above for one type of tokens, each from its first token on and, beyond the last one,
// filled with zeros. E: float, or uint16_t as AMX takes it.
template <typename T, typename E>
class Packer {
 public:
  Packer(const Format& format, int64_t padded) : format_(format), padded_(padded) {}

  void keys(const Tokens<T>& from, int64_t whole, E* to) const {
    if constexpr (kTiles) {
      rows(from, whole, to);
    } else {
      columns<1>(from, whole, format_.rows, [](T value) { return packed<E>(value); }, to);
    }
  }
  void values(const Tokens<T>& from, int64_t whole, E* to) const {
    if constexpr (kTiles) {
      columns<1>(from, whole, format_.rows, [](T value) { return packed<E>(value); }, to);
    } else {
      for (int64_t first = 0; first < whole; first += kBlockKeys, to += kBlockKeys * padded_) {
        panels(from.part(first, std::clamp(from.count - first, int64_t{0}, kBlockKeys)), to);
      }
    }
  }
  void queries(const Tokens<T>& from, int64_t whole, bool negate, E* to) const {
    columns<kTiles ? 2 : 1>(
        from, whole, format_.queries, [=](T value) { return packed<E>(value, negate); }, to);
  }

  // [whole][D]
  void rows(const Tokens<T>& from, int64_t whole, E* to) const {
    for (int64_t n = 0; n < from.count; ++n, to += padded_) {
      copy(from.next_row(n), from.channels, from.channel_stride, to);
      std::fill(to + from.channels, to + padded_, E(0));
    }
    std::fill_n(to, (whole - from.count) * padded_, E(0));
  }

 private:
  static constexpr bool kTiles = !std::is_same_v<E, float>;

  static void copy(const T* from, int64_t count, int64_t stride, E* to) {
    if (stride == 1) {  // told apart for the compiler, which makes vectors of it
      for (int64_t d = 0; d < count; ++d) to[d] = packed<E>(from[d]);
    } else {
      for (int64_t d = 0; d < count; ++d) to[d] = packed<E>(from[d * stride]);
    }
  }

  // [D / rows][N][rows]
  void panels(const Tokens<T>& from, E* to) const {
    if (from.count < kBlockKeys || from.channels < padded_) std::fill_n(to, kBlockKeys * padded_, E(0));
    for (int64_t n = 0; n < from.count; ++n) {
      const T* token = from.next_row(n);
      E* place = to + n * format_.rows;
      for (int64_t d = 0; d < from.channels; d += format_.rows, place += kBlockKeys * format_.rows) {
        copy(token + d * from.channel_stride, std::min(format_.rows, from.channels - d), from.channel_stride, place);
      }
    }
  }

  // [whole / group][D / kPair][group][kPair]
  template <int64_t kPair, typename F>
  void columns(const Tokens<T>& from, int64_t whole, int64_t group, const F& convert, E* to) const {
    if (from.count < whole || from.channels < padded_) std::fill_n(to, whole * padded_, E(0));
    const int64_t step = from.channel_stride;
    for (int64_t first = 0; first < from.count; first += group, to += group * padded_) {
      const int64_t count = std::min(group, from.count - first);
      for (int64_t n = 0; n < count; ++n) {
        const T* token = from.next_row(first + n);
        E* place = to + n * kPair;
        int64_t d = 0;
        for (; d + kPair <= from.channels; d += kPair, place += group * kPair) {
          for (int64_t i = 0; i < kPair; ++i) place[i] = convert(token[(d + i) * step]);
        }
        if (d < from.channels) *place = convert(token[d * step]);
      }
    }
  }

  const Format format_;
  const int64_t padded_;
};

// What `columns` of floats writes, back into rows of `channels` with `stride` from one to the next.
template <typename T>
void unpack(const float* from, int64_t count, int64_t group, int64_t padded, int64_t channels, int64_t stride, T* to) {
  for (int64_t n = 0; n < count; ++n, to += stride) {
    const float* place = from + n / group * group * padded + n % group;
    for (int64_t d = 0; d < channels; ++d) narrow(place[d * group], to + d);
  }
}

// Queries of one block, for one task.
struct Span {
  int64_t first, count, visible;
};

std::vector<Span> spans_of(Shape block_lengths, int64_t cached, int64_t most) {
  std::vector<Span> spans;
  int64_t first = 0;
  for (const int64_t length : block_lengths) {
    const int64_t end = first + length;
    for (; first < end; first += most) spans.push_back({first, std::min(most, end - first), cached + end});
    first = end;
  }
  return spans;
}

}  // namespace
}  // namespace hitsr_fast
