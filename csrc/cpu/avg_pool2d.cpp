// Average pooling, forward. The sums of a window are taken by the kernels that also serve max and
// min pooling (pool2d_nchw.h, pool2d_nhwc.h), in float for bfloat16 and float16; the divisors are
// in avg_pool2d.h.
#include "cpu/avg_pool2d.h"

#include "cpu/pool2d.h"
#include "cpu/pool2d_layouts.h"

namespace torchconv::cpu {
namespace {

template <typename T>
void average_as(const PoolProblem& p, const void* x, void* y, const Parallel& pool) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  const SelectedArray nothing{Selected::kOffset8, nullptr};
  pool2d_with<false>(p, Averaging<T>(), from, to, nothing, pool);
}

}  // namespace

void avg_pool2d(const PoolProblem& p, const void* x, void* y, const Parallel& pool) {
  if (p.N == 0 || p.C == 0 || p.P == 0 || p.Q == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return average_as<float>(p, x, y, pool);
    case DType::kFloat64:
      return average_as<double>(p, x, y, pool);
    case DType::kBFloat16:
      return average_as<BFloat16>(p, x, y, pool);
    case DType::kFloat16:
      return average_as<Float16>(p, x, y, pool);
    default:
      return;  // csrc/ops refuses the integer types
  }
}

}  // namespace torchconv::cpu
