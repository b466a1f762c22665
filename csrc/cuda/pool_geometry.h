// Where pooling's windows lie, for every kernel of both directions, ordinary and adaptive pooling.
//
// Both layouts are images of H x W pixels of C channels: in NCHW N * C of them with one channel.
// A kernel counts in I: int32_t with divisions by multiplication, or int64_t where one image is
// too large for that. An array that is too large, of images that are not, goes to several launches
// (each_part), which changes no result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/adaptive_problem.h"
#include "core/pool_problem.h"
#include "core/range.h"
#include "cuda/divmod.h"

namespace torchconv::cuda {

struct PoolAxis {
  int64_t size, out, taps, stride, pad, dilation;  // as in PoolProblem
};

struct PoolShape {
  int64_t images, channels;
  PoolAxis h, w;
  bool adaptive;     // windows are AdaptiveProblem's; taps and the rest are not used
  bool include_pad;  // both as in PoolProblem
  int64_t divisor;

  bool empty() const { return images == 0 || channels == 0; }
};

inline PoolShape pool_shape(const PoolProblem& p) {
  const bool planes = p.layout == Layout::kNCHW;
  return {planes ? p.N * p.C : p.N,
          planes ? 1 : p.C,
          {p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h},
          {p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w},
          false,
          p.count_include_pad,
          p.divisor};
}

// Of windows that divide evenly: those of ordinary pooling. In the others a code counts whole rows
// of the image, r * W + s.
inline PoolShape pool_shape(const AdaptiveProblem& p) {
  const bool planes = p.layout == Layout::kNCHW;
  const auto axis = [](int64_t size, int64_t out) -> PoolAxis {
    return {size, out, size / std::max<int64_t>(out, 1), size / std::max<int64_t>(out, 1), 0, 1};
  };
  PoolShape shape{planes ? p.N * p.C : p.N,
                  planes ? 1 : p.C,
                  axis(p.H, p.P),
                  axis(p.W, p.Q),
                  !divides_evenly(p),
                  true,
                  0};
  if (shape.adaptive) shape.h.taps = p.H, shape.w.taps = p.W, shape.h.stride = shape.w.stride = 1;
  return shape;
}

// Division by a number that all threads share, by multiplication: of an int64_t as Divisor does it
// with 32 bits less. Dividends are not negative.
template <typename I>
class Quotient {
  static constexpr bool kShort = sizeof(I) == 4;

 public:
  Quotient() = default;
  explicit Quotient(int64_t divisor) : divisor_(std::max<int64_t>(divisor, 1)) {
    if constexpr (kShort) {
      short_ = Divisor(divisor_);
    } else {
      while ((uint64_t{1} << shift_) < static_cast<uint64_t>(divisor_)) ++shift_;
      const auto rest = (uint64_t{1} << shift_) - static_cast<uint64_t>(divisor_);
      multiplier_ =
          static_cast<uint64_t>((Wide128{rest} << 64) / static_cast<uint64_t>(divisor_)) + 1;
    }
  }
  __host__ __device__ __forceinline__ I of(I n) const {
    if constexpr (kShort) {
      return static_cast<I>(short_.quotient(static_cast<uint32_t>(n)));
    } else {
#ifdef __CUDA_ARCH__
      const uint64_t high = __umul64hi(static_cast<uint64_t>(n), multiplier_);
#else
      const auto high =
          static_cast<uint64_t>((Wide128{multiplier_} * static_cast<uint64_t>(n)) >> 64);
#endif
      return static_cast<I>((high + static_cast<uint64_t>(n)) >> shift_);
    }
  }
  // n becomes the quotient; the remainder is returned.
  __host__ __device__ __forceinline__ I split(I& n) const {
    const I whole = n;
    n = of(n);
    return whole - n * static_cast<I>(divisor_);
  }

 private:
  using Wide128 = unsigned __int128;
  struct Unused {};
  I divisor_ = 1;
  std::conditional_t<kShort, Divisor, Unused> short_;
  uint64_t multiplier_ = 1;
  int shift_ = 0;
};

// The valid taps of one window: number `tap`, which reads element `element`, and those that follow.
template <typename I>
struct WindowTaps {
  I element, tap, count;
};

template <typename I>
struct Axis {
  I size, out, taps, stride, pad, dilation;
  bool adaptive;
  Quotient<I> by_size, by_out, by_stride, by_dilation;

  Axis() = default;
  Axis(const PoolAxis& a, bool is_adaptive)
      : size(static_cast<I>(a.size)),
        out(static_cast<I>(a.out)),
        taps(static_cast<I>(a.taps)),
        stride(static_cast<I>(a.stride)),
        pad(static_cast<I>(a.pad)),
        dilation(static_cast<I>(a.dilation)),
        adaptive(is_adaptive),
        by_size(a.size),
        by_out(a.out),
        by_stride(a.stride),
        by_dilation(a.dilation) {}

  __host__ __device__ __forceinline__ WindowTaps<I> window(I o) const {
    if (adaptive) {
      const I begin = by_out.of(o * size);
      return {begin, 0, by_out.of((o + 1) * size + out - 1) - begin};
    }
    const I start = o * stride - pad;
    if (start >= size) return {0, 0, 0};
    I tap = 0, end = size - start;
    if (dilation == 1) {
      if (start < 0) tap = -start;
    } else {
      if (start < 0) tap = by_dilation.of(dilation - 1 - start);
      end = by_dilation.of(size - 1 - start) + 1;
    }
    if (end > taps) end = taps;
    if (tap >= end) return {0, 0, 0};
    return {start + tap * dilation, tap, end - tap};
  }

