// A call's place on the emulated GPU: the calling thread, with scratch memory that the sanitizers
// watch. TORCHCONV_EMULATED_CAPABILITY, _MULTIPROCESSORS, _TF32 and _WINOGRAD say what GPU it
// is, and what may be used there.

#include "ops/execution.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "emulator.h"

namespace torchconv::ops {
namespace {

bool allowed(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && std::atoi(value) != 0;
}

}  // namespace

struct Execution::State {
  State() {
    queue.capability = cuda::emulator::capability();
    queue.multiprocessors = cuda::emulator::multiprocessors();
    queue.allow_tf32 = [] { return allowed("TORCHCONV_EMULATED_TF32"); };
    queue.allow_winograd = [] { return allowed("TORCHCONV_EMULATED_WINOGRAD"); };
    queue.allocate = [](void* context, int64_t bytes) {
      const size_t size = static_cast<size_t>(bytes);
      void* memory = nullptr;
      if (posix_memalign(&memory, 256, size) != 0) throw std::bad_alloc();
      std::memset(memory, 0xff, size);  // NaN: nobody counts on zeros
      static_cast<State*>(context)->scratch.emplace_back(memory, std::free);
      return memory;
    };
    queue.context = this;
  }

  cuda::Queue queue{};
  std::vector<std::unique_ptr<void, void (*)(void*)>> scratch;
};

Execution::Execution(const Tensor&) : state_(std::make_unique<State>()) {}
Execution::~Execution() = default;
Execution::operator const cuda::Queue&() const { return state_->queue; }

}  // namespace torchconv::ops
