// Maxima and minima of large windows in NHWC: kWindowSplits threads share the taps of a window of
// 16 bytes of channels, each a run of them in their order, and have several loads under way. The
// parts are then folded in that order, by a thread for each channel. Bound: bytes moved.
#pragma once

#include "cuda/pool_geometry.h"
#include "cuda/pool_rules.h"

namespace torchconv::cuda {

inline constexpr int kWindowSplits = 8, kWindowVectors = 16;
inline constexpr int kWindowThreads = kWindowSplits * kWindowVectors;

template <typename T>
__global__ void __launch_bounds__(kWindowThreads, sizeof(T) == 2 ? 8 : 9)
    select_channel_windows(PoolView<int32_t> v, Selection<T> rule, const T* __restrict__ x,
                           T* __restrict__ y, SelectedOutput selected) {
  using State = typename Selection<T>::State;
  constexpr int n = kLanes<T>, kOutputs = kWindowVectors * n;
  constexpr int kBatch = 5;  // loads under way
  __shared__ State parts[kWindowSplits][kOutputs];
  const int id = static_cast<int>(threadIdx.x);
  const int split = id / kWindowVectors, own = id % kWindowVectors;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kWindowVectors;
  if (first + own < v.threads) {
    const PoolPlace<int32_t> at(v, first + own, n);
    const WindowTaps<int32_t> rows = v.h.window(at.row), columns = v.w.window(at.column);
    const int32_t width = columns.count, count = width > 0 ? rows.count * width : 0;
    const auto first_code = static_cast<uint32_t>(rows.tap * v.row_codes + columns.tap);
    State total[n];
#pragma unroll
    for (int i = 0; i < n; i++)
      total[i] = Selection<T>::start(count == 0 ? ~uint32_t{0} : first_code);
    const int32_t share = (count + kWindowSplits - 1) / kWindowSplits;
    int32_t tap = split * share;
    const int32_t end = min(tap + share, count);
    if (tap < end) {
      const int32_t step = v.w.dilation * v.channels;
      const int32_t next_row = v.h.dilation * v.w.size * v.channels - width * step;
      int32_t r = tap / width, s = tap - r * width;
      const T* from = x +
                      ((at.image * v.h.size + rows.element + r * v.h.dilation) * v.w.size +
                       columns.element + s * v.w.dilation) *
                          v.channels +
                      at.c;
      uint32_t code = first_code + static_cast<uint32_t>(r * v.row_codes + s);
      for (; tap < end; tap += kBatch) {
        Pack<T> batch[kBatch];
        uint32_t codes[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; k++) {
          codes[k] = code;
          if (tap + k < end) batch[k] = Pack<T>::load(from);
          from += step, s++, code++;
          if (s == width)
            s = 0, from += next_row, code += static_cast<uint32_t>(v.row_codes - width);
        }
#pragma unroll
        for (int k = 0; k < kBatch; k++) {
          if (tap + k >= end) break;
#pragma unroll
          for (int i = 0; i < n; i++)
            Selection<T>::fold(total[i], rule.mirror(batch[k].at(i)), codes[k]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < n; i++) parts[split][own * n + i] = total[i];
  }
  __syncthreads();
  for (int output = id; output < kOutputs; output += kWindowThreads) {
    const int32_t vector = first + output / n;
    if (vector >= v.threads) break;
    State total = parts[0][output];
#pragma unroll
    for (int k = 1; k < kWindowSplits; k++) Selection<T>::join(total, parts[k][output], 0);
    const int32_t position = vector * n + output % n;
    y[position] = from_wide<T>(rule.mirror(total.value));
    if (selected.data == nullptr) continue;
    const PoolPlace<int32_t> at(v, vector, n);
    store_codes<1>(
        selected, position, [&](int) { return total.code; },
        [&](int) {
          return v.index_of(total.code, static_cast<uint32_t>(v.row_codes), at.row, at.column);
        });
  }
}

template <typename T>
void launch_select_channel_windows(const PoolShape& s, int64_t images, const Selection<T>& rule,
                                   const T* x, T* y, const SelectedOutput& selected,
                                   const Queue& queue) {
  const PoolView<int32_t> view(s, images, kLanes<T>, true);
  launch(select_channel_windows<T>,
         dim3(static_cast<unsigned>(ceil_div(view.threads, kWindowVectors))), dim3(kWindowThreads),
         0, queue, view, rule, x, y, selected);
}

}  // namespace torchconv::cuda
