// Functions between HITSR_TARGET_BEGIN("avx2,fma") and HITSR_TARGET_END are compiled for those instruction sets,
// whatever the rest of the build is compiled for; the caller asks the processor first.
#pragma once

#define HITSR_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HITSR_TARGET_BEGIN(features) \
  HITSR_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define HITSR_TARGET_END HITSR_PRAGMA(clang attribute pop)
#else
#define HITSR_TARGET_BEGIN(features) HITSR_PRAGMA(GCC push_options) HITSR_PRAGMA(GCC target(features))
#define HITSR_TARGET_END HITSR_PRAGMA(GCC pop_options)
#endif
