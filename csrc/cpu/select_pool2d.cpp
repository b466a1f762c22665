// Max and min pooling, forward: from the run-time element type to the kernel compiled for it, and
// how a row of codes becomes offsets or indices.
#include "cpu/select_pool2d.h"

#include "cpu/pool2d.h"

namespace torchconv::cpu {
namespace {

Selected offset_kind(const PoolProblem& p) {
  switch (offset_dtype(p.R, p.S)) {
    case DType::kUInt8:
      return Selected::kOffset8;
    case DType::kUInt16:
      return Selected::kOffset16;
    default:
      return Selected::kOffset32;
  }
}

template <typename T>
void select_as(const PoolProblem& p, Select select, const void* x, void* y, SelectedArray selected,
               const Parallel& pool) {
  select_pool2d_as(p, select, static_cast<const T*>(x), static_cast<T*>(y), selected, pool);
}

template <typename O, typename Code>
void store_as(O* to, const Code* codes, int64_t n) {
  constexpr int kLanes = Vec<Code>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    Vec<O, kLanes>::store(to + i, convert<O, Code, kLanes>(Vec<Code>::load(codes + i)));
  if (i < n)
    Vec<O, kLanes>::store_partial(to + i, convert<O, Code, kLanes>(Vec<Code>::load(codes + i)),
                                  n - i);
}

template <typename Code>
void store_codes(const SelectedArray& selected, int64_t position, const Code* codes, int64_t n) {
  switch (selected.kind) {
    case Selected::kOffset8:
      return store_as(static_cast<uint8_t*>(selected.data) + position, codes, n);
    case Selected::kOffset16:
      return store_as(static_cast<uint16_t*>(selected.data) + position, codes, n);
    case Selected::kOffset32:
      return store_as(static_cast<int32_t*>(selected.data) + position, codes, n);
    case Selected::kIndex64:
      return store_as(static_cast<int64_t*>(selected.data) + position, codes, n);
  }
}

}  // namespace

void SelectedArray::store(int64_t position, const int32_t* codes, int64_t n) const {
  store_codes(*this, position, codes, n);
}
void SelectedArray::store(int64_t position, const int64_t* codes, int64_t n) const {
  store_codes(*this, position, codes, n);
}

void select_pool2d(const PoolProblem& p, Select select, const void* x, void* y, void* offsets,
                   int64_t* indices, const Parallel& pool) {
  if (p.N == 0 || p.C == 0 || p.P == 0 || p.Q == 0) return;
  const SelectedArray selected = indices != nullptr ? SelectedArray{Selected::kIndex64, indices}
                                                    : SelectedArray{offset_kind(p), offsets};
  switch (p.dtype) {
    case DType::kFloat32:
      return select_as<float>(p, select, x, y, selected, pool);
    case DType::kFloat64:
      return select_as<double>(p, select, x, y, selected, pool);
    case DType::kBFloat16:
      return select_as<BFloat16>(p, select, x, y, selected, pool);
    case DType::kFloat16:
      return select_as<Float16>(p, select, x, y, selected, pool);
    case DType::kUInt8:
      return select_as<uint8_t>(p, select, x, y, selected, pool);
    case DType::kInt8:
      return select_as<int8_t>(p, select, x, y, selected, pool);
    case DType::kInt16:
      return select_as<int16_t>(p, select, x, y, selected, pool);
    case DType::kInt32:
      return select_as<int32_t>(p, select, x, y, selected, pool);
    case DType::kInt64:
      return select_as<int64_t>(p, select, x, y, selected, pool);
    case DType::kUInt16:
      return select_as<uint16_t>(p, select, x, y, selected, pool);
  }
}

}  // namespace torchconv::cpu
