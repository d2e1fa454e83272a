// Includes an op's kernels, cpu/<HITSR_OP>_kernels.h, once for each instruction set: compiled for it, whatever the rest
// of the build is compiled for, and in a namespace of its name. A file includes this inside an unnamed namespace, after
// instruction_sets.h and the types that the kernels share; HITSR_SELECT then finds the kernels.
//
//   HITSR_OP                           the op
//   HITSR_AVX512_BF16, HITSR_AMX_BF16  defined where it has code for these; else they are the next lower set's
//
// Kernels find `Vectors` (vectors/*.h) and, where the set has them, HITSR_PAIRS (products of pairs of bfloat16) and
// HITSR_TILES (AMX). They use no templates of the standard library: the linker would keep one copy of those, perhaps of
// an instruction set which the processor lacks.

#define HITSR_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HITSR_TARGET_BEGIN(features) \
  HITSR_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define HITSR_TARGET_END HITSR_PRAGMA(clang attribute pop)
#else
#define HITSR_TARGET_BEGIN(features) HITSR_PRAGMA(GCC push_options) HITSR_PRAGMA(GCC target(features))
#define HITSR_TARGET_END HITSR_PRAGMA(GCC pop_options)
#endif
#define HITSR_QUOTED(text) #text
#define HITSR_STRING(text) HITSR_QUOTED(text)
#define HITSR_KERNELS_OF(op) HITSR_QUOTED(cpu/op##_kernels.h)
#define HITSR_KERNELS(op) HITSR_KERNELS_OF(op)

namespace portable {
constexpr int kPlainLanes = 4;
#include "cpu/vectors/plain.h"
using Vectors = PlainLanes;
#include HITSR_KERNELS(HITSR_OP)
}  // namespace portable

#if defined(__x86_64__)
HITSR_TARGET_BEGIN("avx2,fma,popcnt")
namespace avx2 {
#include "cpu/vectors/avx2.h"
#include HITSR_KERNELS(HITSR_OP)
}  // namespace avx2
HITSR_TARGET_END

HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt")
namespace avx512 {
#include "cpu/vectors/avx512.h"
#include HITSR_KERNELS(HITSR_OP)
}  // namespace avx512
HITSR_TARGET_END
#else
namespace avx2 = portable;
namespace avx512 = portable;
#endif

#if defined(__x86_64__) && defined(HITSR_AVX512_BF16)
HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,popcnt")
namespace avx512_bf16 {
#define HITSR_PAIRS
#include "cpu/vectors/avx512.h"
#include HITSR_KERNELS(HITSR_OP)
#undef HITSR_PAIRS
}  // namespace avx512_bf16
HITSR_TARGET_END
constexpr unsigned kPairs = 1u << kAvx512Bf16;
#else
namespace avx512_bf16 = avx512;
constexpr unsigned kPairs = 0;
#endif

#if defined(__x86_64__) && defined(HITSR_AMX_BF16)
HITSR_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt,amx-tile,amx-bf16")
namespace amx_bf16 {
#define HITSR_TILES
#include "cpu/vectors/avx512.h"
#include HITSR_KERNELS(HITSR_OP)
#undef HITSR_TILES
}  // namespace amx_bf16
HITSR_TARGET_END
constexpr unsigned kTiles = 1u << kAmxBf16;
#else
namespace amx_bf16 = avx512_bf16;
constexpr unsigned kTiles = 0;
#endif

#if defined(__x86_64__)
constexpr unsigned kSets = 1u << kPortable | 1u << kAvx2 | 1u << kAvx512 | kPairs | kTiles;
#else
constexpr unsigned kSets = 1u << kPortable;
#endif
[[maybe_unused]] const bool kListed = list_kernels(HITSR_STRING(HITSR_OP), kSets);
