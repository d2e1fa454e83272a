#include "cpu/instruction_sets.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/nearest_code.h"

namespace hitsr_fast {
namespace {

int64_t single_steps(int64_t channels) { return channels; }
int64_t pair_steps(int64_t channels) { return (channels + 1) / 2; }

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

}  // namespace

const std::vector<IsaTraits>& available_isas() {
  static const std::vector<IsaTraits> isas = [] {
    std::vector<IsaTraits> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && may_use_amx()) found.push_back({"amx_bf16", 16, nearest::tile_steps, true});
    // Intel's processors take as long for a product of pairs as for four of floats.
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16"), slow_bf16 = __builtin_cpu_is("intel");
    if (bf16 && !slow_bf16) found.push_back({"avx512_bf16", 16, pair_steps, true});
    if (avx512) found.push_back({"avx512", 16, single_steps, false});
    if (bf16 && slow_bf16) found.push_back({"avx512_bf16", 16, pair_steps, true});
    if (avx2) found.push_back({"avx2", 8, single_steps, false});
#endif
    found.push_back({"portable", 4, single_steps, false});
    return found;
  }();
  return isas;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const auto& isa : available_isas()) names.emplace_back(isa.name);
  return names;
}

const IsaTraits& isa_by_name(const std::string& name) {
  for (const auto& isa : available_isas()) {
    if (name == isa.name) return isa;
  }
  TORCH_CHECK_VALUE(false, "isa: expected one of ", c10::Join(", ", isa_names()), ", found ", name);
}

}  // namespace hitsr_fast
