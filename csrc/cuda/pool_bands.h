// Pooling's forward for the windows of networks, R x S taps at stride kStep known at compile time:
// maximum and average, without dilation.
//
// A thread goes down a band of output rows, for 16 bytes of the channels of one column (NHWC) or
// for as many neighbouring columns of a plane (NCHW). It folds each input row across its S taps
// once, keeps the rows that the next window needs again, and folds R of them into an output: R + S
// steps instead of R * S, and each element is read once from L1 per column that needs it. Bound:
// bytes moved; in 16-bit types, where an element has least time, the steps come close.
#pragma once

#include "cuda/pool_geometry.h"
#include "cuda/pool_rules.h"

namespace torchconv::cuda {

struct PoolBands {
  PoolView<int32_t> v;
  int32_t threads, rows;  // output rows of a band
  // NCHW: whether rows of x, and of y and codes, are aligned to vectors, or to halves of them.
  bool vector_rows, vector_outputs, half_rows, half_outputs;
  Quotient<int32_t> by_groups, by_columns, by_bands;
};

// Rows of x as a thread reads them: S vectors of channels.
template <typename Rule, int S, int kStep>
struct ChannelRows {
  using T = typename Rule::Element;
  static constexpr int n = kLanes<T>;
  struct Raw {
    Pack<T> tap[S];
  };
  const T* x;
  int32_t offset, row_step, channels, height;  // of row 0, tap 0
  bool valid[S];

  __device__ __forceinline__ ChannelRows(const PoolBands& b, const T* images, int32_t image,
                                         int32_t column, int32_t c)
      : x(images), row_step(b.v.w.size * b.v.channels), channels(b.v.channels), height(b.v.h.size) {
    const int32_t left = column * kStep - b.v.w.pad;
    offset = (image * height * b.v.w.size + left) * channels + c;
#pragma unroll
    for (int s = 0; s < S; s++)
      valid[s] = static_cast<uint32_t>(left + s) < static_cast<uint32_t>(b.v.w.size);
  }
  __device__ __forceinline__ Raw load(int32_t h) const {
    const bool inside = static_cast<uint32_t>(h) < static_cast<uint32_t>(height);
    Raw raw;
#pragma unroll
    for (int s = 0; s < S; s++) {
      raw.tap[s] = Pack<T>::filled(from_wide<T>(Rule::none()));
      if (inside && valid[s]) raw.tap[s] = Pack<T>::load(x + offset + h * row_step + s * channels);
    }
    return raw;
  }
  static __device__ __forceinline__ typename Rule::Value value(const Raw& raw, int i, int s) {
    return raw.tap[s].at(i);
  }
};

// The elements of n neighbouring windows, of which those between the padding before the first and
// the last window's end are whole vectors.
template <typename Rule, int S, int kStep>
struct PlaneRows {
  using T = typename Rule::Element;
  static constexpr int n = kLanes<T>;
  static constexpr int kPad = (S - 1) / 2, kMiddle = n * kStep;
  static constexpr int kSpan = (n - 1) * kStep + S, kAfter = kSpan - kPad - kMiddle;
  static_assert(kAfter >= 0);
  struct Raw {
    Pack<T> middle[kStep];
    T before[kPad + 1], after[kAfter + 1];
  };
  const T* x;
  int32_t offset, width, height, first;  // `first` column of the middle, which `offset` is of row 0
  bool vectors, halves;

