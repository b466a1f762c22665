// Pooling's backward for the windows of networks, R x S taps at stride kStep known at compile time:
// maximum by byte offsets, and average, without dilation.
//
// A thread goes down a band of dx's rows, for 16 bytes of the channels of one column (NHWC) or for
// as many neighbouring columns of a plane (NCHW). It reads each output row that reaches the band
// once, adds it to the R rows of dx that it reaches, which are in registers, and stores those that
// no later output row reaches. An element's terms are added in ascending order of the windows.
// Bound: bytes moved.
#pragma once

#include "cuda/pool_backward.h"
#include "cuda/pool_bands.h"

namespace torchconv::cuda {

struct BackwardBands {
  PoolView<int32_t> v;
  int32_t threads, rows;   // output rows after which a band's rows of dx are stored
  int32_t first_p, end_p;  // of all bands, from the first that a row of dx waits for
  bool vector_rows,
      vector_inputs;  // NCHW: whether rows of dy and selections, and of dx, are aligned
  Quotient<int32_t> by_groups, by_columns, by_bands;
};

// dy and offsets of the windows that hold one column, for n channels.
template <typename T, bool kSelects, int R, int S, int kStep>
struct ChannelSources {
  static constexpr int n = kLanes<T>, kWindows = (S + kStep - 1) / kStep;
  struct Raw {
    Pack<T> dy[kWindows];
    Matches<uint8_t, n> codes[kWindows];
  };
  const BackwardBands& b;
  BandDivision<R, S> divisors;
  const T* dy;
  const uint8_t* selected;
  int32_t offset, row_step;  // of row 0, the first window
  int32_t last, phase;       // the last window, and the column's tap in it
  bool valid[kWindows];

  __device__ __forceinline__ ChannelSources(const BackwardBands& bands, const T* gradients,
                                            const uint8_t* codes, int32_t image, int32_t column,
                                            int32_t c)
      : b(bands),
        divisors(bands.v),
        dy(gradients),
        selected(codes),
        row_step(bands.v.w.out * bands.v.channels) {
    last = (column + b.v.w.pad) / kStep;
    phase = column + b.v.w.pad - last * kStep;
    offset = (image * b.v.h.out * b.v.w.out + last - (kWindows - 1)) * b.v.channels + c;
#pragma unroll
    for (int j = 0; j < kWindows; j++)
      valid[j] = tap(j) < S && static_cast<uint32_t>(last - (kWindows - 1) + j) <
                                   static_cast<uint32_t>(b.v.w.out);
  }
  __device__ __forceinline__ int32_t tap(int j) const {
    return (kStep == 1 ? 0 : phase) + (kWindows - 1 - j) * kStep;
  }
  __device__ __forceinline__ Raw load(int32_t p) const {
    const bool inside = static_cast<uint32_t>(p) < static_cast<uint32_t>(b.v.h.out);
    Raw raw;
#pragma unroll
    for (int j = 0; j < kWindows; j++) {
      raw.dy[j] = Pack<T>::filled(from_wide<T>(0.0f));
      raw.codes[j] = Matches<uint8_t, n>();
      const int32_t at = offset + p * row_step + j * b.v.channels;
      if (inside && valid[j]) {
        raw.dy[j] = Pack<T>::load(dy + at);
        if constexpr (kSelects) raw.codes[j] = Matches<uint8_t, n>(selected + at);
      }
    }
    return raw;
  }
  __device__ __forceinline__ void add(Raw& raw, int32_t row_factor, float (&sum)[R][n]) const {
#pragma unroll
    for (int j = 0; j < kWindows; j++) {
      if constexpr (kSelects) {
#pragma unroll
        for (int r = 0; r < R; r++) {
          raw.codes[j].want(static_cast<uint8_t>(r * S + tap(j)));
#pragma unroll
          for (int i = 0; i < n; i++)
            if (raw.codes[j].at(i)) sum[r][i] += raw.dy[j].at(i);
        }
      } else {
        const int32_t left = (last - (kWindows - 1) + j) * kStep - b.v.w.pad;
        const Division<float> over = divisors.of(row_factor, left);
#pragma unroll
        for (int i = 0; i < n; i++) {
          const float v = over(raw.dy[j].at(i));
#pragma unroll
          for (int r = 0; r < R; r++) sum[r][i] += v;
        }
      }
    }
  }
};

// dy and offsets of the windows that hold one of n neighbouring columns, of which those that begin
// in the middle are a vector.
template <typename T, bool kSelects, int R, int S, int kStep>
struct PlaneSources {
  static constexpr int n = kLanes<T>, kPad = (S - 1) / 2, kMiddle = n / kStep;
  static constexpr int kBefore = (S - 1 - kPad) / kStep;
  static constexpr int kAfter = (n - 1 + kPad) / kStep + 1 - kMiddle;
  struct Raw {
    Vector<T, kMiddle> middle;
    Vector<uint8_t, kMiddle> middle_codes;
    T before[kBefore + 1], after[kAfter + 1];
    uint8_t before_codes[kBefore + 1], after_codes[kAfter + 1];
  };
  const BackwardBands& b;
  BandDivision<R, S> divisors;
  const T* dy;
  const uint8_t* selected;
  int32_t offset, first;  // of row 0, the window in the middle that is first; its number
  bool vectors;

