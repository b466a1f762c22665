// A call's place on a GPU: see ops/execution.h.

#include "ops/execution.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#include <vector>

namespace torchconv::ops {
namespace {

void check(cudaError_t error) {
  TORCHCONV_CHECK(error == cudaSuccess, "CUDA error in torchconv: ", cudaGetErrorString(error));
}

// Looked up because the CPU's PyTorch does not have it, and the library must link there too.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function =
      reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  TORCHCONV_CHECK(function != nullptr, "torchconv's CUDA kernels need a PyTorch built for CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

struct DeviceProperties {
  std::atomic<int> capability{0}, multiprocessors{0};
};

constexpr int kMostDevices = 64;
constexpr int kLeastCapability = 75;  // what nvcc of CUDA 13 compiles for

const DeviceProperties& properties_of(int device) {
  static DeviceProperties known[kMostDevices];
  TORCHCONV_CHECK(device >= 0 && device < kMostDevices, "torchconv takes up to ", kMostDevices,
                  " CUDA devices, but got device ", device);
  DeviceProperties& p = known[device];
  if (p.capability.load() == 0) {
    int major = 0, minor = 0, count = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    TORCHCONV_CHECK(10 * major + minor >= kLeastCapability,
                    "torchconv's CUDA kernels need a GPU of compute capability 7.5 or later, but ",
                    "device ", device, " has ", major, ".", minor);
    p.multiprocessors.store(count);
    p.capability.store(10 * major + minor);
  }
  return p;
}

std::atomic<bool (*)()> tf32_switch{nullptr}, winograd_switch{nullptr};

}  // namespace

// For torchconv/_load.py, through ctypes: what asks PyTorch whether TF32 is allowed, and what knows
// the switch of Winograd's algorithm, which is in the CPU's library.
#define TORCHCONV_EXPORT extern "C" __attribute__((visibility("default")))

TORCHCONV_EXPORT void torchconv_set_tf32_switch(bool (*function)()) { tf32_switch = function; }
TORCHCONV_EXPORT void torchconv_set_winograd_switch(bool (*function)()) {
  winograd_switch = function;
}

struct Execution::State {
  explicit State(const Tensor& on) : on_device_of(on), guard(on.get_device_index()) {
    const int device = on.get_device_index();
    const DeviceProperties& properties = properties_of(device);
    queue.stream = current_stream(device);
    queue.capability = properties.capability.load();
    queue.multiprocessors = properties.multiprocessors.load();
    queue.allow_tf32 = [] {
      const auto allowed = tf32_switch.load();
      return allowed != nullptr && allowed();
    };
    queue.allow_winograd = [] {
      const auto allowed = winograd_switch.load();
      return allowed == nullptr || allowed();
    };
    queue.allocate = [](void* context, int64_t bytes) {
      State& state = *static_cast<State*>(context);
      const Tensor memory = torch::stable::empty(std::array<int64_t, 1>{bytes}, ScalarType::Byte,
                                                 std::nullopt, state.on_device_of.device());
      state.scratch.push_back(memory);
      return memory.mutable_data_ptr();
    };
    queue.context = this;
  }

  const Tensor& on_device_of;
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Queue queue{};
  std::vector<Tensor> scratch;
};

Execution::Execution(const Tensor& on_device_of) : state_(std::make_unique<State>(on_device_of)) {}
Execution::~Execution() = default;
Execution::operator const cuda::Queue&() const { return state_->queue; }

}  // namespace torchconv::ops
