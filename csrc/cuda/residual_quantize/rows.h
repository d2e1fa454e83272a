// The rows of the search: pooled, centred, rounded to float16, with a bound on what that costs.
//
// docs/ops/nearest_code.md derives each line of the bound; kernels/nearest_code is the same in Triton.
#pragma once

#include "pool.h"

namespace hitsr_fast::residual {

constexpr float kUp = 1 + 0x1p-10f;       // over the rounding of the bound's own arithmetic
constexpr float kUnderflow = 0x1p-100f;   // more than the squares that vanish in a sum of 256
constexpr float kRange = 0x1p100f;        // of a squared length, for which the bound holds
constexpr float kSmallest = 0x1p-14f;     // least normal number of float16: what is below counts as zero on every chip
constexpr float kBeyond = -1;             // slack of a finite row beyond that range: all codes are compared
constexpr float kNotFinite = -2;          // slack of a row with NaN or infinity (or of none): its code is 0
constexpr float kInfinity = HUGE_VALF;

// Of row `lane` of a warp: twice the bound on the error of a score, and the power of two, negated, that takes a
// product of rounded values back to the scale of the codes.
struct RowState {
  float slack = kNotFinite, towards = 0;
};

// Channel `channel` of the row of a token.
template <int C>
HITSR_DEVICE float row_value(const Arguments& args, const Part& part, int token, int channel) {
  const int y = token / part.scale.width, x = token % part.scale.width;
  const Window window = window_of(y, x, part.scale, args.height, args.width);
  return mean_over(part.residual + channel, window, part.top, args.width, C + 1);
}

template <int C, class Block, class T, class Combine>
HITSR_DEVICE T over_channels(Block& block, T value, Combine combine) {
  HITSR_UNROLL
  for (int mask = Lanes<C>::kGroup / 2; mask > 0; mask /= 2) value = combine(value, block.shuffle_xor(value, mask));
  return value;
}

// Twice the bound, from the squared lengths of a centred row and of what rounding took from it.
template <int CP>
HITSR_DEVICE float slack_of(const float* bounds, float squares, float lost_squares) {
  const float longest = bounds[2], longest_error = bounds[3], longest_given = bounds[4];
  const float length = sqrtf(squares + kUnderflow) * kUp;
  const float error = (sqrtf(lost_squares + kUnderflow) + 0x1p-23f * length) * kUp;
  const float split = error * longest + (length + error) * longest_error;
  const float summed = (3 * CP + 4) * 0x1p-23f * ((length + longest) * longest + kUnderflow);
  const float whole = length + longest_given;
  const float definition = (CP + 4) * 0x1p-52f * whole * whole;
  return 2 * kUp * (split + summed + definition);
}

// Rounds `count` rows of a warp, tokens `first` and on, to kept (32, CP). A row is stretched until its largest value
// lies in [2^13, 2^14): there float16 drops at most 2^-11 of a value, or 2^-27 of the largest.
template <int C, class Block>
HITSR_DEVICE RowState round_rows(
    Block& block, const Arguments& args, const Part& part, int first, int count, uint16_t* kept) {
  using Lane = Lanes<C>;
  constexpr int CP = Lanes<C>::kPadded;
  const int lane = block.thread() % block::kWarp, group = lane / Lane::kGroup, place = lane % Lane::kGroup;
  const auto add = [](float a, float b) { return a + b; };
  const float before = args.bounds[0], after = args.bounds[1];
  RowState state;
  for (int step = 0; step < kRows; step += Lane::kGroups) {
    const int row = step + group;
    float centred[Lane::kEach], squares = 0, largest = 0;
    bool finite = true;
    HITSR_UNROLL
    for (int each = 0; each < Lane::kEach; ++each) {
      const int channel = place + each * Lane::kGroup;
      const float value = row < count ? row_value<C>(args, part, first + row, channel) : 0.f;
      if (args.rows != nullptr && row < count) {
        args.rows[(size_t(part.image) * args.tokens + part.start + first + row) * C + channel] = value;
      }
      // The scale comes in two factors, at most one before and at least one after: large values stay in range as
      // their difference is taken, and small ones keep their digits.
      centred[each] = (value * before - args.mean[channel]) * after;
      squares = fmaf(centred[each], centred[each], squares);
      largest = fmaxf(largest, fabsf(centred[each]));
      finite = finite && fabsf(value) < kInfinity;
    }
    constexpr uint32_t kAll = Lane::kGroup == block::kWarp ? 0xffffffffu : (1u << Lane::kGroup % 32) - 1;
    finite = (block.ballot(finite) >> (group * Lane::kGroup) & kAll) == kAll;
    squares = over_channels<C>(block, squares, add);
    largest = over_channels<C>(block, largest, [](float a, float b) { return fmaxf(a, b); });
    const bool in_range = finite && squares < kRange;
    const uint32_t exponent = in_range ? block::bits<uint32_t>(largest) >> 23 : 0;
    const uint32_t least = exponent < 14 ? 14 : exponent;
    const float stretch = block::bits<float>((267 - least) << 23), back = block::bits<float>((least - 13) << 23);
    float lost_squares = 0;
    HITSR_UNROLL
    for (int each = 0; each < Lane::kEach; ++each) {
      const float value = in_range ? centred[each] : 0.f, stretched = value * stretch;
      const uint16_t half = block::to_half(fabsf(stretched) < kSmallest ? 0.f : stretched);
      const float lost = fmaf(-back, block::from_half(half), value);
      lost_squares = fmaf(lost, lost, lost_squares);
      kept[row * CP + place + each * Lane::kGroup] = half;
    }
    for (int channel = C + place; channel < CP; channel += Lane::kGroup) kept[row * CP + channel] = 0;
    lost_squares = over_channels<C>(block, lost_squares, add);
    const float slack = !finite ? kNotFinite : !in_range ? kBeyond : slack_of<CP>(args.bounds, squares, lost_squares);
    // Row step + group is known to its group; lane step + group is to know it.
    const int source = lane % Lane::kGroups * Lane::kGroup;
    const float slack_here = block.shuffle(slack, source), towards_here = block.shuffle(-back, source);
    if (lane / Lane::kGroups * Lane::kGroups == step && lane < count) state = {slack_here, towards_here};
  }
  return state;
}

}  // namespace hitsr_fast::residual
