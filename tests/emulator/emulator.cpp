// The emulated device: runs the blocks of a launch one after another on the caller's thread, and
// the threads of a block as coroutines on stacks of their own.
//
// A coroutine ("fiber") takes the next thread that has not begun, runs it, and goes on with the
// next; only a thread that has to wait keeps its fiber, and another is taken for those that follow.
// So a kernel without barriers is a plain loop on one fiber. Launches exclude one another.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define TORCHCONV_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TORCHCONV_EMULATOR_ASAN 1
#endif
#endif
#ifdef TORCHCONV_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(TORCHCONV_EMULATOR_UCONTEXT)
#define TORCHCONV_EMULATOR_UCONTEXT 1
#endif
#ifdef TORCHCONV_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#ifndef TORCHCONV_EMULATOR_UCONTEXT
// Saves what a function must preserve and the stack pointer in *from, and goes on where `to` was
// saved. swapcontext would do, but makes a system call for the signal mask.
extern "C" void torchconv_emulator_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".globl torchconv_emulator_switch\n"
    ".hidden torchconv_emulator_switch\n"
    ".type torchconv_emulator_switch, @function\n"
    "torchconv_emulator_switch:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n"
    ".size torchconv_emulator_switch, .-torchconv_emulator_switch\n");
#endif

namespace torchconv::cuda::emulator {
namespace {

constexpr int kMostThreads = 1024;
#ifdef TORCHCONV_EMULATOR_ASAN
constexpr size_t kStackBytes = size_t{256} << 10;  // its frames are several times as large
#else
constexpr size_t kStackBytes = size_t{64} << 10;
#endif

// Where a stack of execution stands while another one runs.
struct Context {
#ifdef TORCHCONV_EMULATOR_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
#ifdef TORCHCONV_EMULATOR_ASAN
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
#endif
};

struct Fiber {
  Context context;
  char* stack = nullptr;
};

enum class State : uint8_t { kReady, kInBlock, kInWarp, kExited };

struct Thread {
  State state;
  Fiber* fiber;
  uint3 index;
  Site site;  // where it waits
  // In an exchange of its warp.
  unsigned mask;
  void* mine;
  Meet meet;
  AnyFunction function;
};

struct Warp {
  unsigned live, waiting;
};

struct Device {
  std::mutex mutex;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  Context scheduler;

  // The launch.
  void (*body)(const void*);
  const void* call;
  int count;  // threads of a block
  std::vector<int> order;
  void* shared;