  // The windows that hold element h are those that visit(h, i) finds for `count` numbers from
  // `begin` on, in ascending order. With a dilation these count the taps, backwards: of the windows
  // between the first and the last one only few may have the element.
  struct Visits {
    I begin, count;
  };
  __host__ __device__ __forceinline__ Visits visits(I h) const {
    if (adaptive) {
      const I begin = by_size.of(h * out);
      return {begin, by_size.of((h + 1) * out + size - 1) - begin};
    }
    const I reach = h + pad;
    if (dilation == 1) {
      const I begin = reach < taps ? 0 : by_stride.of(reach - taps) + 1;
      const I last = by_stride.of(reach);
      return {begin, (last < out ? last + 1 : out) - begin};
    }
    const I beyond = reach - (out - 1) * stride;
    const I lowest = beyond > 0 ? by_dilation.of(beyond + dilation - 1) : 0;
    const I most = by_dilation.of(reach);
    const I highest = most < taps ? most : taps - 1;
    return {-highest, highest - lowest + 1};
  }
  __host__ __device__ __forceinline__ bool visit(I h, I i, I* output, I* tap) const {
    if (dilation == 1) {
      *output = i;
      *tap = h + pad - i * stride;
      return true;
    }
    *tap = -i;
    const I start = h + pad + i * dilation;
    *output = by_stride.of(start);
    return *output * stride == start;
  }

  // The factor of window o in an average's divisor: csrc/cpu/avg_pool2d.h. Dilation is 1.
  __host__ __device__ __forceinline__ I factor(I o, bool include_pad) const {
    const I valid = window(o).count;
    if (valid == 0) return 1;
    if (adaptive || !include_pad) return valid;
    const I rest = size + 2 * pad - o * stride;
    return rest < taps ? rest : taps;
  }
};

// A kernel's view of the images, and of an array of them with one thread for `width` channels of a
// pixel.
template <typename I>
struct PoolView {
  Axis<I> h, w;
  I channels, threads;
  int32_t row_codes;  // from a tap to the one below it, modulo 2^32
  bool adaptive, include_pad;
  int64_t divisor;
  Quotient<I> by_vectors, by_columns, by_rows;

  // One thread for each vector of an output's (or else an input's) pixel.
  PoolView(const PoolShape& s, int64_t images, int width, bool output)
      : h(s.h, s.adaptive),
        w(s.w, s.adaptive),
        channels(static_cast<I>(s.channels)),
        threads(static_cast<I>(images * ceil_div(s.channels, width) *
                               (output ? s.h.out * s.w.out : s.h.size * s.w.size))),
        row_codes(static_cast<int32_t>(s.w.taps)),
        adaptive(s.adaptive),
        include_pad(s.include_pad),
        divisor(s.divisor),
        by_vectors(ceil_div(s.channels, width)),
        by_columns(output ? s.w.out : s.w.size),
        by_rows(output ? s.h.out : s.h.size) {}

  template <typename A>
  __host__ __device__ __forceinline__ A divisor_of(I p, I q) const {
    if (divisor != 0)
      return h.window(p).count > 0 && w.window(q).count > 0 ? static_cast<A>(divisor) : A{1};
    return static_cast<A>(h.factor(p, include_pad)) * static_cast<A>(w.factor(q, include_pad));
  }

  // h * W + w of what `code` names in window (p, q), where the one below a tap has its code +
  // width.
  __device__ __forceinline__ int64_t index_of(uint32_t code, uint32_t width, I p, I q) const {
    if (code == ~uint32_t{0}) return -1;
    if (adaptive)
      return static_cast<int64_t>(h.window(p).element) * w.size + w.window(q).element + code;
    const uint32_t r = code / width, s = code - r * width;
    return static_cast<int64_t>(p * h.stride - h.pad + static_cast<I>(r) * h.dilation) * w.size +
           (q * w.stride - w.pad + static_cast<I>(s) * w.dilation);
  }
};

// Where a thread of a PoolView works: channels from c on of pixel (row, column).
template <typename I>
struct PoolPlace {
  I image, row, column, c;

  __device__ __forceinline__ PoolPlace(const PoolView<I>& view, I thread, int width) {
    c = view.by_vectors.split(thread) * width;
    column = view.by_columns.split(thread);
    row = view.by_rows.split(thread);
    image = thread;
  }
};

inline constexpr int kPoolThreads = 256;

template <typename I>
__device__ __forceinline__ I pool_thread() {
  return static_cast<I>(blockIdx.x) * kPoolThreads + static_cast<I>(threadIdx.x);
}
template <typename I>
dim3 pool_grid(I threads) {
  return dim3(static_cast<unsigned>(ceil_div(static_cast<int64_t>(threads), kPoolThreads)));
}

// f(I{}, first image, images) for parts of the images that a kernel can count in I.
template <typename F>
void each_part(const PoolShape& s, F&& f) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto fits = [&](const PoolAxis& a) {
    const int64_t reach = a.size + 2 * a.pad + a.stride;  // and no output begins further on
    return reach < kMost && a.taps < kMost && a.dilation < kMost &&
           (!s.adaptive || (a.size + 1) < kMost / (a.out + 1));
  };
  const int64_t pixels = std::max(s.h.size * s.w.size, s.h.out * s.w.out);
  const int64_t largest = std::max<int64_t>(pixels * s.channels, 1);
  if (largest > kMost || !fits(s.h) || !fits(s.w)) return f(int64_t{}, int64_t{0}, s.images);
  const int64_t part = kMost / largest;
  for (int64_t first = 0; first < s.images; first += part)
    f(int32_t{}, first, std::min(part, s.images - first));
}

}  // namespace torchconv::cuda
