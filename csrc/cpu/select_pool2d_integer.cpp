// Max and min pooling of the integer types, computed in int32_t or int64_t lanes by the kernels of
// pool2d_nchw.h, pool2d_nhwc.h and pool2d_global.h. The minimum is the maximum of the complements,
// chosen at run time to keep the library small.
#include "cpu/pool2d_layouts.h"
#include "cpu/select_pool2d.h"

namespace torchconv::cpu {
namespace {

template <typename Rule, typename T>
void select_with(const PoolProblem& p, Rule rule, const T* x, T* y, SelectedArray selected,
                 const Parallel& pool) {
  if (selected.data != nullptr) {
    pool2d_with<true>(p, rule, x, y, selected, pool);
  } else {
    pool2d_with<false>(p, rule, x, y, selected, pool);
  }
}

}  // namespace

template <typename T>
void select_pool2d_as(const PoolProblem& p, Select select, const T* x, T* y, SelectedArray selected,
                      const Parallel& pool) {
  IntegerSelection<T> rule;
  rule.mirror = select == Select::kMax ? 0 : -1;
  select_with(p, rule, x, y, selected, pool);
}

template void select_pool2d_as(const PoolProblem&, Select, const uint8_t*, uint8_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const int8_t*, int8_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const int16_t*, int16_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const int32_t*, int32_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const int64_t*, int64_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const uint16_t*, uint16_t*,
                               SelectedArray, const Parallel&);

}  // namespace torchconv::cpu
