// Max and min pooling's backward, each output adding its gradient to the element that it selected,
// so an output costs the same for every window and stride.
//
// The work is shared out by image: a plane (NCHW), or a plane of a block of channels (NHWC), so no
// two threads add to one element. Few or large images are cut into bands of rows, each of which
// takes from the outputs whose windows reach it. A band is summed where it is written if its type
// can hold the sums, in scratch memory for bfloat16 and float16. Selections are not trusted: one
// that names no element of the band adds nothing.
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

// Rows of an image that are summed together, and the output rows that may select one of them. Those
// up to `shared_before` and from `shared_from` on are also of other bands.
struct ScatterBand {
  Range rows, outputs;
  int64_t shared_before = 0, shared_from = 0;
};
// Of all images: so many rows that the bands are enough for the threads and fit the cache, but not
// so few that most outputs reach two of them.
std::vector<ScatterBand> scatter_bands(const Axis& vertical, int64_t images, int64_t row_bytes);
// The same for adaptive windows.
std::vector<ScatterBand> adaptive_scatter_bands(int64_t height, int64_t outputs, int64_t images,
                                                int64_t row_bytes);

// Offsets of two or four bytes, rare enough for one kernel.
struct WideOffsets {
  const char* data;
  bool two_bytes;
  WideOffsets operator+(int64_t i) const { return {data + i * (two_bytes ? 2 : 4), two_bytes}; }
  int64_t operator[](int64_t i) const {
    const void* const at = data;
    return two_bytes ? static_cast<const uint16_t*>(at)[i] : static_cast<const int32_t*>(at)[i];
  }
};

// Codes is how selections are given: const uint8_t*, WideOffsets, or const int64_t* for indices.
template <typename T, typename Codes>
class ScatterImages {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using Bits = std::conditional_t<sizeof(Lane) == 8, uint64_t, uint32_t>;
  static constexpr bool kInPlace = std::is_same_v<T, Lane>;
  static constexpr bool kByte = std::is_same_v<Codes, const uint8_t*>;
  static constexpr bool kIndex = std::is_same_v<Codes, const int64_t*>;
  static constexpr int64_t kBlock = 1024 / sizeof(T);  // channels
  static constexpr int64_t kTable = 2048;              // codes, of two bytes and more

 public:
  // Adaptive windows are told by their indices, whatever p has of them.
  ScatterImages(const PoolProblem& p, const T* dy, Codes selected, T* dx, bool adaptive)
      : p_(p),
        dy_(dy),
        selected_(selected),
        dx_(dx),
        channels_(runs_channels_last(p) ? p.C : 1),
        blocks_(ceil_div(channels_, kBlock)) {
    const int64_t row_bytes =
        p.W * std::min(channels_, kBlock) * static_cast<int64_t>(sizeof(Lane));
    bands_ = adaptive ? adaptive_scatter_bands(p.H, p.P, images(p), row_bytes)
                      : scatter_bands(vertical_axis(p), images(p), row_bytes);
    // A code's distance from the window's first element: of every byte, of wider codes those of a
    // window that is small enough.
    if (kIndex || (!kByte && p.R * p.S > kTable)) return;
    distances_ = scatter_distances(p, kByte ? 256 : p.R * p.S);
  }

  static int64_t images(const PoolProblem& p) {
    return runs_channels_last(p) ? p.N * ceil_div(p.C, kBlock) : p.N * p.C;
  }

  void run(const Parallel& pool) const {
    const int64_t most = std::min(channels_, kBlock), band_count = count(bands_);
    const int64_t rows = bands_.front().rows.size(), outputs = bands_.front().outputs.size();
    const int64_t band_bytes =
        most * (rows * p_.W * static_cast<int64_t>(sizeof(Lane)) + outputs * p_.Q * 10);
    parallel_for_with_scratch(
        pool, 0, images(p_) * band_count, pool_grain(band_bytes), [&](int64_t begin, int64_t end) {
          const Buffer<Lane> scratch(kInPlace ? 0 : rows * p_.W * most);
          for (int64_t i = begin; i < end; i++) {
            const int64_t image = i / band_count, plane = image / blocks_;
            const int64_t c = image % blocks_ * kBlock, n = std::min(channels_ - c, kBlock);
            const ScatterBand& band = bands_[static_cast<size_t>(i % band_count)];
            T* dx = dx_ + (plane * p_.H + band.rows.begin) * p_.W * channels_ + c;
            if constexpr (kInPlace) {
              sum(band, plane, c, n, dx, channels_);
            } else {
              sum(band, plane, c, n, scratch.get(), n);
              narrow(scratch.get(), band.rows.size() * p_.W, n, dx);
            }
          }
        });
  }

