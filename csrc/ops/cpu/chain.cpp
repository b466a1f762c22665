// Operators one after another in one call, for networks of small layers: a layer's way from Python
// costs more than many a layer. torchconv/_programs.py writes the program.

#include "ops/chain.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "ops/backend.h"
#include "ops/cpu/aten.h"
#include "ops/cpu/gate.h"
#include "ops/cpu/linear.h"
#include "ops/settings.h"
#include "ops/tensor_args.h"

namespace torchconv::ops {
namespace {

// The call's tensors and, after them, the results of the steps, by their positions.
class Known {
 public:
  explicit Known(const std::vector<Tensor>& given)
      : tensors_(given.begin(), given.end()), given_(static_cast<int64_t>(given.size())) {}

  const std::optional<Tensor>& at(int64_t position) const {
    TORCHCONV_CHECK(0 <= position && position < static_cast<int64_t>(tensors_.size()) &&
                        tensors_[position].has_value(),
                    "a chain reads tensor ", position, ", which is not there");
    return tensors_[position];
  }

  // None for -1.
  std::optional<Tensor> optional(int64_t position) const {
    return position == -1 ? std::nullopt : at(position);
  }

  // Whether it is a step's result, which nobody else has.
  bool is_result(int64_t position) const { return position >= given_; }

  void add(Tensor t) { tensors_.emplace_back(std::move(t)); }

  // Of the next result.
  int64_t next() const { return static_cast<int64_t>(tensors_.size()); }

  // What is to be the result at this position, as far as its parts are written.
  std::optional<Tensor>& whole(int64_t position) {
    for (auto& [of, whole] : wholes_)
      if (of == position) return whole;
    return wholes_.emplace_back(position, std::nullopt).second;
  }

  void drop(int64_t position) {
    at(position);
    tensors_[position].reset();
  }