  // The block.
  Thread threads[kMostThreads];
  Warp warps[kMostThreads / 32];
  int begun;  // of order
  int live;
  int waiting;     // in a barrier of the block
  int predicates;  // true ones among them
  int outcome;     // predicates of the last barrier that all have reached
  int current;
  Fiber* running;
  std::string error;
};

Device device;

// Leaves `from` for `to`; returns when somebody leaves for `from`.
void switch_context(Context& from, Context& to) {
#ifdef TORCHCONV_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#ifdef TORCHCONV_EMULATOR_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  torchconv_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef TORCHCONV_EMULATOR_ASAN
  // Whoever came from the scheduler learns where its stack is: that of any thread of the process.
  Context& scheduler = device.scheduler;
  if (&from == &scheduler)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
  else
    __sanitizer_finish_switch_fiber(from.fake_stack, &scheduler.bottom, &scheduler.bytes);
#endif
}

// The running fiber waits for the scheduler to go on with it.
void yield() { switch_context(device.running->context, device.scheduler); }

bool complete(const Warp& warp, int base, const Thread& t) {
  const unsigned needed = t.mask & warp.live;
  if ((warp.waiting & needed) != needed) return false;
  for (unsigned rest = needed; rest != 0; rest &= rest - 1) {
    const Thread& other = device.threads[base + __builtin_ctz(rest)];
    if (other.mask != t.mask || other.site.line != t.site.line || other.meet != t.meet ||
        other.function != t.function)
      return false;
  }
  return true;
}

// All lanes that t waits for are there.
void meet(Warp& warp, int base, const Thread& t) {
  const unsigned needed = t.mask & warp.live;
  void* lanes[32] = {};
  for (unsigned rest = needed; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    lanes[i] = device.threads[base + i].mine;
    device.threads[base + i].state = State::kReady;
  }
  warp.waiting &= ~needed;
  t.meet(lanes, t.function);
}

void release_block() {
  device.outcome = device.predicates;
  device.waiting = device.predicates = 0;
  for (int i = 0; i < device.count; ++i)
    if (device.threads[i].state == State::kInBlock) device.threads[i].state = State::kReady;
}

// A thread that has returned is waited for no longer.
void leave(int index) {
  device.threads[index].state = State::kExited;
  --device.live;
  Warp& warp = device.warps[index / 32];
  warp.live &= ~(1u << (index % 32));
  const int base = index / 32 * 32;
  for (unsigned rest = warp.waiting; rest != 0; rest &= rest - 1) {
    const Thread& t = device.threads[base + __builtin_ctz(rest)];
    if (t.state == State::kInWarp && complete(warp, base, t)) meet(warp, base, t);
  }
  if (device.waiting > 0 && device.waiting == device.live) release_block();
}

void fiber_main() {
#ifdef TORCHCONV_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &device.scheduler.bottom, &device.scheduler.bytes);
#endif
  for (;;) {
    while (device.begun < device.count) {
      const int index = device.order[static_cast<size_t>(device.begun++)];
      Thread& t = device.threads[index];
      t.fiber = device.running;
      device.current = index;
      threadIdx = t.index;
      device.body(device.call);
      leave(index);
    }
    device.idle.push_back(device.running);
    yield();
  }
}

void prepare(Fiber& fiber) {
  char* const top = fiber.stack + kStackBytes;
#ifdef TORCHCONV_EMULATOR_ASAN
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
  fiber.context.bottom = fiber.stack;
  fiber.context.bytes = kStackBytes;
  fiber.context.fake_stack = nullptr;
#endif
#ifdef TORCHCONV_EMULATOR_UCONTEXT
  getcontext(&fiber.context.registers);
  fiber.context.registers.uc_stack.ss_sp = fiber.stack;
  fiber.context.registers.uc_stack.ss_size = kStackBytes;
  fiber.context.registers.uc_link = nullptr;
  makecontext(&fiber.context.registers, fiber_main, 0);
  static_cast<void>(top);
#else
  // Six registers, the address to return to, and none that it would return to.
  void* words[8] = {};
  words[6] = reinterpret_cast<void*>(&fiber_main);
  std::memcpy(top - sizeof(words), words, sizeof(words));
  fiber.context.stack_pointer = top - sizeof(words);
#endif
}

Fiber* idle_fiber() {
  if (device.idle.empty()) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);  // a kernel that needs more stack faults
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = static_cast<char*>(memory) + page;
    prepare(*fiber);
    device.idle.push_back(fiber.get());
    device.fibers.push_back(std::move(fiber));
  }
  Fiber* fiber = device.idle.back();
  device.idle.pop_back();
  return fiber;
}

// What is on the fibers that wait is given up.
void abandon() {
  device.idle.clear();
  for (const auto& fiber : device.fibers) {
    prepare(*fiber);
    device.idle.push_back(fiber.get());
  }
}

std::string name(int index) {
  const uint3 t = device.threads[index].index;
  return "thread (" + std::to_string(t.x) + ", " + std::to_string(t.y) + ", " +
         std::to_string(t.z) + ")";
}

std::string name(const Site& site) {
  return std::string(site.what) + " at " + site.file + ":" + std::to_string(site.line);
}

// One thread for each place where some wait.
std::string deadlock() {
  std::string message = "threads wait for one another:";
  std::vector<std::pair<std::string, int>> places;
  int exited = 0;
  for (int i = 0; i < device.count; ++i) {
    const Thread& t = device.threads[i];
    if (t.state == State::kExited) {
      ++exited;
      continue;
    }
    const std::string place = name(t.site);
    auto found = std::find_if(places.begin(), places.end(),
                              [&](const auto& known) { return known.first == place; });
    if (found != places.end()) {
      ++found->second;
    } else {
      places.emplace_back(place, 1);
      message += "\n  " + name(i) + " in " + place;
    }
  }
  for (const auto& [place, number] : places)
    message += "\n  " + std::to_string(number) + " in " + place;
  return message + "\n  " + std::to_string(exited) + " have returned";
}

