// The screen: for each row the two classes of 32 codes that score least, by float16 products with float32 sums.
//
// Codes are packed so that of the eight that one tile product takes, each of four classes has two; these two are what
// one thread holds of the sums. So a thread sees one class of each tile whole, and no minimum crosses threads.
#pragma once

#include "rows.h"

namespace hitsr_fast::residual {

constexpr int kBlocks = kRows / 16;     // blocks of 16 rows, of a warp
constexpr int kSlots = 2 * kBlocks;     // rows of which a thread holds scores: g, g + 8, g + 16, g + 24
constexpr int kListed = 2 * kClasses;   // classes of a row that the screen can name
constexpr int kNone = -1, kEveryClass = -2;  // in place of a class

// Of one row, among the classes that a thread has seen: the two least minima with their tiles, and the third.
struct Nearest {
  float best = kInfinity, second = kInfinity, third = kInfinity;
  int best_tile = 0, second_tile = 0;
};

HITSR_DEVICE void insert(Nearest& nearest, float least, int tile) {
  if (least < nearest.second) {
    nearest.third = nearest.second;
    if (least < nearest.best) {
      nearest.second = nearest.best;
      nearest.second_tile = nearest.best_tile;
      nearest.best = least;
      nearest.best_tile = tile;
    } else {
      nearest.second = least;
      nearest.second_tile = tile;
    }
  } else {
    nearest.third = fminf(nearest.third, least);
  }
}

// A thread's part of a row of CP halves, as the tile product wants it. A product does not care in which order channels
// come, so long as rows and codes agree: a thread takes neighbours, which are one load.
template <int CP>
HITSR_DEVICE void load_words(const uint16_t* row, int quarter, uint32_t (&words)[CP / 16][2]) {
  if constexpr (CP == 16) {
    const block::Word2 chunk = reinterpret_cast<const block::Word2*>(row)[quarter];
    words[0][0] = chunk.value[0];
    words[0][1] = chunk.value[1];
  } else {
    HITSR_UNROLL
    for (int j = 0; j < CP / 32; ++j) {
      const block::Word4 chunk = reinterpret_cast<const block::Word4*>(row)[4 * j + quarter];
      HITSR_UNROLL
      for (int i = 0; i < 4; ++i) words[2 * j + i / 2][i % 2] = chunk.value[i];
    }
  }
}

template <int STEPS>
using RowWords = uint32_t[kBlocks][STEPS][4];

template <int CP>
HITSR_DEVICE void load_rows(const uint16_t* kept, int lane, RowWords<CP / 16>& rows) {
  HITSR_UNROLL
  for (int m = 0; m < kBlocks; ++m) {
    HITSR_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t words[CP / 16][2];
      load_words<CP>(kept + (16 * m + 8 * half + lane / 4) * CP, lane % 4, words);
      HITSR_UNROLL
      for (int step = 0; step < CP / 16; ++step) {
        rows[m][step][half] = words[step][0];
        rows[m][step][half + 2] = words[step][1];
      }
    }
  }
}

// Of one tile in shared memory, for the rows of a warp.
template <int CP, class Block>
HITSR_DEVICE void screen_tile(
    Block& block,
    const RowWords<CP / 16>& rows,
    const float (&towards)[kSlots],
    const uint16_t* codes,
    const float* half_norms,
    int tile,
    Nearest (&nearest)[kSlots]) {
  const int lane = block.thread() % block::kWarp;
  float least[kSlots];
  HITSR_UNROLL
  for (float& value : least) value = kInfinity;
  HITSR_UNROLL_BY(4)
  for (int eight = 0; eight < kTile; eight += 8) {
    uint32_t words[CP / 16][2];
    load_words<CP>(codes + (eight + lane / 4) * CP, lane % 4, words);
    float sums[kBlocks][4] = {};
    block.multiply(sums, rows, words);
    const block::Float2 norm = reinterpret_cast<const block::Float2*>(half_norms + eight)[lane % 4];
    HITSR_UNROLL
    for (int i = 0; i < 4 * kBlocks; ++i) {
      const int slot = i / 2;
      least[slot] = fminf(least[slot], fmaf(sums[i / 4][i % 4], towards[slot], norm.value[i % 2]));
    }
  }
  HITSR_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) insert(nearest[slot], least[slot], tile);
}

// Starts the copy of a tile and its half norms.
template <int CP, class Block>
HITSR_DEVICE void fetch_tile(Block& block, const Arguments& args, int tile, uint16_t* codes, float* half_norms) {
  constexpr int kPieces = kTile * CP * 2 / 16;
  const block::Word4* from = args.codes + size_t(tile) * kPieces;
  for (int i = block.thread(); i < kPieces; i += block.threads()) {
    block.copy_async(reinterpret_cast<block::Word4*>(codes) + i, from + i);
  }
  for (int i = block.thread(); i < kTile / 4; i += block.threads()) {
    block.copy_async(half_norms + 4 * i, args.half_norms + size_t(tile) * kTile / 4 + i);
  }
}

// All tiles, for the rows that all warps of the block have rounded. Shared memory: two tiles and their half norms, of
// which the next is copied while the last is screened; before them, in the same place, the rounded rows.
template <int C, class Block>
HITSR_DEVICE void screen(
    Block& block, const Arguments& args, unsigned char* work, const RowState& state, bool busy,
    Nearest (&nearest)[kSlots]) {
  constexpr int CP = Lanes<C>::kPadded;
  const int lane = block.thread() % block::kWarp, warp = block.thread() / block::kWarp;
  auto* const codes = reinterpret_cast<uint16_t*>(work);
  auto* const half_norms = reinterpret_cast<float*>(codes + 2 * kTile * CP);
  RowWords<CP / 16> rows;
  block.sync_warp();
  load_rows<CP>(codes + warp * kRows * CP, lane, rows);
  float towards[kSlots];
  HITSR_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) towards[slot] = block.shuffle(state.towards, 8 * slot + lane / 4);
  block.sync();
  fetch_tile<CP>(block, args, 0, codes, half_norms);
  for (int tile = 0; tile < args.tiles; ++tile) {
    block.copy_wait();
    block.sync();
    const int here = tile % 2, there = 1 - here;
    if (tile + 1 < args.tiles) {
      fetch_tile<CP>(block, args, tile + 1, codes + there * kTile * CP, half_norms + there * kTile);
    }
    if (busy) {
      screen_tile<CP>(block, rows, towards, codes + here * kTile * CP, half_norms + here * kTile, tile, nearest);
    }
  }
  block.sync();
}

}  // namespace hitsr_fast::residual
