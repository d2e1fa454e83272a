// Runs the kernels of the CUDA backend of `residual_decode_backward` on the CPU, one after the other: problem from one
// file, results to another. host_backward.py writes and reads them. -DTEAM=Threads takes a thread of the system for each
// of the GPU's.
#include "block_host.h"
#include "host_files.h"
#include "../../csrc/cuda/residual_decode_backward/stages.h"

#ifndef TEAM
#define TEAM Fibers
#endif

namespace backward = hitsr_fast::residual_backward;
namespace block = hitsr_fast::block;

namespace {

struct Problem {
  int channels, batch, height, width, size, phis, num_scales, per_scale, threads, blocks;
  float ratio;
};

using Block = block::HostBlock<block::TEAM>;

// Where nothing may be touched, of a kernel with a layout and of others.
std::vector<size_t> gaps_of(const backward::Arguments& args, int channels, size_t bytes) {
  if (bytes == 0) return {};
  const auto layout = backward::layout_of(args, channels, Block::kGap);
  if (bytes != layout.bytes) return {0, bytes - Block::kGap};
  return {
      layout.filters - Block::kGap,
      layout.spans - Block::kGap,
      layout.strip - Block::kGap,
      layout.codes - Block::kGap,
      layout.tile - Block::kGap,
      layout.bytes - Block::kGap};
}

template <int C, int THREADS>
void run(backward::Arguments& args, bool per_scale) {
  const auto floats = backward::workspace_of(args, C, THREADS, per_scale);
  // NaN, as memory that nobody has written.
  const auto make = [](int64_t count) { return std::vector<float>(static_cast<size_t>(count), NAN); };
  auto reached = make(floats.reached), rows = make(floats.rows), edges = make(floats.edges);
  auto partials = make(floats.partials);
  args.reached = per_scale ? reached.data() : nullptr;
  args.rows = rows.data();
  args.edges = edges.data();
  args.partials = partials.data();
  backward::each_stage<C, THREADS>(
      args,
      [&](auto stage, int blocks, size_t bytes) {
        for (int number = 0; number < blocks; ++number) {
          block::run_cluster<block::TEAM>(1, THREADS, bytes, gaps_of(args, C, bytes), [&](Block& one) {
            decltype(stage)::template run<C, THREADS>(one, args, number);
          });
        }
        return true;
      },
      Block::kGap);
}

void solve(const char* from, const char* to) {
  Reader reader(from);
  const auto& p = *reader.take<Problem>(1);
  backward::Arguments args = {};
  args.batch = p.batch;
  args.height = p.height;
  args.width = p.width;
  args.phis = p.phis;
  args.num_scales = p.num_scales;
  args.ratio = p.ratio;
  const auto* scales = reader.take<backward::Scale>(p.num_scales);
  for (int s = 0; s < p.num_scales; ++s) args.parts[s].scale = scales[s];
  backward::plan(args, p.channels, p.blocks);
  const size_t C = p.channels, map = size_t(p.batch) * C * p.height * p.width;
  const size_t tokens = size_t(p.batch) * args.tokens;
  args.grad = reader.take<float>(map);
  if (p.per_scale) args.grad_per_scale = reader.take<float>(map * p.num_scales);
  args.indices = reader.take<int64_t>(tokens);
  args.codes = reader.take<int32_t>(tokens);
  args.order = reader.take<int64_t>(tokens);
  args.codebook = reader.take<float>(size_t(p.size) * C);
  args.weight = reader.take<block::Float4>(p.phis * 9 * C * C / 4);
  std::vector<float> codebook(p.size * C), weight(p.phis * 9 * C * C, NAN), bias(p.phis * C, NAN);
  args.grad_codebook = codebook.data();
  args.grad_weight = weight.data();
  args.grad_bias = bias.data();
  switch (p.channels * 1000 + p.threads) {
    case 8064: run<8, 64>(args, p.per_scale); break;
    case 16064: run<16, 64>(args, p.per_scale); break;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which take their time
    case 8256: run<8, 256>(args, p.per_scale); break;
    case 16256: run<16, 256>(args, p.per_scale); break;
    case 32256: run<32, 256>(args, p.per_scale); break;
    case 64256: run<64, 256>(args, p.per_scale); break;
#endif
    default: throw std::runtime_error("no kernel for so many channels and threads");
  }
  std::ofstream file(to, std::ios::binary);
  write(file, std::vector<int>{args.blocks, args.work, static_cast<int>(backward::layout_of(args, p.channels).bytes)});
  write(file, codebook);
  write(file, weight);
  write(file, bias);
}

}  // namespace

int main(int count, char** paths) { return solve_files(count, paths, solve); }
