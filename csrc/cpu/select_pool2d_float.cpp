// Max and min pooling of float32, float64, bfloat16 and float16. The kernels are in pool2d_nchw.h
// and pool2d_nhwc.h; the element types are split over two files only to compile them side by side.
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
  if (select == Select::kMax) {
    select_with(p, Selection<T, false>(), x, y, selected, pool);
  } else {
    select_with(p, Selection<T, true>(), x, y, selected, pool);
  }
}

template void select_pool2d_as(const PoolProblem&, Select, const float*, float*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const double*, double*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const BFloat16*, BFloat16*,
                               SelectedArray, const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const Float16*, Float16*, SelectedArray,
                               const Parallel&);

}  // namespace torchconv::cpu