[[noreturn]] void raise(const std::string& message) {
  const uint3 b = blockIdx;
  abandon();
  throw std::runtime_error("CUDA error in torchconv's kernel, emulated: block (" +
                           std::to_string(b.x) + ", " + std::to_string(b.y) + ", " +
                           std::to_string(b.z) + "): " + message);
}

void resume(Fiber* fiber) {
  device.running = fiber;
  switch_context(device.scheduler, fiber->context);
  if (!device.error.empty()) {
    const std::string message = std::move(device.error);
    device.error.clear();
    raise(message);
  }
}

void run_block() {
  for (int i = 0; i < device.count; ++i) device.threads[i].state = State::kReady;
  for (int w = 0; w * 32 < device.count; ++w) {
    const int lanes = std::min(32, device.count - w * 32);
    device.warps[w] = {lanes == 32 ? 0xFFFFFFFFu : (1u << lanes) - 1u, 0};
  }
  device.begun = device.waiting = device.predicates = 0;
  device.live = device.count;
  while (device.begun < device.count) resume(idle_fiber());
  while (device.live > 0) {
    bool progress = false;
    for (const int index : device.order) {
      Thread& t = device.threads[index];
      if (t.state != State::kReady) continue;
      progress = true;
      device.current = index;
      threadIdx = t.index;
      resume(t.fiber);
    }
    if (!progress) raise(deadlock());
  }
}

int setting(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  if (text == nullptr || *text == '\0') return otherwise;
  const int value = std::atoi(text);
  if (value <= 0)
    throw std::runtime_error(std::string(variable) + " is '" + text + "', not a positive number");
  return value;
}

enum class Order { kForward, kReverse, kShuffle };

Order order_setting() {
  const char* text = std::getenv("TORCHCONV_EMULATED_ORDER");
  const std::string order = text == nullptr ? "" : text;
  if (order.empty() || order == "forward") return Order::kForward;
  if (order == "reverse") return Order::kReverse;
  if (order == "shuffle") return Order::kShuffle;
  throw std::runtime_error("TORCHCONV_EMULATED_ORDER is '" + order +
                           "', not forward, reverse or shuffle");
}

// Fisher and Yates, with the same numbers every time.
void shuffle_order(uint64_t seed) {
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u;
  for (size_t i = device.order.size(); i > 1; --i) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    std::swap(device.order[i - 1], device.order[state % i]);
  }
}

// The most shared memory that a block can have (CUDA C++ Programming Guide, technical
// specifications per compute capability).
int most_shared_bytes(int capability) {
  if (capability < 75) return 96 << 10;
  if (capability < 80) return 64 << 10;
  if (capability == 86 || capability == 89 || capability >= 120) return 99 << 10;
  return (capability < 90 ? 163 : 227) << 10;
}

void check_launch(dim3 grid, dim3 block, int shared_bytes, int capability) {
  const auto refuse = [](const char* what) {
    throw std::runtime_error(std::string("CUDA error in torchconv's launch, emulated: ") + what);
  };
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) refuse("the grid is too large");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || block.z > 64) refuse("no such block is possible");
  if (shared_bytes < 0 || shared_bytes > most_shared_bytes(capability))
    refuse("the device has less shared memory");
}

// The dynamic shared memory of a launch. AddressSanitizer sees every access beyond its end; without
// it, a write is seen after the block by the bytes behind.
class SharedMemory {
 public:
  explicit SharedMemory(int bytes) : bytes_(static_cast<size_t>(bytes)) {
    if (posix_memalign(&memory_, 128, bytes_ + kGuard) != 0) throw std::bad_alloc();
    std::memset(end(), 0xA5, kGuard);
  }
  ~SharedMemory() { std::free(memory_); }
  SharedMemory(const SharedMemory&) = delete;

  void* get() const { return memory_; }
  void poison() { std::memset(memory_, 0xFF, bytes_); }
  bool intact() const {
    return std::all_of(end(), end() + kGuard, [](unsigned char byte) { return byte == 0xA5; });
  }