  __device__ __forceinline__ PlaneRows(const PoolBands& b, const T* images, int32_t image,
                                       int32_t column, int32_t)
      : x(images), width(b.v.w.size), height(b.v.h.size), first(column * kStep) {
    offset = image * height * width + first;
    vectors = b.vector_rows && first + kMiddle <= width;
    halves = b.half_rows;
  }
  __device__ __forceinline__ Raw load(int32_t h) const {
    const bool inside = static_cast<uint32_t>(h) < static_cast<uint32_t>(height);
    const T none = from_wide<T>(Rule::none());
    const int32_t row = offset + h * width;
    const auto one = [&](int32_t i) {
      return inside && static_cast<uint32_t>(first + i) < static_cast<uint32_t>(width) ? x[row + i]
                                                                                       : none;
    };
    Raw raw;
#pragma unroll
    for (int i = 0; i < kPad; i++) raw.before[i] = one(i - kPad);
#pragma unroll
    for (int i = 0; i < kAfter; i++) raw.after[i] = one(kMiddle + i);
#pragma unroll
    for (int i = 0; i < kStep; i++) raw.middle[i] = Pack<T>::filled(none);
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kStep; i++)
        if (inside) raw.middle[i] = Pack<T>::load(x + row + i * n);
    } else if (halves) {
#pragma unroll
      for (int i = 0; i < 2 * kStep; i++)
        if (inside && first + i * (n / 2) < width)
          raw.middle[i / 2].set_half(i % 2, x + row + i * (n / 2));
    } else {
#pragma unroll
      for (int i = 0; i < kMiddle; i++) raw.middle[i / n].set(i % n, one(i));
    }
    return raw;
  }
  static __device__ __forceinline__ typename Rule::Value value(const Raw& raw, int i, int s) {
    const int at = i * kStep + s - kPad;
    if (at >= 0 && at < kMiddle) return raw.middle[at / n].at(at % n);
    return to_wide(at < 0 ? raw.before[at + kPad] : raw.after[at - kMiddle]);
  }
};

// The factor of the window from element `start` on in an average's divisor; 1 for one that there is
// not.
template <int kTaps>
__device__ __forceinline__ int32_t band_factor(const Axis<int32_t>& axis,
                                               const PoolView<int32_t>& v, int32_t start) {
  const int32_t rest = axis.size - start + (v.include_pad ? axis.pad : 0);
  const int32_t factor = (rest < kTaps ? rest : kTaps) + (start < 0 && !v.include_pad ? start : 0);
  return factor > 1 ? factor : 1;
}

// The divisors of averages over R x S taps, of which nearly all are the same.
template <int R, int S>
struct BandDivision {
  const PoolView<int32_t>& v;
  Division<float> common;

  explicit __device__ __forceinline__ BandDivision(const PoolView<int32_t>& view)
      : v(view), common(view.divisor != 0 ? static_cast<float>(view.divisor) : R * S) {}
  // Of a row of windows, and then of the one whose columns begin at `left`.
  __device__ __forceinline__ int32_t row_factor(int32_t top) const {
    return band_factor<R>(v.h, v, top);
  }
  __device__ __forceinline__ Division<float> of(int32_t row, int32_t left) const {
    const int32_t factor = row * band_factor<S>(v.w, v, left);
    return v.divisor != 0 || factor == R * S ? common : Division<float>(static_cast<float>(factor));
  }
};

// Stores n outputs of row p, and their codes, from `column` or its channels on; S: taps of a row.
template <bool kPlanes, bool kCodes, int S, typename T, typename Output, typename Code>
__device__ __forceinline__ void store_band(const PoolBands& b, T* y, const SelectedOutput& selected,
                                           int32_t position, int32_t p, int32_t column,
                                           Output&& output, Code&& code) {
  constexpr int n = kLanes<T>;
  const auto index = [&](int i) {
    return b.v.index_of(code(i), S, p, kPlanes ? column + i : column);
  };
  // A window this small has byte offsets.
  auto* const offsets = static_cast<uint8_t*>(selected.data) + position;
  auto* const indices = static_cast<int64_t*>(selected.data) + position;
  const bool bytes = selected.kind == Selected::kOffset8;
  if (!kPlanes || b.vector_outputs) {
    store_all<T, n>(y + position, output);
    if (kCodes && bytes)
      store_all<uint8_t, n>(offsets, [&](int i) { return static_cast<uint8_t>(code(i)); });
    else if (kCodes)
      store_all<int64_t, n>(indices, index);
  } else if (b.half_outputs) {
    constexpr int m = n / 2;
#pragma unroll
    for (int from = 0; from < n; from += m) {
      if (column + from >= b.v.w.out) continue;
      store_all<T, m>(y + position + from, [&](int i) { return output(from + i); });
      if (kCodes && bytes)
        store_all<uint8_t, m>(offsets + from,
                              [&](int i) { return static_cast<uint8_t>(code(from + i)); });
      else if (kCodes)
        store_all<int64_t, m>(indices + from, [&](int i) { return index(from + i); });
    }
  } else {
    const int count = b.v.w.out - column;
#pragma unroll
    for (int i = 0; i < n; i++) {
      if (i < count) {
        y[position + i] = output(i);
        if (kCodes && bytes) offsets[i] = static_cast<uint8_t>(code(i));
        if (kCodes && !bytes) indices[i] = index(i);
      }
    }
  }
}

