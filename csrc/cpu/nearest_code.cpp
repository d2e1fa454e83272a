// CPU backend of nearest_code: the loop over rows of all groups.
#include "cpu/nearest_code.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "check.h"
#include "cpu/instruction_sets.h"
#include "cpu/nearest_code_book.h"

namespace hitsr_fast {
namespace {

constexpr int64_t kSmallestShare = 48;  // rows that are worth a thread

// maps: (G, B, H, W, C), of any strides; parts: of a codebook packed for the same isa. Returns (G, B * H * W).
at::Tensor nearest_code_search(
    const at::Tensor& maps, const std::vector<at::Tensor>& parts, int64_t K, bool cosine, const std::string& isa) {
  check_cpu(maps, "maps");
  TORCH_CHECK_VALUE(maps.dim() == 5, "maps: expected shape (G, B, H, W, C), found ", maps.sizes());
  const int64_t G = maps.size(0), height = maps.size(2), width = maps.size(3), N = maps.size(1) * height * width;
  const auto books = nearest::codebooks(parts, G, K, maps.size(4), cosine, isa);
  at::Tensor indices = at::empty({G, N}, maps.options().dtype(at::kLong));
  if (N == 0) return indices;
  AT_DISPATCH_SWITCH(maps.scalar_type(), "nearest_code_search", HITSR_DISPATCH_CASES([&] {
    at::parallel_for(0, G * N, kSmallestShare, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last;) {
        const int64_t g = row / N, begin = row % N, end = std::min(N, begin + last - row);
        const nearest::Rows<scalar_t> rows{
            maps.const_data_ptr<scalar_t>() + g * maps.stride(0), height, width,
            maps.stride(1), maps.stride(2), maps.stride(3), maps.stride(4)};
        const auto searcher = nearest::make_searcher<scalar_t>(isa, books[g], end - begin);
        nearest::count_full_scans(searcher->search(rows, begin, end, indices.data_ptr<int64_t>() + row));
        row += end - begin;
      }
    });
  }));
  return indices;
}

int64_t nearest_code_full_scans() { return nearest::count_full_scans(0); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  library.def("_nearest_code_isas() -> str[]", &isa_names);
  library.def("_nearest_code_full_scans() -> int", &nearest_code_full_scans);
  library.def("_nearest_code_pack(Tensor codebook, bool cosine, str isa) -> Tensor[]", &nearest::pack);
  library.def(
      "_nearest_code_search(Tensor maps, Tensor[] parts, int K, bool cosine, str isa) -> Tensor", &nearest_code_search);
}

}  // namespace hitsr_fast