 private:
  static int64_t count(const std::vector<ScatterBand>& bands) {
    return static_cast<int64_t>(bands.size());
  }

  // A band of one plane, of channels [c, c + n), in dx with `step` elements from pixel to pixel.
  void sum(const ScatterBand& band, int64_t plane, int64_t c, int64_t n, Lane* dx,
           int64_t step) const {
    const int64_t pixels = band.rows.size() * p_.W, origin = band.rows.begin * p_.W;
    if (n == step) {
      std::fill_n(dx, pixels * n, Lane{0});
    } else {
      for (int64_t i = 0; i < pixels; i++) std::fill_n(dx + i * step, n, Lane{0});
    }
    const Range outputs = band.outputs;
    const int64_t unshared = std::clamp(band.shared_before, outputs.begin, outputs.end);
    const int64_t shared = std::clamp(band.shared_from, unshared, outputs.end);
    const Range parts[] = {{outputs.begin, unshared}, {unshared, shared}, {shared, outputs.end}};
    for (int part = 0; part < 3; part++) {
      const int64_t first = parts[part].begin, rows = parts[part].size();
      // The window's first element, counted from the band's.
      const int64_t from =
          kIndex ? -origin : (first * p_.stride_h - p_.pad_h) * p_.W - p_.pad_w - origin;
      Lines lines{(plane * p_.P + first) * p_.Q * channels_ + c,
                  rows,
                  p_.Q,
                  from,
                  kIndex ? 0 : p_.stride_w,
                  kIndex ? 0 : p_.stride_h * p_.W,
                  0};
      const auto add_lines = [&] {
        part == 1 ? add<false>(lines, pixels, dx, step) : add<true>(lines, pixels, dx, step);
      };
      if (channels_ == 1) {
        add_lines();
        continue;
      }
      // Lines of channels, whose outputs have the same window.
      const int64_t move = lines.move, next = lines.next;
      lines.lines = lines.lane = 1, lines.count = n, lines.move = 0;
      for (int64_t p = 0; p < rows; p++)
        for (int64_t q = 0; q < p_.Q; q++, lines.out += channels_) {
          lines.start = from + p * next + q * move;
          add_lines();
        }
    }
  }

  // Outputs from `out` on, `count` in each of some lines that follow each other. The selections of
  // a line count from pixel `start` of the band, then from `move` pixels further for each output,
  // and those of the next line from `next` pixels further. They go to dx, then to `lane` elements
  // further for each.
  struct Lines {
    int64_t out, lines, count, start, move, next, lane;
  };

  // kShared: many are not here. Apart from the loops around it, as GCC runs out of registers in all
  // of them together.
  template <bool kShared>
  __attribute__((noinline)) void add(const Lines& l, int64_t pixels, Lane* first,
                                     int64_t step) const {
    const T* dy = dy_ + l.out;
    Codes selected = selected_ + l.out;
    const int64_t* const distances = distances_.data();
    const auto known = static_cast<int64_t>(distances_.size());
    const int64_t count = l.count, move = l.move, lane = l.lane;
    for (int64_t line = 0; line < l.lines; line++, dy += count, selected = selected + count) {
      int64_t start = l.start + line * l.next;
      Lane* dx = first;
      for (int64_t i = 0; i < count; i++, start += move, dx += lane) {
        int64_t at = start;
        if constexpr (kIndex) {  // any number
          at = static_cast<int64_t>(static_cast<uint64_t>(start) +
                                    static_cast<uint64_t>(selected[i]));
        } else if constexpr (kByte) {
          at += distances[selected[i]];
        } else {
          const int64_t code = selected[i];
          at += code >= 0 && code < known ? distances[code] : scatter_distance(p_, code);
        }
        const bool here = static_cast<uint64_t>(at) < static_cast<uint64_t>(pixels);
        if constexpr (kShared) {
          // Without a branch, which is taken at random: what is not here adds 0 to the first pixel,
          // whose sum is no -0.
          const Bits bits = bit_cast<Bits>(to_wide<T>(dy[i])) & (Bits{0} - Bits{here});
          dx[(at & -int64_t{here}) * step] += bit_cast<Lane>(bits);
        } else if (here) {
          dx[at * step] += to_wide<T>(dy[i]);
        }
      }
    }
  }

  void narrow(const Lane* from, int64_t pixels, int64_t n, T* to) const {
    if (n == channels_) return narrow_run(from, pixels * n, to);
    for (int64_t i = 0; i < pixels; i++) narrow_run(from + i * n, n, to + i * channels_);
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
  int64_t channels_;  // of a plane: one in NCHW
  int64_t blocks_;    // of channels
  std::vector<ScatterBand> bands_;
  std::vector<int64_t> distances_;
};

}  // namespace torchconv::cpu
