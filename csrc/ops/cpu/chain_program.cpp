// Programs of chains (chain.cpp) that the library keeps, each with the plans of its last calls. It
// keeps no tensor of a call: torch.utils.swap_tensors, for one, refuses what others hold on to. One
// table for all programs behind one mutex, which no work is done under.

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/fork_safe.h"
#include "ops/cpu/chain_plan.h"

namespace torchconv::ops {
namespace {

class ChainProgram {
 public:
  using Addresses = std::vector<const void*>;

  explicit ChainProgram(const Tensor& program) : program_(program) {}

  std::vector<Tensor> run(const std::vector<Tensor>& tensors) {
    bool records = false;
    if (const auto plan = find(tensors, &records)) return plan->run(tensors);
    if (!records) return run_chain(tensors, program_, nullptr);
    std::shared_ptr<const ChainPlan> plan;
    std::vector<Tensor> results = ChainPlan::record(tensors, program_, &plan);
    keep(std::move(plan));
    return results;
  }

  // By a plan for such inputs and the fixed parameters behind them; no results where there is none.
  std::vector<Tensor> run_planned(const std::vector<Tensor>& inputs) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return {};
    const Plans plans = plans_;
    const auto parameters = parameters_;
    lock.unlock();
    if (parameters == nullptr) return {};
    for (const auto& plan : plans)
      if (plan != nullptr && plan->fits(inputs, parameters->size()))
        return plan->run(inputs, *parameters);
    return {};
  }

  void fix(Addresses parameters) {
    auto fixed = std::make_shared<const Addresses>(std::move(parameters));
    const std::lock_guard<std::mutex> lock(mutex_);
    parameters_.swap(fixed);
  }

  int64_t plans() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::count_if(plans_.begin(), plans_.end(), [](const auto& p) { return p != nullptr; });
  }

 private:
  using Plans = std::array<std::shared_ptr<const ChainPlan>, 4>;
  static constexpr int64_t kMostRest = 63;

  // records: whether a plan is to be made where there is none. A forked child may find the mutex
  // taken for ever: then it goes without plans.
  std::shared_ptr<const ChainPlan> find(const std::vector<Tensor>& tensors, bool* records) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return nullptr;
    const Plans plans = plans_;
    lock.unlock();
    for (const auto& plan : plans)
      if (plan != nullptr && plan->fits(tensors)) return plan;
    if (!lock.try_lock()) return nullptr;
    *records = rest_ == 0;
    if (rest_ > 0) --rest_;
    return nullptr;
  }

  // In the place of the oldest. Where that was made in vain, or no plan can be, because the tensors
  // are of others in every call, the next attempts come more and more rarely.
  void keep(std::shared_ptr<const ChainPlan> plan) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return;
    const auto& oldest = plans_.back();
    const bool wasted = plan == nullptr || (oldest != nullptr && !oldest->used());
    pause_ = wasted ? std::min(2 * pause_ + 1, kMostRest) : 0;
    rest_ = pause_;
    if (plan == nullptr) return;
    plans_.back().swap(plan);
    std::rotate(plans_.begin(), plans_.end() - 1, plans_.end());
  }

  const Tensor program_;
  std::mutex mutex_;
  Plans plans_;  // of the last kinds of tensors, the newest first
  std::shared_ptr<const Addresses> parameters_;
  // For how many calls no plan is made, and for how many after the next one in vain.
  int64_t rest_ = 0, pause_ = 0;
};

struct Table : ForkSafe<Table> {
  std::unordered_map<int64_t, std::shared_ptr<ChainProgram>> programs;
  int64_t last = 0;
};

int64_t keep_chain(const Tensor& program) {
  auto made = std::make_shared<ChainProgram>(program);
  Table& table = Table::instance();
  const std::lock_guard<std::mutex> lock(table.mutex);
  table.programs.emplace(++table.last, std::move(made));
  return table.last;
}

// Null where there is none.
std::shared_ptr<ChainProgram> find_program(int64_t number) {
  Table& table = Table::instance();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.programs.find(number);
  return found == table.programs.end() ? nullptr : found->second;
}

std::vector<Tensor> run_kept_chain(const std::vector<Tensor>& tensors, int64_t number) {
  const std::shared_ptr<ChainProgram> program = find_program(number);
  TORCHCONV_CHECK(program != nullptr, "no chain of number ", number, " is kept");
  return program->run(tensors);
}

std::vector<Tensor> run_planned_chain(const std::vector<Tensor>& inputs, int64_t number) {
  const std::shared_ptr<ChainProgram> program = find_program(number);
  TORCHCONV_CHECK(program != nullptr, "no chain of number ", number, " is kept");
  return program->run_planned(inputs);
}

}  // namespace

// For torchconv/_programs.py, through ctypes.
#define TORCHCONV_EXPORT extern "C" __attribute__((visibility("default")))

// How many plans its program has, -1 without one.
TORCHCONV_EXPORT int64_t torchconv_chain_plans(int64_t number) {
  const std::shared_ptr<ChainProgram> program = find_program(number);
  return program == nullptr ? -1 : program->plans();
}

// Of its tensors the last ones lie at these addresses, as long as it is kept, whatever else becomes
// of them.
TORCHCONV_EXPORT void torchconv_fix_chain_parameters(int64_t number, const uint64_t* addresses,
                                                     int64_t count) {
  std::vector<const void*> parameters;
  for (int64_t i = 0; i < count; ++i)
    parameters.push_back(reinterpret_cast<const void*>(addresses[i]));
  if (const auto program = find_program(number)) program->fix(std::move(parameters));
}

TORCHCONV_EXPORT void torchconv_forget_chain(int64_t number) {
  std::shared_ptr<ChainProgram> forgotten;  // after the lock
  Table& table = Table::instance();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.programs.find(number);
  if (found == table.programs.end()) return;
  forgotten.swap(found->second);
  table.programs.erase(found);
}

STABLE_TORCH_LIBRARY_IMPL(torchconv, CPU, m) {
  m.impl("keep_chain", TORCH_BOX(&keep_chain));
  m.impl("run_kept_chain", TORCH_BOX(&run_kept_chain));
  m.impl("run_planned_chain", TORCH_BOX(&run_planned_chain));
}

}  // namespace torchconv::ops
