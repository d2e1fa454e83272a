// modulated_layer_norm on whatever the compiler targets by default.
#include <cmath>
#include <cstring>

#include "cpu/modulated_layer_norm.h"

namespace hitsr_fast::adaln::portable {
#include "cpu/modulated_layer_norm_kernels.h"
}  // namespace hitsr_fast::adaln::portable
