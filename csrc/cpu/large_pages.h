// Memory in large pages.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hitsr_fast {

// Asks Linux to back a new tensor's memory with pages of 2 MiB, if the system leaves that to programs ("madvise").
// Glibc takes a block of 32 MiB or more from the system each time, and to fault it in by pages of 4 KiB takes longer
// than to write it. It is advice: that the system does not follow it is no error.
inline void advise_large_pages(const at::Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20, kLeast = uintptr_t{32} << 20;
  const auto from = reinterpret_cast<uintptr_t>(tensor.data_ptr()), size = static_cast<uintptr_t>(tensor.nbytes());
  if (size < kLeast) return;
  const uintptr_t begin = (from + kPage - 1) / kPage * kPage, end = (from + size) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace hitsr_fast
