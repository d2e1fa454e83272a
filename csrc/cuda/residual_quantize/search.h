// One scale's search: the tokens of a part, as many rows at a time as the block's warps hold.
#pragma once

#include "recheck.h"

namespace hitsr_fast::residual {

template <int C, class Block>
HITSR_DEVICE void search(Block& block, const Arguments& args, const Part& part, int ranks) {
  const int warp = block.thread() / block::kWarp, warps = block.threads() / block::kWarp;
  const int first = part.top * part.scale.height / args.height * part.scale.width;
  const int count = part.scale.height * part.scale.width / ranks;
  auto* const kept = reinterpret_cast<uint16_t*>(part.work) + warp * kRows * Lanes<C>::kPadded;
  auto& recheck = reinterpret_cast<Recheck<C>*>(part.work)[warp];
  for (int begin = 0; begin < count; begin += warps * kRows) {
    const int start = begin + warp * kRows;
    const int left = count - start, mine = left < 0 ? 0 : left < kRows ? left : kRows;
    RowState state;
    Nearest nearest[kSlots];
    if (mine > 0) state = round_rows<C>(block, args, part, first + start, mine, kept);
    screen<C>(block, args, part.work, state, mine > 0, nearest);
    if (mine > 0) {
      list_classes(block, state, nearest, recheck);
      recheck_rows<C>(block, args, part, state, first + start, mine, ranks, recheck);
    }
    block.sync();
  }
}

}  // namespace hitsr_fast::residual
