// Max and min pooling, forward: from the run-time element type to the kernel compiled for it, and
// how a row of codes becomes offsets or indices.
#include "cpu/select_pool2d.h"

#include <limits>
#include <type_traits>

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

// Computes with T, in whose lanes `sign` is a bit to be flipped. The minimum is the maximum of the
// values mirrored at zero: the sign's bit of floating-point numbers flipped, all bits of integers.
template <typename T>
void select_as(const PoolProblem& p, Select select, const void* x, void* y, SelectedArray selected,
               const Parallel& pool, LaneInt<T> sign = 0) {
  LaneInt<T> reversal = std::numeric_limits<LaneInt<T>>::min();
  if constexpr (std::is_integral_v<T>) reversal = static_cast<T>(~T{0});
  const LaneInt<T> mirror = select == Select::kMin ? sign ^ reversal : sign;
  select_pool2d_as(p, mirror, static_cast<const T*>(x), static_cast<T*>(y), selected, pool);
}

template <typename Code>
void store_codes(const SelectedArray& selected, int64_t position, const Code* codes, int64_t n) {
  switch (selected.kind) {
    case Selected::kOffset8:
      return convert_run(codes, n, static_cast<uint8_t*>(selected.data) + position);
    case Selected::kOffset16:
      return convert_run(codes, n, static_cast<uint16_t*>(selected.data) + position);
    case Selected::kOffset32:
      return convert_run(codes, n, static_cast<int32_t*>(selected.data) + position);
    case Selected::kIndex64:
      return convert_run(codes, n, static_cast<int64_t*>(selected.data) + position);
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
    // With the sign's bit flipped, signed integers are ordered as unsigned ones.
    case DType::kUInt8:
      return select_as<uint8_t>(p, select, x, y, selected, pool);
    case DType::kInt8:
      return select_as<uint8_t>(p, select, x, y, selected, pool, 1 << 7);
    case DType::kUInt16:
      return select_as<uint16_t>(p, select, x, y, selected, pool);
    case DType::kInt16:
      return select_as<uint16_t>(p, select, x, y, selected, pool, 1 << 15);
    case DType::kInt32:
      return select_as<int32_t>(p, select, x, y, selected, pool);
    case DType::kInt64:
      return select_as<int64_t>(p, select, x, y, selected, pool);
  }
}

}  // namespace torchconv::cpu
