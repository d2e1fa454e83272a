// attention_prologue on whatever the compiler targets by default.
#include <cmath>
#include <cstring>

#include "cpu/attention_prologue.h"

namespace hitsr_fast::prologue::portable {
#include "cpu/attention_prologue_kernels.h"
}  // namespace hitsr_fast::prologue::portable
