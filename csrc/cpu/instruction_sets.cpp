#include "cpu/instruction_sets.h"

#include <algorithm>

#include "tensor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hitsr_fast {
namespace {

constexpr const char* kNames[kInstructionSets] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

#if defined(__x86_64__)
// Whether the processor has AMX with BF16, and the system lets this process use it: its registers are large, so Linux
// waits to be asked.
bool may_use_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// What the machine has, quickest first.
const std::vector<InstructionSet>& available() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && may_use_amx()) found.push_back(kAmxBf16);
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(kAvx512Bf16);
    if (avx512) found.push_back(kAvx512);
    // Intel's processors take as long for a product of pairs as for four of floats.
    const auto pairs = std::find(found.begin(), found.end(), kAvx512Bf16);
    if (pairs != found.end() && __builtin_cpu_is("intel")) std::iter_swap(pairs, pairs + 1);
    if (avx2) found.push_back(kAvx2);
#endif
    found.push_back(kPortable);
    return found;
  }();
  return sets;
}

std::vector<std::string> available_names() {
  std::vector<std::string> names;
  for (const InstructionSet set : available()) names.emplace_back(kNames[set]);
  return names;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// A row for each op: "modulated_layer_norm: avx512, avx2, portable".
std::vector<std::string>& kernel_sets() {
  static std::vector<std::string> rows;
  return rows;
}

std::vector<std::string> listed_kernels() { return kernel_sets(); }

}  // namespace

InstructionSet instruction_set(const std::string& name) {
  for (const InstructionSet set : available()) {
    if (name == kNames[set]) return set;
  }
  refuse("isa: expected one of ", joined(available_names()), ", found ", name);
}

bool list_kernels(const char* op, unsigned sets) {
  std::vector<std::string> names;
  for (int set = kInstructionSets; set-- > 0;) {
    if ((sets >> set & 1u) != 0) names.emplace_back(kNames[set]);
  }
  kernel_sets().push_back(std::string(op) + ": " + joined(names));
  return true;
}

STABLE_TORCH_LIBRARY_FRAGMENT(hitsr_fast, library) {
  define(library, "_instruction_sets() -> str[]", TORCH_BOX(&available_names));
  define(library, "_kernel_sets() -> str[]", TORCH_BOX(&listed_kernels));
}

}  // namespace hitsr_fast
