// Max and min pooling's backward, each output adding its gradient to the element that it selected,
// so an output costs the same for every window and stride.
//
// The work is shared out by image: a plane (NCHW), or a plane of a block of channels (NHWC), so no
// two threads add to one element. An image is summed where it is written if its type can hold the
// sums, in scratch memory for bfloat16 and float16. Selections are not trusted: one that names no
// element of the image adds nothing.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/buffer.h"
#include "cpu/pool_window.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// The distance in a plane from a window's first element to the element that a code names; kNowhere,
// far enough below 0 that no window's start brings it back, where no image has such an element.
inline constexpr int64_t kNowhere = INT64_MIN / 2;
int64_t scatter_distance(const PoolProblem& p, int64_t code);
// Of the codes [0, codes).
std::vector<int64_t> scatter_distances(const PoolProblem& p, int64_t codes);

// Offsets of two or four bytes, rare enough for one kernel.
struct WideOffsets {
  const void* data;
  bool two_bytes;
  int64_t operator[](int64_t i) const {
    return two_bytes ? static_cast<const uint16_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Codes is how selections are given: const uint8_t*, WideOffsets, or const int64_t* for indices.
template <typename T, typename Codes>
class ScatterImages {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  static constexpr bool kInPlace = std::is_same_v<T, Lane>;
  static constexpr bool kByte = std::is_same_v<Codes, const uint8_t*>;
  static constexpr bool kIndex = std::is_same_v<Codes, const int64_t*>;
  static constexpr int64_t kBlock = 1024 / sizeof(T);  // channels
  static constexpr int64_t kTable = 2048;              // codes, of two bytes and more

 public:
  ScatterImages(const PoolProblem& p, const T* dy, Codes selected, T* dx)
      : p_(p),
        dy_(dy),
        selected_(selected),
        dx_(dx),
        pixels_(p.H * p.W),
        channels_(runs_channels_last(p) ? p.C : 1),
        blocks_(ceil_div(channels_, kBlock)) {
    // A code's distance from the window's first element: of every byte, of wider codes those of a
    // window that is small enough.
    if (kIndex || (!kByte && p.R * p.S > kTable)) return;
    distances_ = scatter_distances(p, kByte ? 256 : p.R * p.S);
  }

  static int64_t images(const PoolProblem& p) {
    return runs_channels_last(p) ? p.N * ceil_div(p.C, kBlock) : p.N * p.C;
  }

  void run(const Parallel& pool) const {
    const int64_t most = std::min(channels_, kBlock);
    const int64_t image_bytes =
        most * (pixels_ * static_cast<int64_t>(sizeof(Lane)) + p_.P * p_.Q * 10);
    parallel_for_with_scratch(pool, 0, images(p_), pool_grain(image_bytes),
                              [&](int64_t begin, int64_t end) {
                                const Buffer<Lane> scratch(kInPlace ? 0 : pixels_ * most);
                                for (int64_t i = begin; i < end; i++) {
                                  const int64_t plane = i / blocks_, c = i % blocks_ * kBlock;
                                  const int64_t n = std::min(channels_ - c, kBlock);
                                  T* dx = dx_ + plane * pixels_ * channels_ + c;
                                  if constexpr (kInPlace) {
                                    image(plane, c, n, dx, channels_);
                                  } else {
                                    image(plane, c, n, scratch.get(), n);
                                    narrow(scratch.get(), n, dx);
                                  }
                                }
                              });
  }

 private:
  // Channels [c, c + n) of one plane, summed in dx with `step` elements from pixel to pixel.
  void image(int64_t plane, int64_t c, int64_t n, Lane* dx, int64_t step) const {
    if (n == step) {
      std::fill_n(dx, pixels_ * n, Lane{0});
    } else {
      for (int64_t i = 0; i < pixels_; i++) std::fill_n(dx + i * step, n, Lane{0});
    }
    int64_t out = plane * p_.P * p_.Q * channels_ + c;
    for (int64_t out_p = 0; out_p < p_.P; out_p++) {
      int64_t start = (out_p * p_.stride_h - p_.pad_h) * p_.W - p_.pad_w;
      if (channels_ == 1) {
        for (int64_t q = 0; q < p_.Q; q++, out++, start += p_.stride_w) add(out, start, 1, dx);
      } else {
        for (int64_t q = 0; q < p_.Q; q++, out += channels_, start += p_.stride_w) {
          for (int64_t i = 0; i < n; i++) add(out + i, start, step, dx + i);
        }
      }
    }
  }

  // Adds output `out` of a window whose first element is pixel `start`.
  TORCHCONV_INLINE void add(int64_t out, int64_t start, int64_t step, Lane* dx) const {
    int64_t at;
    if constexpr (kIndex) {
      at = selected_[out];
    } else if constexpr (kByte) {
      at = start + distances_[selected_[out]];
    } else {
      const int64_t code = selected_[out];
      if (static_cast<uint64_t>(code) < distances_.size()) {
        at = start + distances_[static_cast<size_t>(code)];
      } else {
        at = code >= 0 && code < p_.R * p_.S ? start + scatter_distance(p_, code) : -1;
      }
    }
    if (static_cast<uint64_t>(at) < static_cast<uint64_t>(pixels_))
      dx[at * step] += to_wide<T>(dy_[out]);
  }

  void narrow(const Lane* from, int64_t n, T* to) const {
    if (n == channels_) return narrow_run(from, pixels_ * n, to);
    for (int64_t i = 0; i < pixels_; i++) narrow_run(from + i * n, n, to + i * channels_);
  }

  static void narrow_run(const Lane* from, int64_t n, T* to) {
    constexpr int kLanes = W::kLanes;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) W::store(to + i, W::Registers::load(from + i));
    if (i < n) W::store_partial(to + i, W::Registers::load_partial(from + i, n - i), n - i);
  }

  const PoolProblem& p_;
  const T* dy_;
  Codes selected_;
  T* dx_;
  int64_t pixels_, channels_;  // of a plane; one channel in NCHW
  int64_t blocks_;             // of channels
  std::vector<int64_t> distances_;
};

}  // namespace torchconv::cpu
