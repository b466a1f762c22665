// See chain_plan.h.

#include "ops/cpu/chain_plan.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "core/buffer.h"
#include "cpu/conv_choice.h"
#include "ops/execution.h"

namespace torchconv::ops {
namespace {

int64_t bytes_of(const Tensor& t) {
  const IntList sizes = t.sizes(), strides = t.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return (last + 1) * t.element_size();
}

const char* data_of(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

}  // namespace

TensorKind::TensorKind(const Tensor& t) : sizes{}, strides{}, dim(t.dim()), dtype(t.scalar_type()) {
  const IntList s = t.sizes(), steps = t.strides();
  std::copy(s.begin(), s.end(), sizes.begin());
  std::copy(steps.begin(), steps.end(), strides.begin());
}

bool TensorKind::describes(const Tensor& t) const {
  const auto equals = [this](const std::array<int64_t, 4>& known, IntList now) {
    return static_cast<int64_t>(now.size()) == dim &&
           std::equal(now.begin(), now.end(), known.begin());
  };
  return equals(sizes, t.sizes()) && equals(strides, t.strides()) && t.scalar_type() == dtype &&
         t.is_cpu();
}

// Makes a plan of a run: finds out by their addresses which results share a block.
class ChainPlan::Recorder : public ChainRecorder {
 public:
  explicit Recorder(const std::vector<Tensor>& tensors)
      : first_(static_cast<int64_t>(tensors.size())),
        switched_(cpu::winograd_changes()),
        plan_(std::make_shared<ChainPlan>()) {
    plan_->winograd_ = cpu::winograd_allowed();
    for (const Tensor& t : tensors) {
      possible_ = possible_ && t.is_cpu() && TensorKind::exists(t) && t.numel() > 0;
      if (possible_) plan_->kinds_.emplace_back(t);
    }
  }

  void add(StepRecord step) override {
    possible_ = possible_ && step.repeat && step.result.dim() == 4 && step.result.numel() > 0;
    if (!possible_) return;
    const char* const data = data_of(step.result);
    const auto whole = wholes_.find(first_ + static_cast<int64_t>(results_.size()));
    const bool is_whole = whole != wholes_.end() && whole->second.data == data;
    const auto [block, offset] =
        is_whole ? std::pair<size_t, int64_t>(whole->second.block, 0) : place_of(step, data);
    results_.push_back({block, offset, bytes_of(step.result), data, TensorKind(step.result)});
    plan_->steps_.push_back(
        {{step.tensors.begin(), step.tensors.end()}, std::move(step.repeat), block, offset, {}});
    plan_->most_tensors_ = std::max(plan_->most_tensors_, step.tensors.size());
    ++users_[block];
    if (is_whole) release(block);  // see block_of_whole
  }

  void drop(int64_t position) override {
    if (!possible_ || position < first_) return;
    Result& result = results_[position - first_];
    result.data = nullptr;
    release(result.block);
  }

  void finish(IntList returned) override {
    for (const int64_t position : returned) {
      possible_ = possible_ && position >= first_;
      if (!possible_) return;
      const Result& result = results_[position - first_];
      Block& block = plan_->blocks_[result.block];
      // Not twice, and no part.
      possible_ = block.returned < 0 && result.offset == 0 && result.bytes == block.bytes;
      block.returned = static_cast<int64_t>(plan_->returned_.size());
      add_returned(result.kind);
    }
  }

  // Steps may have chosen differently where another thread meanwhile switched.
  std::shared_ptr<const ChainPlan> plan() const {
    return possible_ && switched_ == cpu::winograd_changes() ? plan_ : nullptr;
  }

 private:
  struct Result {
    size_t block;
    int64_t offset, bytes;
    const char* data;  // until it is dropped
    TensorKind kind;
  };
  struct Whole {
    size_t block;
    const char* data;
  };

  size_t new_block(int64_t bytes) {
    plan_->blocks_.push_back({bytes, -1});
    users_.push_back(0);
    return users_.size() - 1;
  }

  void release(size_t block) {
    if (--users_[block] == 0) plan_->steps_.back().freed.push_back(block);
  }

