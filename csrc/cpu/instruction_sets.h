// The instruction sets that the CPU backends are compiled for, and which of them this machine has.
#pragma once

// What the kernels may use: they are included inside namespaces (foreach_isa.h), where no header of the system can be.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

namespace hitsr_fast {

// Each has all that those before it have.
enum InstructionSet { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16, kInstructionSets };

// Throws ValueError if the machine has no such set.
InstructionSet instruction_set(const std::string& name);

// Notes that an op has code of its own for some sets, the bits of a mask.
bool list_kernels(const char* op, unsigned sets);

// The kernels of an op for an instruction set, or for the next lower one that it has code for:
// `HITSR_SELECT("avx2", kKernels<float>)`, after foreach_isa.h, of what each set's namespace calls kKernels.
#define HITSR_SELECT(isa, ...)                                                                                       \
  select(                                                                                                            \
      isa, {&portable::__VA_ARGS__, &avx2::__VA_ARGS__, &avx512::__VA_ARGS__, &avx512_bf16::__VA_ARGS__,              \
            &amx_bf16::__VA_ARGS__})

template <typename Kernels>
const Kernels& select(const std::string& isa, const Kernels* const (&kernels)[kInstructionSets]) {
  return *kernels[instruction_set(isa)];
}

}  // namespace hitsr_fast
