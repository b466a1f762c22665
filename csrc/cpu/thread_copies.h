// Read-only arrays that every thread makes for itself, once in a call: packed weights that take
// less time to make than to fetch from the cache of the thread that has just written them. The
// memory stays for the thread's next call.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/buffer.h"

namespace torchconv::cpu {

// One for each call, made before its threads start.
class ThreadCopies {
 public:
  ThreadCopies() : call_(++calls_) {}

  // The thread's array of `size` elements, which fill(array) writes at its first use in the call.
  template <typename A, typename F>
  const A* get(int64_t size, F&& fill) const {
    thread_local Buffer<A> own(0);
    thread_local int64_t room = 0;
    thread_local uint64_t call = 0;
    if (call == call_) return own.get();
    if (room < size) {
      room = 0;
      own = Buffer<A>(size);
      room = size;
    }
    fill(own.get());
    call = call_;
    return own.get();
  }

 private:
  inline static std::atomic<uint64_t> calls_{0};
  uint64_t call_;
};

}  // namespace torchconv::cpu
