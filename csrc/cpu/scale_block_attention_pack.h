// What the forward and the backward of the CPU backend of scale_block_attention share: memory, and the layouts of
// scale_block_attention.h.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/scale_block_attention.h"

namespace hitsr_fast::attention {

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Memory for `count` elements, on a cache line.
template <typename E>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : memory_(at::empty({count * static_cast<int64_t>(sizeof(E)) + 64}, at::kByte)),
        data_(reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(memory_.data_ptr()) + 63) / 64 * 64)) {}
  E* at(int64_t i) const { return data_ + i; }

 private:
  at::Tensor memory_;
  E* data_;
};

// The tokens of one head.
template <typename T>
struct Tokens {
  const T* data;
  int64_t count, channels, stride, channel_stride;

  Tokens(const at::Tensor& tensor, int64_t batch, int64_t head)
      : data(tensor.const_data_ptr<T>() + batch * tensor.stride(0) + head * tensor.stride(2)),
        count(tensor.size(1)),
        channels(tensor.size(3)),
        stride(tensor.stride(1)),
        channel_stride(tensor.stride(3)) {}

  // `count` of them, from `first` on.
  Tokens part(int64_t first, int64_t count) const {
    Tokens found = *this;
    found.data = row(first);
    found.count = count;
    return found;
  }
  const T* row(int64_t token) const { return data + token * stride; }
  // The same, and asks for a row that is read soon: rows often lie a page apart, where no processor looks by itself.
  const T* next_row(int64_t token) const {
    constexpr int64_t kAhead = 6, kLine = 64 / sizeof(T);
    for (int64_t d = 0; d < channels && channel_stride == 1; d += kLine) __builtin_prefetch(row(token + kAhead) + d);
    return row(token);
  }
};

// A number as a kernel reads it: a float, or the bits of a bfloat16.
template <typename E, typename T>
E packed(T value) {
  if constexpr (std::is_same_v<E, float>) {
    return static_cast<float>(value);
  } else {
    static_assert(std::is_same_v<T, at::BFloat16>);
    return value.x;
  }
}

// The layouts of scale_block_attention.h for one type of tokens, each from its first token on and, beyond the last one,
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
        from, whole, format_.queries, [=](T value) { return packed<E>(negate ? -value : value); }, to);
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
    for (int64_t d = 0; d < channels; ++d) to[d] = static_cast<T>(place[d * group]);
  }
}

// Queries of one block, for one task.
struct Span {
  int64_t first, count, visible;
};

inline std::vector<Span> spans_of(at::IntArrayRef block_lengths, int64_t cached, int64_t most) {
  std::vector<Span> spans;
  int64_t first = 0;
  for (const int64_t length : block_lengths) {
    const int64_t end = first + length;
    for (; first < end; first += most) spans.push_back({first, std::min(most, end - first), cached + end});
    first = end;
  }
  return spans;
}

}  // namespace hitsr_fast::attention
