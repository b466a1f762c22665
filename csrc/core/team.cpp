// See team.h.
#include "core/team.h"

#include <algorithm>
#include <thread>

namespace torchconv {
namespace {

// Waits a little, and after a while lets others have the core.
class Wait {
 public:
  void once() {
    if (++times_ < kBeforeYield)
      __builtin_ia32_pause();
    else
      std::this_thread::yield();
  }

 private:
  static constexpr int kBeforeYield = 4000;
  int times_ = 0;
};

}  // namespace

thread_local Team* Team::led_ = nullptr;

void Team::run(int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
  const int64_t count = end - begin, least = std::max<int64_t>(grain, 1);
  const int64_t pieces = std::min(threads_, (count + least - 1) / least);
  if (pieces <= 1) return body(begin, end, context);
  const int64_t size = (count + pieces - 1) / pieces;
  led_ = nullptr;
  Part* last = parts_;
  for (int64_t first = begin + size; first < end; first += size, ++last) {
    last->body = body, last->context = context;
    last->begin = first, last->end = std::min(first + size, end);
    last->state.store(kOpen, std::memory_order_release);
  }
  body(begin, begin + size, context);
  for (Part* part = parts_; part != last; ++part) {
    State state = kOpen;
    if (part->state.compare_exchange_strong(state, kIdle, std::memory_order_acquire)) {
      body(part->begin, part->end, context);
      continue;
    }
    for (Wait wait; part->state.load(std::memory_order_acquire) != kIdle;) wait.once();
  }
  led_ = this;
}

void Team::gather(const Parallel& pool) {
  pool.run(
      0, threads_, 1,
      [](int64_t begin, int64_t, void* context) {
        Team& team = *static_cast<Team*>(context);
        if (begin == 0)
          team.lead_here();
        else
          follow(&team.parts_[begin - 1]);
      },
      this);
  if (failure_) std::rethrow_exception(failure_);
}

// An exception must not leave the pool's threads.
void Team::lead_here() {
  led_ = this;
  try {
    work_(context_);
  } catch (...) {
    failure_ = std::current_exception();
  }
  led_ = nullptr;
  for (Part& part : parts_) part.state.store(kEnd, std::memory_order_release);
}

void Team::follow(Part* part) {
  for (Wait wait;;) {
    State state = part->state.load(std::memory_order_acquire);
    if (state == kEnd) return;
    if (state != kOpen) {
      wait.once();
      continue;
    }
    if (part->state.compare_exchange_strong(state, kTaken, std::memory_order_acquire)) {
      part->body(part->begin, part->end, part->context);
      part->state.store(kIdle, std::memory_order_release);
    }
    wait = Wait();
  }
}

}  // namespace torchconv