 private:
  std::vector<std::optional<Tensor>> tensors_;
  std::vector<std::pair<int64_t, std::optional<Tensor>>> wholes_;
  int64_t given_;
};

// A product of two tensors, in the memory of one of them where the step is the last to read it.
Tensor multiply(const Known& known, IntList positions, SettingsReader program, Repeat* repeat) {
  const IntList done = program.take<IntList>();
  const auto dies = [&](int64_t position) {
    return known.is_result(position) && std::find(done.begin(), done.end(), position) != done.end();
  };
  const Tensor &a = *known.at(positions[0]), &b = *known.at(positions[1]);
  if (std::optional<Tensor> gated = gate_channels(a, b, dies(positions[0]), 1, repeat))
    return *gated;
  if (std::optional<Tensor> gated = gate_channels(b, a, dies(positions[1]), 0, repeat))
    return *gated;
  return aten("aten::mul", "Tensor", a, b);
}

// Whether the parts make up `whole`, where some have been written to their places: the others are
// copied to theirs, so many.
bool complete(Tensor whole, const std::vector<Tensor>& parts, size_t* copied) {
  const IntList all = whole.sizes();
  std::vector<std::pair<const Tensor*, int64_t>> others;
  int64_t first = 0;
  for (const Tensor& part : parts) {
    const IntList sizes = part.sizes();
    const bool fits = sizes.size() == 4 && part.scalar_type() == whole.scalar_type() &&
                      sizes[0] == all[0] && sizes[2] == all[2] && sizes[3] == all[3];
    if (!fits) return false;
    const bool written =
        static_cast<const char*>(part.const_data_ptr()) ==
        static_cast<const char*>(whole.const_data_ptr()) + first * whole.element_size();
    // One that is written elsewhere in it has the whole's strides.
    if (!written) {
      if (part.stride(3) != sizes[1] || suggested_layout(part) != Layout::kNHWC) return false;
      others.emplace_back(&part, first);
    }
    first += sizes[1];
  }
  if (first != all[1]) return false;
  *copied = others.size();
  for (const auto& [part, at] : others) {
    Tensor place = torch::stable::narrow(whole, 1, at, part->size(1));
    torch::stable::copy_(place, *part);
  }
  return true;
}

// The next result: parts that convolutions have written to their places in it need no copy.
Tensor concatenate(Known* known, IntList positions, int64_t dim, Repeat* repeat) {
  std::vector<Tensor> parts;
  for (const int64_t position : positions) parts.push_back(*known->at(position));
  const std::optional<Tensor> whole = std::exchange(known->whole(known->next()), std::nullopt);
  if (whole.has_value()) {
    size_t copied = 0;
    if (complete(*whole, parts, &copied)) {
      if (repeat != nullptr && copied == 0) *repeat = [](const StepMemory&) {};
      return *whole;
    }
    // As they would lie apart.
    for (Tensor& part : parts) part = dense(part, suggested_layout(part));
  }
  return aten("aten::cat", "", parts, dim);
}

// repeat, and the place of a part that has been written to it: for a recorder, where there is one.
Tensor run_step(Known* all, SettingsReader* program, int64_t step, IntList positions,
                Repeat* repeat, int64_t* whole_position) {
  const Known& known = *all;
  // The step's tensors: those that it must have, and those that may be none.
  const auto position = [&](size_t i) { return i < positions.size() ? positions[i] : -1; };
  const auto tensor = [&](size_t i) -> const Tensor& { return *known.at(position(i)); };
  const Tensor input = tensor(0);
  switch (step) {
    case 0:
      return conv2d_step(input, tensor(1), known.optional(position(2)), known.optional(position(3)),
                         program, repeat);
    case 1:
      return max_pool2d_step(input, program, repeat);
    case 2:
      return avg_pool2d_step(input, program, repeat);
    case 3:
      return adaptive_avg_pool2d_step(input, program, repeat);
    case 4:
      tensor(1);  // or raises
      return multiply(known, positions, *program, repeat);
    case 5:
      if (std::optional<Tensor> gate = hardsigmoid(input, repeat)) return *gate;
      return aten("aten::hardsigmoid", "", input);
    case 6:
      return concatenate(all, positions, program->take<int64_t>(), repeat);
    case 7: {
      *whole_position = program->take<int64_t>();
      const int64_t first = program->take<int64_t>();
      const ConcatenatedPart part{first, program->take<int64_t>(), &all->whole(*whole_position)};
      return conv2d_step(input, tensor(1), known.optional(position(2)), known.optional(position(3)),
                         program, repeat, &part);
    }
    case 8:
      return linear_step(input, tensor(1), known.optional(position(2)), program, repeat);
  }
  fail({"a chain has no operator ", step});
}

}  // namespace

// The program: how many steps, and for each its operator, the list of its tensors' positions, its
// settings and the positions that no later step reads; then the positions of what is returned.
std::vector<Tensor> run_chain(const std::vector<Tensor>& tensors, const Tensor& program,
                              ChainRecorder* recorder) {
  SettingsReader reader(program);
  Known known(tensors);
  for (int64_t steps = reader.take<int64_t>(); steps > 0; --steps) {
    const int64_t step = reader.take<int64_t>();
    const IntList positions = reader.take<IntList>();
    Repeat repeat;
    int64_t whole = -1;
    const Tensor result =
        run_step(&known, &reader, step, positions, recorder != nullptr ? &repeat : nullptr, &whole);
    if (recorder != nullptr) {
      const Tensor* place = nullptr;
      if (whole >= 0 && known.whole(whole).has_value()) place = &*known.whole(whole);
      recorder->add({positions, result, std::move(repeat), whole, place});
    }
    known.add(result);
    for (const int64_t position : reader.take<IntList>()) {
      known.drop(position);
      if (recorder != nullptr) recorder->drop(position);
    }
  }
  const IntList returned = reader.take<IntList>();
  std::vector<Tensor> results;
  for (const int64_t position : returned) results.push_back(*known.at(position));
  if (recorder != nullptr) recorder->finish(returned);
  return results;
}

}  // namespace torchconv::ops
