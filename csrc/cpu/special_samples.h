// The samples whose sums by Winograd's algorithm are not all finite: they are computed again
// without it, which decides what is infinite and what is NaN.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace torchconv::cpu {

class SpecialSamples {
 public:
  explicit SpecialSamples(int64_t samples)
      : samples_(samples), met_(new std::atomic<bool>[static_cast<size_t>(samples)]()) {}

  // By any thread.
  void add(int64_t n) const { met_[static_cast<size_t>(n)].store(true, std::memory_order_relaxed); }

  std::vector<int64_t> list() const {
    std::vector<int64_t> all;
    for (int64_t n = 0; n < samples_; ++n)
      if (met_[static_cast<size_t>(n)].load(std::memory_order_relaxed)) all.push_back(n);
    return all;
  }

 private:
  int64_t samples_;
  std::unique_ptr<std::atomic<bool>[]> met_;
};

}  // namespace torchconv::cpu