  __device__ __forceinline__ PlaneSources(const BackwardBands& bands, const T* gradients,
                                          const uint8_t* codes, int32_t image, int32_t column,
                                          int32_t)
      : b(bands), divisors(bands.v), dy(gradients), selected(codes), first(column / kStep) {
    offset = image * b.v.h.out * b.v.w.out + first;
    vectors = b.vector_rows && first + kMiddle <= b.v.w.out;
  }
  __device__ __forceinline__ Raw load(int32_t p) const {
    const bool inside = static_cast<uint32_t>(p) < static_cast<uint32_t>(b.v.h.out);
    const int32_t row = offset + p * b.v.w.out;
    const auto one = [&](int32_t j, T& value, uint8_t& code) {
      value = from_wide<T>(0.0f);
      code = kNoOffset<uint8_t>;
      if (inside && static_cast<uint32_t>(first + j) < static_cast<uint32_t>(b.v.w.out)) {
        value = dy[row + j];
        if constexpr (kSelects) code = selected[row + j];
      }
    };
    Raw raw;
#pragma unroll
    for (int j = 0; j < kBefore; j++) one(j - kBefore, raw.before[j], raw.before_codes[j]);
#pragma unroll
    for (int j = 0; j < kAfter; j++) one(kMiddle + j, raw.after[j], raw.after_codes[j]);
    if (inside && vectors) {
      raw.middle = *reinterpret_cast<const Vector<T, kMiddle>*>(dy + row);
      if constexpr (kSelects)
        raw.middle_codes = *reinterpret_cast<const Vector<uint8_t, kMiddle>*>(selected + row);
    } else {
#pragma unroll
      for (int j = 0; j < kMiddle; j++) one(j, raw.middle.element[j], raw.middle_codes.element[j]);
    }
    return raw;
  }
  __device__ __forceinline__ void add(const Raw& raw, int32_t row_factor,
                                      float (&sum)[R][n]) const {
#pragma unroll
    for (int j = -kBefore; j < kMiddle + kAfter; j++) {
      float v = to_wide(j < 0         ? raw.before[j + kBefore]
                        : j < kMiddle ? raw.middle.element[j]
                                      : raw.after[j - kMiddle]);
      int32_t code = 0;
      if constexpr (kSelects) {
        code = j < 0         ? raw.before_codes[j + kBefore]
               : j < kMiddle ? raw.middle_codes.element[j]
                             : raw.after_codes[j - kMiddle];
      } else {
        const int32_t left = (first + j) * kStep - kPad;
        v = divisors.of(row_factor, left)(v);
      }
#pragma unroll
      for (int s = 0; s < S; s++) {
        const int i = j * kStep - kPad + s;
        if (i < 0 || i >= n) continue;
#pragma unroll
        for (int r = 0; r < R; r++)
          if (!kSelects || code == r * S + s) sum[r][i] += v;
      }
    }
  }
};

template <typename T, bool kSelects, int R, int S, int kStep, bool kPlanes>
__global__ void __launch_bounds__(kPoolThreads)
    pool_backward_bands(BackwardBands b, const T* __restrict__ dy,
                        const uint8_t* __restrict__ selected, T* __restrict__ dx) {
  using Sources = std::conditional_t<kPlanes, PlaneSources<T, kSelects, R, S, kStep>,
                                     ChannelSources<T, kSelects, R, S, kStep>>;
  constexpr int n = kLanes<T>;
  constexpr int kEarlier = (R - 1) / kStep;  // output rows that reach what a later one stores
  int32_t rest = pool_thread<int32_t>();
  if (rest >= b.threads) return;
  const int32_t group = b.by_groups.split(rest);
  const int32_t column = kPlanes ? group * n : b.by_columns.split(rest);
  const int32_t c = kPlanes ? 0 : group * n;
  const int32_t begin_p = b.first_p + b.by_bands.split(rest) * b.rows, image = rest;
  const int32_t end_p = begin_p + b.rows < b.end_p ? begin_p + b.rows : b.end_p;
  const Sources sources(b, dy, selected, image, column, c);

  float sum[R][n] = {};
  for (int32_t p = begin_p - kEarlier; p < end_p; p++) {
    const int32_t top = p * kStep - b.v.h.pad;
    auto raw = sources.load(p);
    sources.add(raw, kSelects ? 1 : sources.divisors.row_factor(top), sum);
#pragma unroll
    for (int r = 0; r < kStep; r++) {
      const int32_t h = top + r;
      if (p < begin_p || static_cast<uint32_t>(h) >= static_cast<uint32_t>(b.v.h.size)) continue;
      const int32_t position = ((image * b.v.h.size + h) * b.v.w.size + column) * b.v.channels + c;
      if (!kPlanes || b.vector_inputs) {
        store_all<T, n>(dx + position, [&](int i) { return from_wide<T>(sum[r][i]); });
      } else {
#pragma unroll
        for (int i = 0; i < n; i++)
          if (column + i < b.v.w.size) dx[position + i] = from_wide<T>(sum[r][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
      for (int i = 0; i < n; i++)
        sum[r][i] = r + kStep < R ? sum[r + kStep < R ? r + kStep : 0][i] : 0;
    }
  }
}

template <typename T, bool kSelects, int R, int S, int kStep, bool kPlanes>
void launch_backward_bands(const PoolShape& s, int64_t images, const T* dy, const uint8_t* selected,
                           T* dx, const Queue& queue) {
  constexpr int n = kLanes<T>, kMiddle = n / kStep;
  const int64_t groups = kPlanes ? ceil_div(s.w.size, n) : s.channels / n;
  const int64_t columns = kPlanes ? 1 : s.w.size;
  // The output row, which need not exist, after which row h is stored begins there or just above.
  const int64_t first_p = s.h.pad / kStep, end_p = (s.h.size - 1 + s.h.pad) / kStep + 1;
  const int64_t rows = band_rows(groups * columns * images, end_p - first_p, queue);
  const int64_t bands = ceil_div(end_p - first_p, rows);
  const BackwardBands b{PoolView<int32_t>(s, images, n, false),
                        static_cast<int32_t>(groups * columns * bands * images),
                        static_cast<int32_t>(rows),
                        static_cast<int32_t>(first_p),
                        static_cast<int32_t>(end_p),
                        s.w.out % kMiddle == 0 && aligned<T>(dy, kMiddle) &&
                            reinterpret_cast<uintptr_t>(selected) % kMiddle == 0,
                        s.w.size % n == 0 && aligned<T>(dx, n),
                        Quotient<int32_t>(groups),
                        Quotient<int32_t>(columns),
                        Quotient<int32_t>(bands)};
  launch(pool_backward_bands<T, kSelects, R, S, kStep, kPlanes>, pool_grid(b.threads),
         dim3(kPoolThreads), 0, queue, b, dy, selected, dx);
}

template <typename T, bool kSelects, int R, int S, int kStep>
void run_backward_bands(const PoolShape& s, int64_t images, const T* dy, const uint8_t* selected,
                        T* dx, const Queue& queue) {
  if (s.channels == 1)
    launch_backward_bands<T, kSelects, R, S, kStep, true>(s, images, dy, selected, dx, queue);
  else
    launch_backward_bands<T, kSelects, R, S, kStep, false>(s, images, dy, selected, dx, queue);
}

}  // namespace torchconv::cuda
