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

// The layouts of scale_block_attention.h for one type of tokens. E: float or uint16_t.
template <typename T, typename E>
class Packer {
 public:
  Packer(const Format& format, int64_t padded) : format_(format), padded_(padded) {}

  // Tokens [begin, end), which may reach beyond the last: zeros. As [tokens / outer][channels / inner][outer][inner].
  void write(const Tokens<T>& from, int64_t begin, int64_t end, int64_t outer, int64_t inner, E* to) const {
    for (int64_t k = begin; k < end; ++k) {
      E* place = to + k / outer * outer * padded_ + k % outer * inner;
      const int64_t given = k < from.count ? from.channels : 0;
      const T* row = from.row(k < from.count ? k : 0);
      for (int64_t first = 0; first < padded_; first += inner, place += outer * inner) {
        const int64_t last = std::min(first + inner, given);
        int64_t d = first;
        for (; d < last; ++d) place[d - first] = packed<E>(row[d * from.channel_stride]);
        for (; d < first + inner; ++d) place[d - first] = E(0);
      }
    }
  }

  void keys(const Tokens<T>& from, int64_t begin, int64_t end, E* to) const {
    write(from, begin, end, kTiles ? 1 : format_.rows, kTiles ? padded_ : 1, to);
  }
  void values(const Tokens<T>& from, int64_t begin, int64_t end, E* to) const {
    write(from, begin, end, kTiles ? format_.rows : kBlockKeys, kTiles ? 1 : format_.rows, to);
  }

  // `count` queries from `first` on, for a tile of which they are all.
  void queries(const Tokens<T>& from, int64_t first, int64_t count, bool negate, E* to) const {
    std::fill_n(to, padded_ * format_.queries, E(0));
    const int64_t step = from.channel_stride, row = format_.queries * kPair;
    for (int64_t q = 0; q < count; ++q) {
      const T* token = from.row(first + q);
      for (int64_t d = 0; d < from.channels / kPair * kPair; d += kPair) {
        E* place = to + d / kPair * row + q * kPair;
        for (int64_t i = 0; i < kPair; ++i) place[i] = packed<E>(negate ? -token[(d + i) * step] : token[(d + i) * step]);
      }
      if (from.channels % kPair != 0) {
        const T last = token[(from.channels - 1) * step];
        to[from.channels / kPair * row + q * kPair] = packed<E>(negate ? -last : last);
      }
    }
  }

 private:
  static constexpr bool kTiles = !std::is_same_v<E, float>;
  static constexpr int64_t kPair = kTiles ? 2 : 1;  // neighbouring channels that lie side by side

  const Format format_;
  const int64_t padded_;
};

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
