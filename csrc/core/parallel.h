// Threads for kernels that know no torch: csrc/ops passes PyTorch's own pool as a plain function
// pointer, so torch.set_num_threads is obeyed and a test can pass a serial loop.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace torchconv {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  // Calls body on disjoint ranges that cover [begin, end), as few as its threads and grain allow.
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
};

// f(begin, end) on ranges of [begin, end). A result must not depend on how the range was cut.
// f must not throw.
template <typename F>
void parallel_for(const Parallel& pool, int64_t begin, int64_t end, int64_t grain, F&& f) {
  if (end <= begin) return;
  using Callable = std::remove_reference_t<F>;
  pool.run(
      begin, end, grain,
      [](int64_t b, int64_t e, void* context) { (*static_cast<Callable*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace torchconv