  // Block and offset of a step's result at this address.
  std::pair<size_t, int64_t> place_of(const StepRecord& step, const char* data) {
    for (const int64_t position : step.tensors) {
      if (position < first_) continue;
      const Result& read = results_[position - first_];
      if (read.data == data) return {read.block, read.offset};
    }
    if (step.whole != nullptr) {
      const char* const whole = data_of(*step.whole);
      const int64_t bytes = bytes_of(*step.whole);
      if (whole <= data && data < whole + bytes)
        return {block_of_whole(step.whole_position, whole, bytes), data - whole};
    }
    return {new_block(bytes_of(step.result)), 0};
  }

  // Of a concatenation to come: in use until that is made, whatever becomes of its parts.
  size_t block_of_whole(int64_t position, const char* data, int64_t bytes) {
    const auto found = wholes_.find(position);
    if (found != wholes_.end()) return found->second.block;
    const size_t block = new_block(bytes);
    ++users_[block];
    wholes_.emplace(position, Whole{block, data});
    return block;
  }

  void add_returned(const TensorKind& kind) {
    for (const Layout layout : {Layout::kNCHW, Layout::kNHWC})
      if (dense_strides(kind.sizes, layout) == kind.strides)
        return plan_->returned_.push_back({kind.sizes, kind.dtype, layout});
    possible_ = false;
  }

  const int64_t first_;     // position of a result
  const int64_t switched_;  // winograd_changes at first
  bool possible_ = true;
  std::shared_ptr<ChainPlan> plan_;
  std::vector<int64_t> users_;       // of the plan's blocks: results that are not dropped
  std::vector<Result> results_;      // [step]
  std::map<int64_t, Whole> wholes_;  // concatenations to come, by position
};

std::vector<Tensor> ChainPlan::record(const std::vector<Tensor>& tensors, const Tensor& program,
                                      std::shared_ptr<const ChainPlan>* plan) {
  Recorder recorder(tensors);
  std::vector<Tensor> results = run_chain(tensors, program, &recorder);
  *plan = recorder.plan();
  return results;
}

bool ChainPlan::fits(const std::vector<Tensor>& tensors, size_t fixed) const {
  if (winograd_ != cpu::winograd_allowed() || tensors.size() + fixed != kinds_.size()) return false;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (!kinds_[i].describes(tensors[i])) return false;
  return true;
}

std::vector<Tensor> ChainPlan::run(const std::vector<Tensor>& tensors,
                                   const std::vector<const void*>& fixed) const {
  used_ = true;
  const size_t first = tensors.size() + fixed.size();
  std::vector<const void*> at(first + steps_.size());  // by position
  for (size_t i = 0; i < tensors.size(); ++i) at[i] = tensors[i].const_data_ptr();
  std::copy(fixed.begin(), fixed.end(), at.begin() + tensors.size());
  std::vector<char*> blocks(blocks_.size());
  std::vector<std::optional<Buffer<char>>> memory(blocks_.size());
  std::vector<Tensor> results;
  results.reserve(returned_.size());
  for (const Returned& r : returned_)
    results.push_back(new_tensor(tensors[0], r.sizes, r.dtype, r.layout));
  std::vector<const void*> read(most_tensors_);
  const auto run_steps = [&] {
    for (size_t i = 0; i < steps_.size(); ++i) {
      const Step& step = steps_[i];
      const Block& block = blocks_[step.block];
      char*& begin = blocks[step.block];
      if (begin == nullptr)
        begin = block.returned >= 0 ? static_cast<char*>(results[block.returned].mutable_data_ptr())
                                    : memory[step.block].emplace(block.bytes).get();
      at[first + i] = begin + step.offset;
      for (size_t t = 0; t < read.size(); ++t)
        read[t] = t < step.tensors.size() && step.tensors[t] >= 0 ? at[step.tensors[t]] : nullptr;
      step.repeat({read.data(), begin + step.offset});
      for (const size_t freed : step.freed) memory[freed].reset();
    }
  };
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  if (1 < threads && threads <= Team::kMostThreads)
    Team::lead(torch_threads(), threads, run_steps);
  else
    run_steps();
  return results;
}

}  // namespace torchconv::ops
