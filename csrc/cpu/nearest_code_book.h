// Packed codebooks of the CPU backend as tensors, and what searches them.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/nearest_code.h"

namespace hitsr_fast::nearest {

// The parts of a codebook (G, K, C) of float16, bfloat16 or float32, packed for an instruction set.
std::vector<at::Tensor> pack(const at::Tensor& codebook, bool cosine, const std::string& isa_name);

// The same as each group's Codebook, which points into the parts. Throws if they were not made for such a codebook:
// they would be read out of bounds.
std::vector<Codebook> codebooks(
    const std::vector<at::Tensor>& parts, int64_t G, int64_t K, int64_t C, bool cosine, const std::string& isa_name);

// For up to `rows` rows at a time as fits. The codebook must outlive it.
template <typename T>
std::unique_ptr<Searcher<T>> make_searcher(const std::string& isa_name, const Codebook& book, int64_t rows);

// Add to the count of rows that were searched in full, since the process began; what it is then.
int64_t count_full_scans(int64_t more);

}  // namespace hitsr_fast::nearest

// Over the types that rows and codes may have.
#define HITSR_DISPATCH_CASES(...)            \
  AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)  \
  AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__)   \
  AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)
