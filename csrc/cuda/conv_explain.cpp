// What a convolution will run on the GPU, in words and numbers, from the function that chooses.
// Winograd alone does less than the direct one's operations.
#include <cstdio>

#include "cuda/conv2d.h"
#include "cuda/conv_choice.h"
#include "cuda/winograd.h"

namespace torchconv::cuda {
namespace {

const char* name_of(ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::kSimt:
      return "implicit matrix product";
    case ConvAlgorithm::kWinograd:
      return "Winograd";
    case ConvAlgorithm::kDepthwise:
      return "depthwise";
    case ConvAlgorithm::kGrouped:
      return "groups";
    case ConvAlgorithm::kGroupedMma:
      return "groups on tensor cores";
    case ConvAlgorithm::kMma:
      return "implicit matrix product on tensor cores";
    case ConvAlgorithm::kCutlass:
      return "implicit matrix product on tensor cores (CUTLASS)";
  }
  return "";
}

double product_of(std::initializer_list<int64_t> sizes) {
  double product = 1;
  for (const int64_t size : sizes) product *= static_cast<double>(size);
  return product;
}

std::string layouts(const ConvProblem& p, const ConvProblem& plan) {
  const bool channels_last = plan.layout == Layout::kNHWC;
  if (p.layout == plan.layout) return channels_last ? "NHWC" : "NCHW";
  return channels_last ? "NHWC copies of NCHW images" : "NCHW copies of NHWC images";
}

}  // namespace

std::string conv2d_explain(const ConvProblem& p, const Queue& queue) {
  const double size = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  const double operations = 2 * product_of({p.N, p.K, p.P, p.Q, p.C / p.groups, p.R, p.S});
  const double bytes =
      size * (product_of({p.N, p.C, p.H, p.W}) + product_of({p.K, p.C / p.groups, p.R, p.S}) +
              product_of({p.N, p.K, p.P, p.Q}));
  std::string lines;
  const std::pair<const char*, Pass> passes[] = {
      {"fprop", Pass::kFprop}, {"dgrad", Pass::kDgrad}, {"wgrad", Pass::kWgrad}};
  for (const auto& [name, pass] : passes) {
    const ConvPlan plan = plan_conv(p, pass, {}, queue);
    const double executed = plan.algorithm == ConvAlgorithm::kWinograd
                                ? winograd_operations(plan.problem, pass)
                                : operations;
    char numbers[120];
    std::snprintf(numbers, sizeof(numbers), "\t%.17g\t%.17g\t%.17g\n", operations, executed, bytes);
    lines += std::string(name) + '\t' + name_of(plan.algorithm) + "\t\t" +
             layouts(p, plan.problem) + numbers;
  }
  return lines;
}

}  // namespace torchconv::cuda
