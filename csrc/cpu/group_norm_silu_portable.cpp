// group_norm_silu on whatever the compiler targets by default.
#include <cmath>
#include <cstring>

#include "cpu/group_norm_silu.h"

namespace hitsr_fast::group_norm::portable {
namespace {

constexpr int kPlainLanes = 4;
#include "cpu/plain_lanes.h"

using Isa = PlainLanes;

inline float fused(float a, float b, float c) { return a * b + c; }  // fmaf could be a call

template <bool kPrecise>
inline Isa::Scores quotient(Isa::Scores a, Isa::Scores b) {
  return a / b;
}

}  // namespace
#include "cpu/group_norm_silu_kernels.h"
}  // namespace hitsr_fast::group_norm::portable
