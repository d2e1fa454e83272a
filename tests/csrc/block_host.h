// Block contexts that run on a CPU, for tests; block.h says what each member does.
//
// A Team runs the threads of a cluster and joins them at barriers. Fibers takes turns on one thread of the system:
// quick, and a barrier that not all reach is an error rather than a hang. Threads gives each its own: slow, but a
// sanitizer of threads then sees what a GPU's threads may do to each other. To that end nothing here orders more than
// CUDA promises: shuffles and tile products wait for each other behind the sanitizer's back, and shared memory starts
// as NaN.
#pragma once

#include <pthread.h>
#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/block/block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define HITSR_POISON(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define HITSR_UNPOISON(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define HITSR_POISON(address, bytes) static_cast<void>(address)
#define HITSR_UNPOISON(address, bytes) static_cast<void>(address)
#endif

#if defined(__SANITIZE_THREAD__)
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);
#define HITSR_UNSEEN(statement)                  \
  AnnotateIgnoreSyncBegin(__FILE__, __LINE__);   \
  statement;                                     \
  AnnotateIgnoreSyncEnd(__FILE__, __LINE__)
#else
#define HITSR_UNSEEN(statement) statement
#endif

namespace hitsr_fast::block {

class Fibers {
 public:
  class Barrier {
   public:
    Barrier(Fibers& team, int count) : team_(team), count_(count) {}
    void wait() {
      if (static_cast<int>(waiting_.size()) + 1 == count_) {
        for (int fiber : waiting_) team_.ready_.push_back(fiber);
        waiting_.clear();
      } else {
        waiting_.push_back(team_.current_);
        team_.next();
      }
    }

   private:
    Fibers& team_;
    int count_;
    std::vector<int> waiting_;
  };

  void run(int count, const std::function<void(int)>& body) {
    constexpr size_t kStack = 256 * 1024;
    active() = this;
    body_ = &body;
    left_ = count;
    contexts_.resize(count);
    std::vector<std::unique_ptr<char[]>> stacks;
    for (int fiber = 0; fiber < count; ++fiber) {
      stacks.emplace_back(new char[kStack]);
      getcontext(&contexts_[fiber]);
      contexts_[fiber].uc_stack.ss_sp = stacks.back().get();
      contexts_[fiber].uc_stack.ss_size = kStack;
      contexts_[fiber].uc_link = nullptr;
      makecontext(&contexts_[fiber], &Fibers::enter, 0);
      ready_.push_back(fiber);
    }
    current_ = ready_.front();
    ready_.pop_front();
    swapcontext(&main_, &contexts_[current_]);
  }

 private:
  static Fibers*& active() {
    static Fibers* team = nullptr;
    return team;
  }

  static void enter() {
    Fibers& team = *active();
    (*team.body_)(team.current_);
    if (--team.left_ == 0) setcontext(&team.main_);
    team.next();
  }

  // Goes on with another fiber; the current one must have been put where somebody finds it, unless it has ended.
  void next() {
    if (ready_.empty()) {
      std::fprintf(stderr, "deadlock: %d threads wait at barriers that others do not reach\n", left_);
      std::exit(3);
    }
    const int from = current_;
    current_ = ready_.front();
    ready_.pop_front();
    swapcontext(&contexts_[from], &contexts_[current_]);
  }

  const std::function<void(int)>* body_ = nullptr;
  int current_ = 0, left_ = 0;
  std::deque<int> ready_;
  std::vector<ucontext_t> contexts_;
  ucontext_t main_;
};

class Threads {
 public:
  class Barrier {
   public:
    Barrier(Threads&, int count) { pthread_barrier_init(&barrier_, nullptr, static_cast<unsigned>(count)); }
    ~Barrier() { pthread_barrier_destroy(&barrier_); }
    Barrier(const Barrier&) = delete;
    void wait() { pthread_barrier_wait(&barrier_); }

   private:
    pthread_barrier_t barrier_;
  };

  void run(int count, const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
    for (std::thread& thread : threads) thread.join();
  }
};

template <class Team>
struct HostWarp {
  static constexpr int kMaxWords = 40;

  using Words = std::atomic<uint32_t>[kWarp][kMaxWords];  // what each thread puts in

  explicit HostWarp(Team& team) : sync(team, kWarp), exchange(team, kWarp) {}

  typename Team::Barrier sync, exchange;
  Words words[2];
};

template <class Team>
struct HostShared {
  HostShared(Team& team, int threads, size_t size)
      : bytes(size),
        memory(static_cast<unsigned char*>(std::aligned_alloc(64, (size + 63) / 64 * 64))),
        sync(team, threads) {
    memset(memory, 0xff, bytes);
    for (int warp = 0; warp < threads / kWarp; ++warp) warps.emplace_back(new HostWarp<Team>(team));
  }
  ~HostShared() {
    HITSR_UNPOISON(memory, bytes);
    std::free(memory);
  }

  size_t bytes;
  unsigned char* memory;
  typename Team::Barrier sync;
  std::vector<std::unique_ptr<HostWarp<Team>>> warps;
};

template <class Team>
struct HostCluster {
  HostCluster(Team& team, int ranks, int threads, size_t bytes) : threads(threads), sync(team, ranks * threads) {
    for (int rank = 0; rank < ranks; ++rank) blocks.emplace_back(new HostShared<Team>(team, threads, bytes));
  }

  int threads;
  typename Team::Barrier sync;
  std::vector<std::unique_ptr<HostShared<Team>>> blocks;
};

template <class Team>
class HostBlock {
 public:
  static constexpr size_t kGap = 64;

