// scale_block_attention on whatever the compiler targets by default.
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/scale_block_attention.h"

namespace hitsr_fast::attention::portable {
namespace {

constexpr int kPlainLanes = 4;
#include "cpu/plain_lanes.h"

using Isa = PlainLanes;

}  // namespace
#include "cpu/scale_block_attention_vectors.h"
}  // namespace hitsr_fast::attention::portable
