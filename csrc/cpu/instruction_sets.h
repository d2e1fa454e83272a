// The instruction sets that the CPU backends are compiled for, and which of them this machine has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hitsr_fast {

struct IsaTraits {
  const char* name;
  int64_t lanes;                       // floats in a vector
  int64_t (*steps)(int64_t channels);  // of nearest_code's screen
  bool pairs;                          // of bfloat16 channels in a step
};

// Quickest first.
const std::vector<IsaTraits>& available_isas();
std::vector<std::string> isa_names();

// Throws ValueError if the machine has no such set.
const IsaTraits& isa_by_name(const std::string& name);

}  // namespace hitsr_fast
