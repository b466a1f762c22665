// What a run of a chain was, to run it again on tensors of the same sizes, strides and types: the
// steps on plain memory, without a tensor, a check or a look at settings for each.
//
// Each result has memory of its own, from when it is written until nobody needs it, as if it were a
// tensor. All of them in one piece of memory were a loss: two threads then often write where the
// other one just did, and wait for its core.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops/chain.h"

namespace torchconv::ops {

// Of a tensor, all but its memory.
struct TensorKind {
  std::array<int64_t, 4> sizes, strides;
  int64_t dim;
  ScalarType dtype;

  static bool exists(const Tensor& t) { return t.dim() <= 4; }
  explicit TensorKind(const Tensor& t);
  bool describes(const Tensor& t) const;
};

class ChainPlan {
 public:
  // Runs the chain of these tensors, on the CPU. The plan is null where a step or a result is not
  // of the kind that can be planned.
  static std::vector<Tensor> record(const std::vector<Tensor>& tensors, const Tensor& program,
                                    std::shared_ptr<const ChainPlan>* plan);

  // Whether the plan is one for these. Where so many of the chain's tensors are fixed, the last
  // ones, only the others are given.
  bool fits(const std::vector<Tensor>& tensors, size_t fixed = 0) const;
  // The chain's results. fixed: where the others lie.
  std::vector<Tensor> run(const std::vector<Tensor>& tensors,
                          const std::vector<const void*>& fixed = {}) const;
  // Whether it has been run.
  bool used() const { return used_; }

 private:
  class Recorder;
  // Memory of a result; of several where steps write in place, or parts of a concatenation.
  struct Block {
    int64_t bytes;
    int64_t returned;  // as which of the chain's results, or -1
  };
  struct Step {
    std::vector<int64_t> tensors;  // positions; -1: none
    Repeat repeat;
    size_t block;  // where its result lies
    int64_t offset;
    std::vector<size_t> freed;  // blocks that nobody needs after it
  };
  struct Returned {
    std::array<int64_t, 4> sizes;
    ScalarType dtype;
    Layout layout;
  };

  mutable std::atomic<bool> used_{false};
  bool winograd_;  // whether it was allowed
  std::vector<TensorKind> kinds_;
  std::vector<Step> steps_;
  std::vector<Block> blocks_;
  std::vector<Returned> returned_;
  size_t most_tensors_ = 4;  // of a step; convolutions look at all of theirs
};

}  // namespace torchconv::ops
