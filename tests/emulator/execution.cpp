// A call's place on the emulated GPU: the calling thread, with scratch memory that the sanitizers
// watch. TORCHCONV_EMULATED_CAPABILITY, _MULTIPROCESSORS and _TF32 say what GPU it is.

#include "ops/execution.h"

#include <cstdlib>
#include <cstring>
#include <vector>

namespace torchconv::ops {
namespace {

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

}  // namespace

struct Execution::State {
  State() {
    queue.capability = setting("TORCHCONV_EMULATED_CAPABILITY", 90);
    queue.multiprocessors = setting("TORCHCONV_EMULATED_MULTIPROCESSORS", 4);
    queue.allow_tf32 = [] { return setting("TORCHCONV_EMULATED_TF32", 0) != 0; };
    queue.allocate = [](void* context, int64_t bytes) {
      const size_t size = static_cast<size_t>(bytes);
      void* memory = std::aligned_alloc(256, (size + 255) / 256 * 256);
      if (memory == nullptr) throw std::bad_alloc();
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
