// residual_quantize on whatever the compiler targets by default.
#include <cmath>
#include <cstring>

#include "cpu/residual_quantize.h"

namespace hitsr_fast::residual::portable {
namespace {

constexpr int kPlainLanes = 4;
#include "cpu/plain_lanes.h"

struct Isa : PlainLanes {
  static constexpr int kPlaces = 4;
};

}  // namespace
#include "cpu/residual_quantize_kernels.h"
}  // namespace hitsr_fast::residual::portable
