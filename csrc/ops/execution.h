// Where one call of an operator runs, beside its problem: on PyTorch's thread pool, or on the
// current stream of a tensor's GPU, which is the current device while this lives. Scratch memory of
// a GPU comes from PyTorch's allocator and goes back with the Execution: what is queued after it on
// the same stream may have it.
#pragma once

#include "ops/tensor_args.h"

#ifdef TORCHCONV_CUDA

#include <memory>

#include "cuda/queue.h"

namespace torchconv::ops {

class Execution {
 public:
  explicit Execution(const Tensor& on_device_of);
  ~Execution();
  Execution(const Execution&) = delete;
  Execution& operator=(const Execution&) = delete;
  operator const cuda::Queue&() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace torchconv::ops

#else

#include "core/parallel.h"
#include "core/team.h"

namespace torchconv::ops {

// PyTorch's own thread pool, or those of its threads that this one leads.
inline Parallel torch_threads() {
  return {[](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    if (Team* const team = Team::led_here()) return team->run(begin, end, grain, body, context);
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  }};
}

class Execution {
 public:
  explicit Execution(const Tensor&) {}
  operator Parallel() const { return torch_threads(); }
};

}  // namespace torchconv::ops

#endif