template <typename Rule, int R, int S, int kStep, bool kPlanes, bool kCodes>
__global__ void __launch_bounds__(kPoolThreads,
                                  kPlanes && sizeof(typename Rule::Element) == 2 ? 3 : 1)
    pool_bands(PoolBands b, const typename Rule::Element* __restrict__ x,
               typename Rule::Element* __restrict__ y, SelectedOutput selected) {
  using T = typename Rule::Element;
  using State = typename Rule::State;
  using Rows = std::conditional_t<kPlanes, PlaneRows<Rule, S, kStep>, ChannelRows<Rule, S, kStep>>;
  constexpr int n = kLanes<T>;
  constexpr int kKept = R - kStep;
  // Where an iteration reads little, its rows are under way while the one before is folded.
  constexpr bool kAhead = kPlanes && kStep == 1;
  int32_t rest = pool_thread<int32_t>();
  if (rest >= b.threads) return;
  const int32_t group = b.by_groups.split(rest);
  const int32_t column = kPlanes ? group * n : b.by_columns.split(rest);
  const int32_t c = kPlanes ? 0 : group * n;
  const int32_t first_p = b.by_bands.split(rest) * b.rows, image = rest;
  const int32_t end_p = first_p + b.rows < b.v.h.out ? first_p + b.rows : b.v.h.out;
  const Rows rows(b, x, image, column, c);
  const BandDivision<R, S> divisors(b.v);

  State kept[R][n];
  const auto fold_row = [&](const typename Rows::Raw& raw, State(&row)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) {
      row[i] = Rule::first(Rows::value(raw, i, 0));
#pragma unroll
      for (int s = 1; s < S; s++) Rule::fold(row[i], Rows::value(raw, i, s), s);
    }
  };
  int32_t top = first_p * kStep - b.v.h.pad;
#pragma unroll
  for (int r = 0; r < kKept; r++) fold_row(rows.load(top + r), kept[r]);
  typename Rows::Raw ahead[kStep];
  if constexpr (kAhead) {
#pragma unroll
    for (int r = 0; r < kStep; r++) ahead[r] = rows.load(top + kKept + r);
  }
  for (int32_t p = first_p; p < end_p; p++, top += kStep) {
    typename Rows::Raw raw[kStep];
#pragma unroll
    for (int r = 0; r < kStep; r++) {
      if constexpr (kAhead) {
        raw[r] = ahead[r];
        if (p + 1 < end_p) ahead[r] = rows.load(top + kStep + kKept + r);
      } else {
        raw[r] = rows.load(top + kKept + r);
      }
    }
#pragma unroll
    for (int r = 0; r < kStep; r++) fold_row(raw[r], kept[kKept + r]);

    const int32_t position = ((image * b.v.h.out + p) * b.v.w.out + column) * b.v.channels + c;
    const auto q = [&](int i) { return kPlanes ? column + i : column; };
    const int32_t first_row = top < 0 ? -top * S : 0;
    const auto first_tap = [&](int i) {
      const int32_t left = q(i) * kStep - b.v.w.pad;
      return static_cast<uint32_t>(first_row + (left < 0 ? -left : 0));
    };
    State total[n];
#pragma unroll
    for (int i = 0; i < n; i++) {
      total[i] = kept[0][i];
#pragma unroll
      for (int r = 1; r < R; r++) Rule::join(total[i], kept[r][i], r * S);
      if constexpr (kCodes)  // nothing is greater than what padding counts as
        if (total[i].value == Rule::none()) total[i].code = first_tap(i);
    }
    const int32_t row_factor = Rule::kSelects ? 1 : divisors.row_factor(top);
    const auto output = [&](int i) {
      if constexpr (Rule::kSelects)
        return from_wide<T>(total[i].value);
      else
        return Rule::finish(total[i], divisors.of(row_factor, q(i) * kStep - b.v.w.pad));
    };
    const auto code = [&](int i) {
      if constexpr (Rule::kSelects)
        return total[i].code;
      else
        return uint32_t{0};
    };
    store_band<kPlanes, kCodes, S, T>(b, y, selected, position, p, column, output, code);
#pragma unroll
    for (int r = 0; r < kKept; r++) {
#pragma unroll
      for (int i = 0; i < n; i++) kept[r][i] = kept[r + kStep][i];
    }
  }
}

