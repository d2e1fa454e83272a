// Tasks for whichever thread is free.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace hitsr_fast {

// Runs `worker` on each thread; it asks `next()` for the next of the tasks [0, count), until it gets one beyond them. No
// result may depend on which thread has which task.
template <typename F>
void share_out(int64_t count, const F& worker) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(torch::stable::get_num_threads(), count), 1, [&](int64_t, int64_t) {
    worker([&] { return next.fetch_add(1, std::memory_order_relaxed); });
  });
}

}  // namespace hitsr_fast
