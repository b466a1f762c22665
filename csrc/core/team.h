// Threads of a pool that stay together for many short loops: to wake them for each would take
// longer than some of these.
//
// The thread that calls leads, and hands each loop's parts to the others by a cache line of their
// own. They are taken by compare and exchange, and what nobody has taken when the leader is done
// with its own part it does itself: threads that never come, because the pool runs ranges one after
// another, has fewer threads than were asked for or a busy machine has no core for them, hold up
// nobody.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>

#include "core/parallel.h"

namespace torchconv {

class Team {
 public:
  static constexpr int64_t kMostThreads = 16;

  // Calls f() on this thread, which leads as many threads of the pool; 1 < threads <= kMostThreads.
  // What f throws is thrown here.
  template <typename F>
  static void lead(const Parallel& pool, int64_t threads, F&& f) {
    using Callable = std::remove_reference_t<F>;
    Team team(
        threads, [](void* context) { (*static_cast<Callable*>(context))(); },
        const_cast<void*>(static_cast<const void*>(&f)));
    team.gather(pool);
  }

  // The team that this thread leads, unless it is in one of its loops; or null.
  static Team* led_here() { return led_; }

  // As Parallel's; cuts the range as PyTorch's pool does.
  void run(int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context);

 private:
  using Work = void (*)(void* context);
  enum State { kIdle, kOpen, kTaken, kEnd };

  // One thread's beside the leader.
  struct alignas(64) Part {
    std::atomic<State> state{kIdle};
    Parallel::Body body;
    void* context;
    int64_t begin, end;
  };

  Team(int64_t threads, Work work, void* context)
      : threads_(threads), work_(work), context_(context) {}
  void gather(const Parallel& pool);
  void lead_here();
  static void follow(Part* part);

  Part parts_[kMostThreads - 1];
  const int64_t threads_;
  const Work work_;
  void* const context_;
  std::exception_ptr failure_;

  static thread_local Team* led_;
};

}  // namespace torchconv