// Output rows of a band: several, as far as enough threads are left to fill the GPU.
inline int64_t band_rows(int64_t threads_per_row, int64_t rows, const Queue& queue) {
  const int64_t enough = int64_t{1024} * queue.multiprocessors;
  return std::clamp<int64_t>(threads_per_row * rows / std::max<int64_t>(enough, 1), 1,
                             std::min<int64_t>(rows, 16));
}

// Bands of `rows` rows of outputs.
template <typename T>
PoolBands pool_bands_of(const PoolShape& s, int64_t images, int64_t rows, const T* x, const T* y,
                        const SelectedOutput& selected) {
  constexpr int n = kLanes<T>, m = n / 2;
  const bool planes = s.channels == 1;
  const int64_t groups = planes ? ceil_div(s.w.out, n) : s.channels / n;
  const int64_t columns = planes ? 1 : s.w.out, bands = ceil_div(s.h.out, rows);
  return {PoolView<int32_t>(s, images, n, true),
          static_cast<int32_t>(groups * columns * bands * images),
          static_cast<int32_t>(rows),
          s.w.size % n == 0 && aligned<T>(x, n),
          s.w.out % n == 0 && aligned<T>(y, n) && aligned_codes(selected.kind, selected.data, n),
          s.w.size % m == 0 && aligned<T>(x, m),
          s.w.out % m == 0 && aligned<T>(y, m) && aligned_codes(selected.kind, selected.data, m),
          Quotient<int32_t>(groups),
          Quotient<int32_t>(columns),
          Quotient<int32_t>(bands)};
}

template <typename Rule, int R, int S, int kStep, bool kPlanes, bool kCodes>
void launch_pool_bands(const PoolShape& s, int64_t images, const typename Rule::Element* x,
                       typename Rule::Element* y, const SelectedOutput& selected,
                       const Queue& queue) {
  using T = typename Rule::Element;
  constexpr int n = kLanes<T>;
  const int64_t per_row = kPlanes ? ceil_div(s.w.out, n) : s.channels / n * s.w.out;
  const PoolBands b =
      pool_bands_of<T>(s, images, band_rows(per_row * images, s.h.out, queue), x, y, selected);
  launch(pool_bands<Rule, R, S, kStep, kPlanes, kCodes>, pool_grid(b.threads), dim3(kPoolThreads),
         0, queue, b, x, y, selected);
}

// The windows that there are instances for.
enum class BandWindow : uint8_t { kNone, k2x2Stride2, k3x3Stride2, k3x3Stride1 };

// Where vectors of channels are aligned or, in NCHW, with the padding that vectors of columns
// expect.
template <typename T>
BandWindow band_window(const PoolShape& s, bool aligned_channels) {
  const auto is = [&](int64_t taps, int64_t step) {
    return s.h.taps == taps && s.w.taps == taps && s.h.stride == step && s.w.stride == step &&
           (s.channels > 1 || s.w.pad == (taps - 1) / 2);
  };
  const bool possible = sizeof(T) < 8 && !s.adaptive && s.h.dilation == 1 && s.w.dilation == 1 &&
                        (s.channels == 1 || (s.channels % kLanes<T> == 0 && aligned_channels));
  return !possible  ? BandWindow::kNone
         : is(2, 2) ? BandWindow::k2x2Stride2
         : is(3, 2) ? BandWindow::k3x3Stride2
         : is(3, 1) ? BandWindow::k3x3Stride1
                    : BandWindow::kNone;
}

}  // namespace torchconv::cuda