  HostBlock(HostCluster<Team>& cluster, int number)
      : cluster_(cluster),
        rank_(number / cluster.threads),
        thread_(number % cluster.threads),
        block_(*cluster.blocks[rank_]),
        warp_(*block_.warps[thread_ / kWarp]) {}

  int thread() const { return thread_; }
  int threads() const { return cluster_.threads; }
  int rank() const { return rank_; }
  unsigned char* shared() const { return block_.memory; }

  void sync() { block_.sync.wait(); }
  void sync_warp() { warp_.sync.wait(); }
  void sync_cluster() { cluster_.sync.wait(); }

  template <class T>
  T* remote(T* pointer, int rank) const {
    const auto offset = reinterpret_cast<unsigned char*>(pointer) - block_.memory;
    return reinterpret_cast<T*>(cluster_.blocks[rank]->memory + offset);
  }

  template <class T>
  T shuffle(T value, int lane) {
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    const auto& all = exchange(words, sizeof(T) / 4);
    for (size_t i = 0; i < sizeof(T) / 4; ++i) words[i] = all[lane][i].load(std::memory_order_relaxed);
    memcpy(&value, words, sizeof(T));
    return value;
  }
  template <class T>
  T shuffle_xor(T value, int mask) {
    return shuffle(value, thread_ % kWarp ^ mask);
  }
  uint32_t ballot(bool flag) {
    const uint32_t word = flag;
    const auto& all = exchange(&word, 1);
    uint32_t flags = 0;
    for (int lane = 0; lane < kWarp; ++lane) flags |= all[lane][0].load(std::memory_order_relaxed) << lane;
    return flags;
  }

  // A copy may land at any time until one waits for it: it writes to its place at once, for a sanitizer to see, and
  // lands at the last moment, so that who reads too early reads what was there before.
  void copy_async(void* to, const void* from) {
    auto* const words = static_cast<volatile uint32_t*>(to);
    for (int i = 0; i < 4; ++i) words[i] = words[i];
    copies_.push_back({to, from});
  }
  void copy_wait() {
    for (const Copy& copy : copies_) memcpy(copy.to, copy.from, 16);
    copies_.clear();
  }

  template <int M, int STEPS>
  void multiply(float (&sums)[M][4], const uint32_t (&rows)[M][STEPS][4], const uint32_t (&codes)[STEPS][2]) {
    constexpr int kRowWords = M * STEPS * 4;
    static_assert(kRowWords + STEPS * 2 <= HostWarp<Team>::kMaxWords);
    uint32_t mine[kRowWords + STEPS * 2];
    memcpy(mine, rows, sizeof(rows));
    memcpy(mine + kRowWords, codes, sizeof(codes));
    const auto& all = exchange(mine, kRowWords + STEPS * 2);
    const int lane = thread_ % kWarp, g = lane / 4, t = lane % 4;
    float code[2][STEPS * 16];
    for (int i = 0; i < 2; ++i) {
      for (int from = 0; from < 4; ++from) {
        for (int step = 0; step < STEPS; ++step) {
          for (int half = 0; half < 2; ++half) {
            unpack(all[4 * (2 * t + i) + from][kRowWords + step * 2 + half], code[i] + step * 16 + half * 8 + 2 * from);
          }
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int i = 0; i < 2; ++i) {  // rows g and g + 8
        float row[STEPS * 16];
        for (int from = 0; from < 4; ++from) {
          for (int step = 0; step < STEPS; ++step) {
            for (int half = 0; half < 2; ++half) {
              unpack(all[4 * g + from][(m * STEPS + step) * 4 + half * 2 + i], row + step * 16 + half * 8 + 2 * from);
            }
          }
        }
        for (int k = 0; k < STEPS * 16; ++k) {
          sums[m][2 * i] += row[k] * code[0][k];
          sums[m][2 * i + 1] += row[k] * code[1][k];
        }
      }
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
  };

  // What all threads of the warp have put in. Two places by turns: none is filled anew before all have read it.
  const typename HostWarp<Team>::Words& exchange(const uint32_t* mine, size_t count) {
    auto& place = warp_.words[turn_];
    turn_ ^= 1;
    for (size_t i = 0; i < count; ++i) place[thread_ % kWarp][i].store(mine[i], std::memory_order_relaxed);
    HITSR_UNSEEN(warp_.exchange.wait());
    return place;
  }

  static void unpack(const std::atomic<uint32_t>& word, float* values) {
    const uint32_t both = word.load(std::memory_order_relaxed);
    values[0] = from_half(static_cast<uint16_t>(both));
    values[1] = from_half(static_cast<uint16_t>(both >> 16));
  }

  HostCluster<Team>& cluster_;
  int rank_, thread_;
  HostShared<Team>& block_;
  HostWarp<Team>& warp_;
  int turn_ = 0;
  std::vector<Copy> copies_;
};

// Runs kernel(block) on every thread of a cluster. `gaps` are places of kGap bytes of shared memory that nothing may
// touch.
template <class Team, class Kernel>
void run_cluster(int ranks, int threads, size_t bytes, const std::vector<size_t>& gaps, Kernel kernel) {
  Team team;
  HostCluster<Team> cluster(team, ranks, threads, bytes);
  for (size_t gap : gaps) {
    for (auto& block : cluster.blocks) {
      HITSR_POISON(block->memory + gap, HostBlock<Team>::kGap);
    }
  }
  team.run(ranks * threads, [&](int number) {
    HostBlock<Team> block(cluster, number);
    kernel(block);
  });
}

}  // namespace hitsr_fast::block
