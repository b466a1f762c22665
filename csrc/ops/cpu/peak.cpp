// The arithmetic peak of torchconv/_peak.py as C functions: like those of memory.cpp they take no
// tensor. Each thread does `rounds` of microkernels/multiply_adds.h; returned is their sum.

#include <atomic>

#include "cpu/microkernels/multiply_adds.h"
#include "ops/execution.h"

#define TORCHCONV_EXPORT extern "C" __attribute__((visibility("default")))

namespace torchconv::ops {
namespace {

int64_t on_threads(int64_t threads, int64_t rounds, int64_t (*multiply_adds)(int64_t)) {
  std::atomic<int64_t> done{0};
  parallel_for(torch_threads(), 0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) done += multiply_adds(rounds);
  });
  return done;
}

}  // namespace
}  // namespace torchconv::ops

TORCHCONV_EXPORT int64_t torchconv_multiply_adds_float32(int64_t threads, int64_t rounds) {
  return torchconv::ops::on_threads(threads, rounds, &torchconv::cpu::multiply_adds_float32);
}
TORCHCONV_EXPORT int64_t torchconv_multiply_adds_float64(int64_t threads, int64_t rounds) {
  return torchconv::ops::on_threads(threads, rounds, &torchconv::cpu::multiply_adds_float64);
}
TORCHCONV_EXPORT int64_t torchconv_multiply_adds_pairs(int64_t threads, int64_t rounds) {
  return torchconv::ops::on_threads(threads, rounds, &torchconv::cpu::multiply_adds_pairs);
}
