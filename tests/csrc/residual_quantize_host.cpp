// Runs the kernel of the CUDA backend of `residual_quantize` on the CPU: problem from one file, results to another.
// host_kernel.py writes and reads them. -DTEAM=Threads takes a thread of the system for each of the GPU's.
#include <algorithm>

#include "block_host.h"
#include "host_files.h"
#include "../../csrc/cuda/residual_quantize/quantize.h"

#ifndef TEAM
#define TEAM Fibers
#endif

namespace block = hitsr_fast::block;
namespace residual = hitsr_fast::residual;

namespace {

struct Problem {
  int channels, batch, height, width, size, tiles, phis, num_scales, replayed, decode, inputs, per_scale, threads,
      max_ranks, strip, limit;
  float ratio;
};

template <int C>
void run(const residual::Arguments& args, const residual::Plan& plan, int threads, int most_tokens) {
  using Block = block::HostBlock<block::TEAM>;
  const auto layout = residual::layout_of(
      C, args.height, args.width, plan.ranks, threads, args.strip, most_tokens, Block::kGap);
  const std::vector<size_t> gaps = {
      layout.work - Block::kGap,
      layout.residual - Block::kGap,
      layout.tokens - Block::kGap,
      layout.taps - Block::kGap,
      layout.bytes - Block::kGap};
  for (int image = 0; image < args.batch; ++image) {
    block::run_cluster<block::TEAM>(plan.ranks, threads, layout.bytes, gaps, [&](Block& one) {
      residual::quantize<C>(one, args, image, plan.ranks);
    });
  }
}

void solve(const char* from, const char* to) {
  Reader reader(from);
  const auto& p = *reader.take<Problem>(1);
  residual::Arguments args = {};
  const auto* scales = reader.take<residual::Scale>(p.num_scales);
  int tokens = 0, most_tokens = 0;
  for (int s = 0; s < p.num_scales; ++s) {
    args.scales[s] = scales[s];
    const int count = scales[s].height * scales[s].width;
    tokens += count;
    most_tokens = std::max(most_tokens, count);
  }
  const size_t C = p.channels, map = size_t(p.batch) * C * p.height * p.width;
  const size_t codes = size_t(p.tiles) * residual::kTile;
  if (!p.decode) args.z = reader.take<float>(map);
  args.codebook = reader.take<float>(size_t(p.size) * C);
  args.mean = reader.take<float>(C);
  args.codes = reader.take<block::Word4>(codes * std::max<size_t>(C, 16) / 8);
  args.half_norms = reader.take<block::Float4>(codes / 4);
  args.exact = reader.take<block::Float4>(codes * C / 4);
  args.bounds = reader.take<float>(5);
  args.weight = reader.take<block::Float4>(p.phis * 9 * C * C / 4);
  args.bias = reader.take<float>(p.phis * C);
  args.replay = reader.take<int64_t>(size_t(p.batch) * p.replayed);

  const int skipped = args.scales[0].height * args.scales[0].width;
  std::vector<int64_t> indices(size_t(p.batch) * tokens, -1);
  std::vector<float> reconstruction(map), inputs(p.inputs ? size_t(p.batch) * (tokens - skipped) * C : 0);
  std::vector<float> reconstructions(p.per_scale ? map * p.num_scales : 0), rows(size_t(p.batch) * tokens * C);
  std::vector<uint8_t> full_scans(size_t(p.batch) * tokens);
  args.indices = indices.data();
  args.reconstruction = reconstruction.data();
  args.inputs = p.inputs ? inputs.data() : nullptr;
  args.reconstructions = p.per_scale ? reconstructions.data() : nullptr;
  args.rows = rows.data();
  args.full_scans = full_scans.data();
  args.batch = p.batch;
  args.height = p.height;
  args.width = p.width;
  args.size = p.size;
  args.tiles = p.tiles;
  args.tokens = tokens;
  args.replayed = p.replayed;
  args.num_scales = p.num_scales;
  args.ratio = p.ratio;
  const auto plan = residual::plan_for(
      p.channels, p.height, p.width, args.scales, p.num_scales, p.threads, p.max_ranks, static_cast<size_t>(p.limit));
  args.strip = p.strip ? p.strip : plan.strip;

  switch (plan.ranks ? p.channels : 0) {
    case 0: break;
    case 8: run<8>(args, plan, p.threads, most_tokens); break;
    case 16: run<16>(args, plan, p.threads, most_tokens); break;
    case 32: run<32>(args, plan, p.threads, most_tokens); break;
    case 64: run<64>(args, plan, p.threads, most_tokens); break;
    default: throw std::runtime_error("no kernel for so many channels");
  }
  std::ofstream file(to, std::ios::binary);
  write(file, std::vector<int>{plan.ranks, plan.strip, static_cast<int>(plan.bytes)});
  write(file, indices);
  write(file, reconstruction);
  write(file, inputs);
  write(file, reconstructions);
  write(file, rows);
  write(file, full_scans);
}

}  // namespace

int main(int count, char** paths) { return solve_files(count, paths, solve); }
