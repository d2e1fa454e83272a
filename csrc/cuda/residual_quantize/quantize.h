// The whole kernel: all scales of one image, by one block or by a cluster of two that have half of its rows each.
#pragma once

#include "search.h"
#include "spread.h"

namespace hitsr_fast::residual {

// The codes that were given for a scale; each block reads them all, and stores its part. Nobody has looked at them
// before: beyond the codebook they count as its first or last one.
template <class Block>
HITSR_DEVICE void replay(Block& block, const Arguments& args, const Part& part, int ranks) {
  const int count = part.scale.height * part.scale.width, own = count / ranks, first = block.rank() * own;
  const int64_t* codes = args.replay + size_t(part.image) * args.replayed + part.start;
  int64_t* indices = args.indices + size_t(part.image) * args.tokens + part.start;
  for (int token = block.thread(); token < count; token += block.threads()) {
    const int64_t code = codes[token], last = args.size - 1;
    part.tokens[token] = static_cast<int>(code < 0 ? 0 : code > last ? last : code);
    if (token >= first && token < first + own) indices[token] = code;
  }
}

// `ranks` blocks share image `image`. A scale's tokens reach all of them before any goes on; the next scale's go to
// other memory, so that one barrier of the cluster a scale is enough.
template <int C, class Block>
HITSR_DEVICE void quantize(Block& block, const Arguments& args, int image, int ranks) {
  int most_tokens = 0;
  for (int s = 0; s < args.num_scales; ++s) {
    const int tokens = args.scales[s].height * args.scales[s].width;
    most_tokens = tokens > most_tokens ? tokens : most_tokens;
  }
  const Layout layout =
      layout_of(C, args.height, args.width, ranks, block.threads(), args.strip, most_tokens, Block::kGap);
  unsigned char* const shared = block.shared();
  int* const tokens = reinterpret_cast<int*>(shared + layout.tokens);
  Taps* const taps = reinterpret_cast<Taps*>(shared + layout.taps);
  Part part;
  part.image = image;
  part.rows = args.height / ranks;
  part.top = block.rank() * part.rows;
  part.residual = reinterpret_cast<float*>(shared + layout.residual);
  part.reconstruction = args.reconstruction + (size_t(image) * args.height + part.top) * args.width * C;
  part.taps = taps;
  part.work = shared + layout.work;
  part.start = 0;

  if (args.z != nullptr) load_residual<C>(block, args, part);
  block.sync_cluster();
  for (int s = 0; s < args.num_scales; ++s) {
    part.scale = args.scales[s];
    part.tokens = tokens + s % ranks * most_tokens;
    fill_taps(block, args, part.scale, taps);
    if (part.start < args.replayed) {
      replay(block, args, part, ranks);
    } else {
      search<C>(block, args, part, ranks);
    }
    block.sync_cluster();
    spread<C>(block, args, part);
    if (args.reconstructions != nullptr) store_reconstruction<C>(block, args, part, s);
    part.start += part.scale.height * part.scale.width;
    if (args.inputs != nullptr && s + 1 < args.num_scales) store_inputs<C>(block, args, part, s + 1, part.start);
  }
  finish<C>(block, args, part);
}

}  // namespace hitsr_fast::residual
