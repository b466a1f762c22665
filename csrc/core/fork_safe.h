// What a process has once, behind a mutex that a forked child does not inherit from another thread
// of its parent, which might have held it.
#pragma once

#include <pthread.h>

#include <mutex>

namespace torchconv {

// Base of T.
template <typename T>
class ForkSafe {
 public:
  // Never destroyed: who uses it may outlive static objects.
  static T& instance() {
    static T* const only = new T;
    return *only;
  }

  std::mutex mutex;

 protected:
  ForkSafe() {
    pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                   [] { instance().mutex.unlock(); });
  }
};

}  // namespace torchconv
