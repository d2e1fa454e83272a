// sample_codes on whatever the compiler targets by default.
#include <cstring>

#include "cpu/sample_codes.h"

namespace hitsr_fast::sampling::portable {
#include "cpu/sample_codes_kernels.h"
}  // namespace hitsr_fast::sampling::portable
