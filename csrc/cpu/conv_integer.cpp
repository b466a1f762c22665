// Integer convolution by plain loops: for each output row, every tap adds its scaled source row to
// a row of accumulators. Unsigned accumulators of at least the element's width give the same low
// bits as the element type would, without signed overflow.
#include "cpu/conv_integer.h"

#include <algorithm>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

template <typename T>
void run(const ConvView& v, const T* src, const T* w, const T* bias, T* dst, const Parallel& pool) {
  using Sum = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  const WorkSplit split(v.N * v.groups * v.K * v.I,
                        8.0 * static_cast<double>(v.J) * static_cast<double>(v.terms() + 1));
  Buffer<Sum> rows(split.slots * v.J);
  split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
    Sum* row = rows.get() + slot * v.J;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item % v.I, k = item / v.I % v.K, g = item / v.I / v.K % v.groups;
      const int64_t n = item / v.I / v.K / v.groups;
      std::fill(row, row + v.J, bias != nullptr ? static_cast<Sum>(bias[g * v.K + k]) : Sum{0});
      for (const ConvTap& tap : v.taps) {
        const int64_t h = i * v.step_h + tap.h;
        if (h < 0 || h >= v.H) continue;
        const Range range = valid_range(v.J, v.step_w, tap.w, v.W);
        const int64_t step = v.step_w * v.src.column;
        for (int64_t c = 0; c < v.C && range.begin < range.end; ++c) {
          const Sum weight = static_cast<Sum>(
              w[g * v.weight_group + k * v.weight_k + c * v.weight_c + tap.weight]);
          const T* x = src + n * v.src.n + (g * v.C + c) * v.src.c + h * v.src.row +
                       (range.begin * v.step_w + tap.w) * v.src.column;
          if (step == 1) {
            for (int64_t j = range.begin; j < range.end; ++j)
              row[j] += weight * static_cast<Sum>(x[j - range.begin]);
          } else {
            for (int64_t j = range.begin; j < range.end; ++j)
              row[j] += weight * static_cast<Sum>(x[(j - range.begin) * step]);
          }
        }
      }
      T* y = dst + v.dst_offset + n * v.dst.n + (g * v.K + k) * v.dst.c + i * v.dst.row;
      for (int64_t j = 0; j < v.J; ++j) y[j * v.dst.column] = static_cast<T>(row[j]);
    }
  });
}

template <typename T>
void run(const ConvView& view, const void* src, const void* w, const void* bias, void* dst,
         const Parallel& pool) {
  run(view, static_cast<const T*>(src), static_cast<const T*>(w), static_cast<const T*>(bias),
      static_cast<T*>(dst), pool);
}

}  // namespace

void conv_integer(const ConvView& view, DType dtype, const void* src, const void* w,
                  const void* bias, void* dst, const Parallel& pool) {
  switch (dtype) {
    case DType::kUInt8:
      return run<uint8_t>(view, src, w, bias, dst, pool);
    case DType::kInt8:
      return run<int8_t>(view, src, w, bias, dst, pool);
    case DType::kInt16:
      return run<int16_t>(view, src, w, bias, dst, pool);
    case DType::kInt32:
      return run<int32_t>(view, src, w, bias, dst, pool);
    case DType::kInt64:
      return run<int64_t>(view, src, w, bias, dst, pool);
    default:
      return;
  }
}

}  // namespace torchconv::cpu
