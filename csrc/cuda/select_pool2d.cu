// Max and min pooling's forward: which kernel runs.
#include "cuda/adaptive_pool2d.h"
#include "cuda/pool2d.h"
#include "cuda/pool_patches.h"
#include "cuda/pool_windows.h"

namespace torchconv::cuda {
namespace {

template <typename T>
void run(const PoolShape& s, Select select, bool is_unsigned, const void* x, void* y,
         const SelectedOutput& selected, const Queue& queue) {
  const auto bands = [&](int64_t images, const T* from, T* to, const SelectedOutput& codes) {
    if constexpr (!std::is_integral_v<T>) {
      if (select == Select::kMax)
        return codes.data == nullptr
                   ? run_pool_bands<Selection<T>, false>(s, images, from, to, codes, queue)
                   : run_pool_bands<Selection<T>, true>(s, images, from, to, codes, queue);
    }
    return false;
  };
  run_pool_windows(s, Selection<T>{Mirror<T>(select, is_unsigned)}, x, y, selected, queue, bands);
}

void run(const PoolShape& s, DType dtype, Select select, const void* x, void* y,
         const SelectedOutput& selected, const Queue& queue) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
      return run<int8_t>(s, select, dtype == DType::kUInt8, x, y, selected, queue);
    case DType::kUInt16:
    case DType::kInt16:
      return run<int16_t>(s, select, dtype == DType::kUInt16, x, y, selected, queue);
    case DType::kInt32:
      return run<int32_t>(s, select, false, x, y, selected, queue);
    case DType::kInt64:
      return run<int64_t>(s, select, false, x, y, selected, queue);
    default:
      with_float(dtype, [&](auto element) {
        run<decltype(element)>(s, select, false, x, y, selected, queue);
      });
  }
}

Selected offset_kind(const PoolProblem& p) {
  const DType type = offset_dtype(p.R, p.S);
  return type == DType::kUInt8    ? Selected::kOffset8
         : type == DType::kUInt16 ? Selected::kOffset16
                                  : Selected::kOffset32;
}

}  // namespace

void select_pool2d(const PoolProblem& p, Select select, const void* x, void* y, void* offsets,
                   int64_t* indices, const Queue& queue) {
  const SelectedOutput selected =
      indices != nullptr
          ? SelectedOutput{Selected::kIndex64, indices}
          : SelectedOutput{offsets != nullptr ? offset_kind(p) : Selected::kOffset8, offsets};
  run(pool_shape(p), p.dtype, select, x, y, selected, queue);
}

void adaptive_max_pool2d(const AdaptiveProblem& p, const void* x, void* y, int64_t* indices,
                         const Queue& queue) {
  run(pool_shape(p), p.dtype, Select::kMax, x, y, {Selected::kIndex64, indices}, queue);
}

}  // namespace torchconv::cuda
