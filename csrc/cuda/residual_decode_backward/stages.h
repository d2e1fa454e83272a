// The kernels in their order: each has a name, blocks, and bytes of shared memory of a block.
#pragma once

#include "sums.h"

namespace hitsr_fast::residual_backward {

struct AddUp {
  template <int C, int THREADS, class Block>
  static HITSR_DEVICE void run(Block& block, const Arguments& args, int number) {
    add_up<C, THREADS>(block, args, number);
  }
};
struct TokenGradients {
  template <int C, int THREADS, class Block>
  static HITSR_DEVICE void run(Block& block, const Arguments& args, int number) {
    token_gradients<C, THREADS>(block, args, number);
  }
};
struct SumRuns {
  template <int C, int THREADS, class Block>
  static HITSR_DEVICE void run(Block& block, const Arguments& args, int number) {
    sum_runs<C, THREADS>(block, args, number);
  }
};
struct Combine {
  template <int C, int THREADS, class Block>
  static HITSR_DEVICE void run(Block& block, const Arguments& args, int number) {
    combine<C, THREADS>(block, args, number);
  }
};

// Calls launch(stage, blocks, bytes) for each that has something to do, until one is false.
template <int C, int THREADS, class Launch>
bool each_stage(const Arguments& args, Launch launch, size_t gap = 0) {
  const auto some = [&](auto stage, int64_t blocks, size_t bytes) {
    return blocks == 0 || launch(stage, static_cast<int>(blocks), bytes);
  };
  const int64_t size = int64_t(args.batch) * C * args.height * args.width, chunks = chunks_of(args);
  constexpr int kGroups = THREADS / residual::Lanes<C>::kGroup;
  return some(AddUp(), args.reached == nullptr ? 0 : (size + THREADS - 1) / THREADS, 0) &&
         some(TokenGradients(), args.blocks, layout_of(args, C, gap).bytes) &&
         some(SumRuns(), (chunks + kGroups - 1) / kGroups, 0) &&
         some(Combine(), args.phis * 3 * kOfTapRow<C> + chunks, THREADS * sizeof(block::Float4) + 2 * gap);
}

}  // namespace hitsr_fast::residual_backward
