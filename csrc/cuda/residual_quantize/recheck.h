// The re-check: exact distances in the classes that the screen leaves, and the winner.
//
// Distances in float32 leave one code in nearly every case; the definition, in float64, decides the other rows. The
// translation unit is compiled without fusing products into sums: the definition multiplies and adds in two steps.
#pragma once

#include "screen.h"

namespace hitsr_fast::residual {

constexpr int kTeam = block::kWarp / kTogether;   // threads that re-check a row
constexpr int kOwn = kMembers / kTeam;            // codes of a class that each of them compares

// Shared memory of a warp.
template <int C>
struct Recheck {
  int listed[kRows][kListed];     // classes that are left of each row, kNone, or kEveryClass
  float rows[kTogether][C + 4];   // as they were pooled
};

// Lists the classes whose minimum is within the bound of the least.
template <int C, class Block>
HITSR_DEVICE void list_classes(
    Block& block, const RowState& state, const Nearest (&nearest)[kSlots], Recheck<C>& recheck) {
  const int lane = block.thread() % block::kWarp, quarter = lane % 4;
  HITSR_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) {
    const int row = 8 * slot + lane / 4;
    const Nearest& mine = nearest[slot];
    const float slack = block.shuffle(state.slack, row);
    float lowest = fminf(mine.best, block.shuffle_xor(mine.best, 1));
    lowest = fminf(lowest, block.shuffle_xor(lowest, 2));
    const float limit = lowest + slack + 0x1p-22f * fabsf(lowest);
    const bool screened = slack >= 0, every = slack == kBeyond || (screened && mine.third <= limit);
    const auto entry = [&](float least, int tile) {
      return every ? kEveryClass : screened && least <= limit ? tile * kClasses + quarter : kNone;
    };
    recheck.listed[row][2 * quarter] = entry(mine.best, mine.best_tile);
    recheck.listed[row][2 * quarter + 1] = entry(mine.second, mine.second_tile);
  }
}

// The nearest code that a thread has seen, its distance, and that of the next.
template <class T>
struct Winner {
  T best = kInfinity, second = kInfinity;
  int code = 0;
};

// Ties take the lowest index.
template <class T>
HITSR_DEVICE void merge(Winner<T>& mine, T best, T second, int code) {
  const bool other = best < mine.best || (best == mine.best && code < mine.code);
  const T losing = other ? mine.best : best;
  mine.second = fmin(losing, fmin(mine.second, second));
  mine.code = other ? code : mine.code;
  mine.best = other ? best : mine.best;
}

// What a code differs by in one channel: scaled in float32, where large values must not overflow and small ones must
// keep their digits; as it is for the definition.
HITSR_DEVICE float apart(float value, float code, const float* bounds) {
  return fmaf(code, -bounds[0], value * bounds[0]) * bounds[1];
}
HITSR_DEVICE double apart(double value, double code, const float*) { return value - code; }

// Compares the thread's codes of the classes in `list`, or of all where `every` is set.
template <class T, int C>
HITSR_DEVICE Winner<T> compare(const Arguments& args, const float* row, const int* list, uint32_t left, bool every,
                               int member) {
  Winner<T> winner;
  const int count = every ? args.tiles * kClasses : block::count_bits(left);
  for (int i = 0; i < count; ++i) {
    int number = i;
    if (!every) {
      number = list[block::lowest_bit(left)];
      left &= left - 1;
    }
    const block::Float4* code = args.exact + (size_t(number) * C * kMembers + member) / kOwn;
    T distance[kOwn] = {};
    HITSR_UNROLL_BY(8)
    for (int channel = 0; channel < C; ++channel) {
      const block::Float4 values = code[channel * (kMembers / kOwn)];
      HITSR_UNROLL
      for (int own = 0; own < kOwn; ++own) {
        const T difference = apart(T(row[channel]), T(values.value[own]), args.bounds);
        distance[own] += difference * difference;
      }
    }
    HITSR_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      const int index = number * kMembers + member + own;
      if (index < args.size) merge<T>(winner, distance[own], kInfinity, index);
    }
  }
  return winner;
}

template <class T, class Block>
HITSR_DEVICE void merge_team(Block& block, Winner<T>& winner) {
  HITSR_UNROLL
  for (int mask = 1; mask < kTeam; mask *= 2) {
    const T best = block.shuffle_xor(winner.best, mask), second = block.shuffle_xor(winner.second, mask);
    merge(winner, best, second, block.shuffle_xor(winner.code, mask));
  }
}

// Codes of `count` rows of a warp, tokens `first` and on, to every block of the image and to `indices`.
template <int C, class Block>
HITSR_DEVICE void recheck_rows(
    Block& block, const Arguments& args, const Part& part, const RowState& state, int first, int count, int ranks,
    Recheck<C>& recheck) {
  static_assert(kOwn == 4, "a thread's codes are one load");
  constexpr int CP = Lanes<C>::kPadded;
  const int lane = block.thread() % block::kWarp, team = lane / kTeam;
  for (int begin = 0; begin < count; begin += kTogether) {
    block.sync_warp();
    for (int i = lane; i < kTogether * C; i += block::kWarp) {
      const int row = i / C;
      if (begin + row < count) {
        recheck.rows[row][i % C] = row_value<C>(args, part, first + begin + row, i % C);
      }
    }
    block.sync_warp();
    const int row = begin + team;
    const int* list = recheck.listed[row];
    const int entry = list[lane % kTeam];
    const uint32_t left = block.ballot(entry >= 0) >> (team * kTeam) & ((1u << kTeam) - 1);
    const bool every = (block.ballot(entry == kEveryClass) >> (team * kTeam) & ((1u << kTeam) - 1)) != 0;
    const float slack = block.shuffle(state.slack, row);
    const float* values = recheck.rows[team];
    const int member = lane % kTeam * kOwn;

    auto winner = compare<float, C>(args, values, list, left, every, member);
    merge_team(block, winner);
    int code = winner.code;
    const float near = winner.best + kUnderflow + winner.best * ((CP + 4) * 0x1p-22f);
    const bool undecided = slack != kNotFinite && (winner.second <= near || slack == kBeyond);
    if (block.ballot(undecided) != 0) {
      auto exact = compare<double, C>(args, values, list, undecided ? left : 0, undecided && every, member);
      merge_team(block, exact);
      code = undecided ? exact.code : code;
    }
    if (lane % kTeam == 0 && row < count) {
      const int token = first + row;
      for (int rank = 0; rank < ranks; ++rank) block.remote(part.tokens, rank)[token] = code;
      const size_t place = size_t(part.image) * args.tokens + part.start + token;
      args.indices[place] = code;
      if (args.full_scans != nullptr) args.full_scans[place] = every;
    }
  }
}

}  // namespace hitsr_fast::residual
