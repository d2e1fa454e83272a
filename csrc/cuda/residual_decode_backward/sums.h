// From the gradients of tokens to those of codes, and from each block's share of phi's gradient to the whole.
//
// Tokens come sorted by code. A group of threads sums a chunk of them, run by run. A run inside the chunk is done; what
// a chunk has of a run that crosses its edges it leaves aside, and one block for each such run adds that up. So it takes
// no longer where one code has all tokens, and the order of sums is always the same.
#pragma once

#include "../residual_quantize/lanes.h"
#include "tokens.h"

namespace hitsr_fast::residual_backward {

template <int C, int THREADS, class Block>
HITSR_DEVICE void sum_runs(Block& block, const Arguments& args, int number) {
  using Lane = residual::Lanes<C>;
  constexpr int kEach = Lane::kEach, kTogether = 8;
  const int chunk = number * (THREADS / Lane::kGroup) + block.thread() / Lane::kGroup;
  const int channel = block.thread() % Lane::kGroup, all = args.batch * args.tokens;
  const int begin = chunk * kChunk, end = begin + kChunk < all ? begin + kChunk : all;
  if (begin >= end) return;
  int code = args.codes[begin];
  bool before = begin > 0 && args.codes[begin - 1] == code;  // the run began in another chunk
  const bool after = end < all && args.codes[end] == args.codes[end - 1];
  float* const head = args.edges + size_t(chunk) * C;
  float* const tail = head + size_t(chunks_of(args)) * C;
  float sums[kEach] = {};
  const auto store = [&](float* to) {
    HITSR_UNROLL
    for (int each = 0; each < kEach; ++each) {
      to[channel + each * Lane::kGroup] = sums[each];
      sums[each] = 0;
    }
  };
  for (int first = begin; first < end; first += kTogether) {
    int codes[kTogether];
    float values[kTogether][kEach];
    HITSR_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      const int place = first + i < end ? first + i : end - 1;
      codes[i] = args.codes[place];
      const float* row = args.rows + static_cast<size_t>(args.order[place]) * C + channel;
      HITSR_UNROLL
      for (int each = 0; each < kEach; ++each) {
        values[i][each] = row[each * Lane::kGroup];
        for (int slice = 1; slice < args.tap_rows; ++slice) {
          values[i][each] += row[size_t(slice) * all * C + each * Lane::kGroup];
        }
      }
    }
    HITSR_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= end) break;
      if (codes[i] != code) {
        store(before ? head : args.grad_codebook + size_t(code) * C);
        before = false;
        code = codes[i];
      }
      HITSR_UNROLL
      for (int each = 0; each < kEach; ++each) sums[each] += values[i][each];
    }
  }
  store(before ? head : after ? tail : args.grad_codebook + size_t(code) * C);
}

// Where four values go that are summed.
struct Target {
  float* to;
  int stride;
};

// Blocks of `combine` for each phi: 32 times four values each.
template <int C>
constexpr int kOfTapRow = (share_size(C) / 4 + block::kWarp - 1) / block::kWarp;

// Adds every `step`-th of `count` vectors from number `first` on, four values of each.
HITSR_DEVICE void add_vectors(
    const float* values, size_t stride, int first, int count, int step, block::Float4& sum) {
  HITSR_UNROLL_BY(4)
  for (int i = first; i < count; i += step) {
    const block::Float4 four = *reinterpret_cast<const block::Float4*>(values + i * stride);
    HITSR_UNROLL
    for (int j = 0; j < 4; ++j) sum.value[j] += four.value[j];
  }
}

// A warp's part of the gradient of a row of phi's taps, or of the bias, which the middle row has.
template <int C, int THREADS>
HITSR_DEVICE Target add_shares(const Arguments& args, int number, int warp, int lane, block::Float4& sum) {
  constexpr int kSize = share_size(C), kShares = shares_of(C, THREADS);
  const int phi = number / (3 * kOfTapRow<C>), tap_row = number / kOfTapRow<C> % 3;
  const int place = (number % kOfTapRow<C> * block::kWarp + lane) * 4;
  if (place >= kSize) return {nullptr, 0};
  for (int s = 0; s < args.num_scales && args.ratio != 0; ++s) {
    const Part& part = args.parts[s];
    if (part.scale.phi != phi) continue;
    const float* shares = args.partials + size_t(part.first + tap_row * part.blocks) * kShares * kSize + place;
    add_vectors(shares, kSize, warp, part.blocks * kShares, THREADS / block::kWarp, sum);
  }
  HITSR_UNROLL
  for (int i = 0; i < 4; ++i) sum.value[i] *= args.ratio;
  const int tap = place / (C * C), pair = place % (C * C);  // of the output and of the input channel
  if (tap < 3) return {args.grad_weight + (size_t(phi) * C * C + pair) * 9 + tap_row * 3 + tap, 9};
  return {tap_row == 1 ? args.grad_bias + phi * C + pair : nullptr, 1};
}

// A warp's part of the gradient of a code whose tokens begin in a chunk and go on after it, if there is one.
template <int C, int THREADS>
HITSR_DEVICE Target add_edges(const Arguments& args, int chunk, int warp, int lane, block::Float4& sum) {
  const int all = args.batch * args.tokens, begin = chunk * kChunk, end = begin + kChunk;
  if (lane * 4 >= C || end >= all) return {nullptr, 0};
  const int code = args.codes[end - 1];
  if (args.codes[end] != code || (begin > 0 && args.codes[begin - 1] == code)) return {nullptr, 0};
  int low = end, high = all;  // the end of the run
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (args.codes[middle] == code) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const float* heads = args.edges + size_t(chunk + 1) * C + lane * 4;
  const float* tail = heads + size_t(chunks_of(args) - 1) * C;
  if (warp == 0) sum = *reinterpret_cast<const block::Float4*>(tail);
  add_vectors(heads, C, warp, ceil_div(low, kChunk) - chunk - 1, THREADS / block::kWarp, sum);
  return {args.grad_codebook + size_t(code) * C + lane * 4, 1};
}

// The second step of both sums: each warp has its part of the vectors, and the first adds up what the others have.
template <int C, int THREADS, class Block>
HITSR_DEVICE void combine(Block& block, const Arguments& args, int number) {
  const int warp = block.thread() / block::kWarp, lane = block.thread() % block::kWarp;
  const int of_phis = args.phis * 3 * kOfTapRow<C>;
  auto* const sums = reinterpret_cast<block::Float4*>(block.shared() + Block::kGap);
  block::Float4 sum = {};
  const Target target = number < of_phis ? add_shares<C, THREADS>(args, number, warp, lane, sum)
                                         : add_edges<C, THREADS>(args, number - of_phis, warp, lane, sum);
  sums[block.thread()] = sum;
  block.sync();
  if (warp > 0 || target.to == nullptr) return;
  for (int other = 1; other < THREADS / block::kWarp; ++other) {
    HITSR_UNROLL
    for (int i = 0; i < 4; ++i) sum.value[i] += sums[other * block::kWarp + lane].value[i];
  }
  HITSR_UNROLL
  for (int i = 0; i < 4; ++i) target.to[i * target.stride] = sum.value[i];
}

}  // namespace hitsr_fast::residual_backward
