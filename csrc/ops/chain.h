// The steps of a chain (cpu/chain.cpp): an operator's result for these tensors and the settings
// that come next in the program.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "ops/settings.h"
#include "ops/tensor_args.h"

namespace torchconv::ops {

// Where the tensors of a step lie, null for none, and its result.
struct StepMemory {
  const void* const* tensors;
  void* result;
};
// A step once more, on tensors of the same sizes, strides and types: what follows from these alone
// has been done. Steps that read their tensors as they lie have one.
using Repeat = std::function<void(const StepMemory&)>;

// A step that has been run.
struct StepRecord {
  IntList tensors;  // positions
  const Tensor& result;
  Repeat repeat;
  // Where the result is a part of a concatenation that has not been made yet: whose position, and
  // what will be that. Or null.
  int64_t whole_position;
  const Tensor* whole;
};

// Who wants to know what a chain does.
class ChainRecorder {
 public:
  virtual ~ChainRecorder() = default;
  virtual void add(StepRecord step) = 0;
  virtual void drop(int64_t position) = 0;
  virtual void finish(IntList results) = 0;
};

// tensors and program: see cpu/chain.cpp. recorder may be null.
std::vector<Tensor> run_chain(const std::vector<Tensor>& tensors, const Tensor& program,
                              ChainRecorder* recorder);

// A result that is read only as a part of a concatenation: where it may be written at once.
struct ConcatenatedPart {
  int64_t first, channels;  // of all
  // All parts' tensor, made for the first one that is written there. A part that is so is a view of
  // it.
  std::optional<Tensor>* whole;
};

// Before conv2d's settings comes whether the residual's layout has to be the output's, and after
// them the owner and the version of packed weights. repeat, here and below: is set where it is not
// null and there is such a thing.
Tensor conv2d_step(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, SettingsReader* reader, Repeat* repeat,
                   const ConcatenatedPart* part = nullptr);
Tensor max_pool2d_step(const Tensor& input, SettingsReader* reader, Repeat* repeat);
Tensor avg_pool2d_step(const Tensor& input, SettingsReader* reader, Repeat* repeat);
Tensor adaptive_avg_pool2d_step(const Tensor& input, SettingsReader* reader, Repeat* repeat);

}  // namespace torchconv::ops