 private:
#ifdef TORCHCONV_EMULATOR_ASAN
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 256;
#endif
  unsigned char* end() const { return static_cast<unsigned char*>(memory_) + bytes_; }

  void* memory_ = nullptr;
  size_t bytes_;
};

// The static __shared__ arrays: all that this library has of thread-local memory, but for the byte
// here, whose use makes the system allocate it.
struct StaticShared {
  unsigned char* begin = nullptr;
  size_t bytes = 0;
};
StaticShared static_shared() {
  static thread_local volatile char touched;
  touched = touched;
  StaticShared found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        bool ours = false;
        size_t bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
          const uintptr_t here = reinterpret_cast<uintptr_t>(&device);
          if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
          ours |= segment.p_type == PT_LOAD && here >= begin && here - begin < segment.p_memsz;
        }
        if (ours)
          *static_cast<StaticShared*>(result) = {static_cast<unsigned char*>(info->dlpi_tls_data),
                                                 bytes};
        return ours ? 1 : 0;
      },
      &found);
  return found;
}

// It is some 100 KB for a library of all kernels, so only the first blocks have it clean.
constexpr uint64_t kCleanBlocks = 32;

}  // namespace

int capability() { return setting("TORCHCONV_EMULATED_CAPABILITY", 90); }
int multiprocessors() { return setting("TORCHCONV_EMULATED_MULTIPROCESSORS", 4); }

void fail(const std::string& message) {
  device.error = name(device.current) + ": " + message;
  yield();
  std::abort();  // nobody goes on with an abandoned fiber
}

int lane() { return device.current % 32; }
unsigned live_lanes() { return device.warps[device.current / 32].live; }
void* shared_memory() { return device.shared; }

int block_barrier(const Site& site, bool predicate) {
  Thread& t = device.threads[device.current];
  t.site = site;
  if (device.waiting > 0) {
    for (int i = 0; i < device.count; ++i) {
      const Thread& other = device.threads[i];
      if (other.state != State::kInBlock) continue;
      if (other.site.line != site.line)
        fail("is in " + name(site) + ", but " + name(i) + " in " + name(other.site));
      break;
    }
  }
  ++device.waiting;
  device.predicates += predicate;
  if (device.waiting == device.live) {
    release_block();
  } else {
    t.state = State::kInBlock;
    yield();
  }
  return device.outcome;
}

void warp_meeting(const Site& site, unsigned mask, void* mine, Meet together,
                  AnyFunction function) {
  const int index = device.current, base = index / 32 * 32;
  const unsigned bit = 1u << (index % 32);
  if ((mask & bit) == 0) fail("is not in the mask of its own " + name(site));
  Thread& t = device.threads[index];
  t.site = site;
  t.mask = mask;
  t.mine = mine;
  t.meet = together;
  t.function = function;
  Warp& warp = device.warps[index / 32];
  warp.waiting |= bit;
  if (complete(warp, base, t)) {
    meet(warp, base, t);
  } else {
    t.state = State::kInWarp;
    yield();
  }
}

void run(dim3 grid, dim3 block, int shared_bytes, int capability, void (*body)(const void* call),
         const void* call) {
  const std::lock_guard<std::mutex> lock(device.mutex);
  check_launch(grid, block, shared_bytes, capability);
  const Order order = order_setting();
  SharedMemory shared(shared_bytes);
  const StaticShared statics = static_shared();
  device.shared = shared.get();
  device.body = body;
  device.call = call;
  device.count = static_cast<int>(block.x * block.y * block.z);
  device.order.resize(static_cast<size_t>(device.count));
  for (int i = 0; i < device.count; ++i) {
    const unsigned u = static_cast<unsigned>(i);
    device.threads[i].index = {u % block.x, u / block.x % block.y, u / block.x / block.y};
    device.order[static_cast<size_t>(order == Order::kReverse ? device.count - 1 - i : i)] = i;
  }
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = order == Order::kForward ? i : blocks - 1 - i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    if (order == Order::kShuffle) shuffle_order(b);
    shared.poison();
    if (i < kCleanBlocks) std::memset(statics.begin, 0xFF, statics.bytes);
    run_block();
    if (!shared.intact()) raise("wrote behind its dynamic shared memory");
  }
}

}  // namespace torchconv::cuda::emulator
