// Max, min and average pooling of pixels (NHWC): vectors over channels, which are contiguous; one
// window's valid taps are found once and walked for a few vectors of channels at a time, all in
// registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/buffer.h"
#include "cpu/pool2d_rules.h"

namespace torchconv::cpu {

// Rule is Selection or Averaging; kCodes where selections are wanted too.
template <typename Rule, bool kCodes>
class PoolPixels {
  using T = typename Rule::Element;
  using W = WideVec<T>;
  using Lane = typename Rule::Lane;
  using Divisors = typename Rule::Divisors;
  using Code = typename Rule::Code;
  using Count = std::make_unsigned_t<Code>;  // wraps around past the last tap
  using V = typename Rule::V;
  using C = typename Rule::C;
  static constexpr int kLanes = Rule::kLanes;

 public:
  PoolPixels(const PoolProblem& p, Rule rule, const T* x, T* y, SelectedArray selected)
      : p_(p),
        rule_(rule),
        x_(x),
        y_(y),
        selected_(selected),
        vertical_(vertical_axis(p)),
        horizontal_(horizontal_axis(p)),
        inside_(horizontal_.interior()),
        steps_(CodeSteps::choose<Code>(p, selected.kind)),
        x_end_(x + p.N * p.H * p.W * p.C),
        prefetches_((x_end_ - x_) * static_cast<int64_t>(sizeof(T)) >= Rule::kPrefetchedSize),
        wide_(p.C >= kWidePixel),
        streams_(W::streams(y, p.N * p.P * p.Q * p.C, p.C)),
        columns_(horizontal_.all_valid_taps()) {
    const int64_t rows = std::min(p.stride_h, p.H) * p.W * p.C;
    ahead_ = rows <= kMostAhead ? rows : Rule::kAhead;
  }

  void run(const Parallel& pool) {
    const int64_t vectors = ceil_div(p_.C, kLanes) * kLanes;
    const int64_t taps = std::min(p_.R, p_.H) * std::min(p_.S, p_.W);
    const int64_t row_bytes = p_.Q * vectors * static_cast<int64_t>(sizeof(T)) * (taps / 2 + 2);
    if (whole_pixels()) {
      if (row_bytes >= kHalvesBytes && p_.C <= kMostInOrder) return fold_halves(pool, row_bytes);
      if (p_.C % kLanes == 0) return fold_images(pool, row_bytes);
    }
    parallel_for_with_scratch(
        pool, 0, p_.N * p_.P, pool_grain(row_bytes), [&](int64_t begin, int64_t end) {
          Divisors divisors(p_, vertical_, horizontal_, p_.Q);
          CodeBuffer codes(p_.C);
          for (int64_t i = begin; i < end; i++)
            output_row(i, divisors.at(i % p_.P), y_ + end * p_.Q * p_.C, &codes);
          if (streams_) stream_fence();
        });
  }

 private:
  // Codes take registers too.
  static constexpr int kUnroll = kCodes ? std::min(Rule::kUnroll, 4) : Rule::kUnroll;
  static constexpr int64_t kMostAhead = 256 * 1024 / static_cast<int64_t>(sizeof(T));
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  static constexpr int64_t kWidePixel = 4 * kLine;

  struct Window {
    const T* first;  // channel 0 of the first valid element
    int64_t rows, columns;
    int64_t row_step, column_step;  // in elements of x
    Count code, code_row_step, code_column_step;
  };

  // Global pooling: there is but one output.
  bool whole_pixels() const {
    return !kCodes && p_.P == 1 && p_.Q == 1 && p_.dilation_h == 1 && p_.dilation_w == 1 &&
           vertical_.valid_taps(0).size() == p_.H && columns_[0].size() == p_.W;
  }

  // Of whole vectors: the channels go to the threads.
  void fold_images(const Parallel& pool, int64_t image_bytes) const {
    const int64_t vectors = p_.C / kLanes;
    parallel_for_with_scratch(
        pool, 0, p_.N * vectors, pool_grain(image_bytes / vectors),
        [&](int64_t begin, int64_t end) {
          Divisors divisors(p_, vertical_, horizontal_, 1);
          const bool in_order = p_.C >= kFewestInOrder && p_.C <= kMostInOrder;
          const Buffer<Lane> folded(in_order ? p_.C : 0);
          for (int64_t i = begin; i < end;) {
            const int64_t n = i / vectors, first = i % vectors * kLanes;
            const int64_t last = std::min(first + (end - i) * kLanes, p_.C);
            if (in_order) {
              fold_pixels(n, {first, last}, divisors.at(0), folded.get());
            } else {
              const T* x = x_ + n * p_.H * p_.W * p_.C;
              const Window window{x, 1, p_.H * p_.W, 0, p_.C, Count{}, Count{}, Count{}};
              fold_channels<kUnroll>(window, {first, last}, divisors.at(0), n * p_.C, nullptr);
            }
            i += (last - first) / kLanes;
          }
          if (streams_) stream_fence();
        });
  }

  // Of many channels the window is read in the order of memory, while what is folded so far stays
  // in the first-level cache.
  static constexpr int64_t kFewestInOrder = 16 * kLanes;
  static constexpr int64_t kMostInOrder = 16384 / static_cast<int64_t>(sizeof(Lane));

  void fold_pixels(int64_t n, Range channels, const Lane* divisor, Lane* folded) const {
    fold_in_order(x_ + n * p_.H * p_.W * p_.C, p_.H * p_.W, channels, folded);
    for (int64_t c = channels.begin; c < channels.end; c += kLanes)
      W::store(y_ + n * p_.C + c, rule_.finish_all(Vec<Lane>::load(folded + c), divisor));
  }

  static constexpr int kInOrder = 2;  // pixels

  void fold_in_order(const T* x, int64_t pixels, Range channels, Lane* folded) const {
    for (int64_t c = channels.begin; c < channels.end; c += kLanes)
      Vec<Lane>::store(folded + c, load<false>(x + c, 0));
    int64_t i = 1;
    for (; i + kInOrder <= pixels; i += kInOrder)
      fold_next<kInOrder>(x + i * p_.C, channels, folded);
    for (; i < pixels; i++) fold_next<1>(x + i * p_.C, channels, folded);
  }

  // Images of so many bytes are folded in two halves of their pixels, which two threads have where
  // there is a single one: whatever wrote such an image, and will write to it, is dealt out by
  // pixels too, and what another core has read since takes five times as long to write again.
  static constexpr int64_t kHalvesBytes = 150000;

  void fold_halves(const Parallel& pool, int64_t image_bytes) const {
    const int64_t pixels = p_.H * p_.W, first = ceil_div(pixels, int64_t{2});
    const int64_t width = ceil_div(p_.C, kLanes) * kLanes;
    const auto fold_half = [&](int64_t n, int64_t half, Lane* folded) {
      const T* x = x_ + (n * pixels + half * first) * p_.C;
      fold_all_channels(x, half == 0 ? first : pixels - first, folded + half * width);
    };
    const auto finish = [&](int64_t n, const Lane* folded) {
      Divisors divisors(p_, vertical_, horizontal_, 1);
      for (int64_t c = 0; c < p_.C; c += kLanes) {
        V best = Vec<Lane>::load(folded + c);
        C code{};
        Rule::template fold<false>(&best, &code, Vec<Lane>::load(folded + width + c), code);
        W::store_partial(y_ + n * p_.C + c, rule_.finish_all(best, divisors.at(0)),
                         std::min<int64_t>(kLanes, p_.C - c));
      }
    };
    if (p_.N == 1) {
      const Buffer<Lane> folded(2 * width);
      parallel_for(pool, 0, 2, 1, [&](int64_t begin, int64_t end) {
        for (int64_t half = begin; half < end; half++) fold_half(0, half, folded.get());
      });
      return finish(0, folded.get());
    }
    parallel_for_with_scratch(pool, 0, p_.N, pool_grain(image_bytes),
                              [&](int64_t begin, int64_t end) {
                                const Buffer<Lane> folded(2 * width);
                                for (int64_t n = begin; n < end; n++) {
                                  for (int64_t half = 0; half < 2; half++)
                                    fold_half(n, half, folded.get());
                                  finish(n, folded.get());
                                }
                              });
  }

  void fold_all_channels(const T* x, int64_t pixels, Lane* folded) const {
    const int64_t whole = p_.C / kLanes * kLanes;
    int64_t c = 0;
    if (p_.C >= kFewestInOrder) {
      fold_in_order(x, pixels, {0, whole}, folded);
      c = whole;
    }
    for (; c + 4 * kLanes <= whole; c += 4 * kLanes)
      fold_strip<4, false>(x + c, pixels, kLanes, folded + c);
    for (; c < whole; c += kLanes) fold_strip<1, false>(x + c, pixels, kLanes, folded + c);
    if (c < p_.C) fold_strip<1, true>(x + c, pixels, p_.C - c, folded + c);
  }

  template <int kVectors, bool kPartial>
  TORCHCONV_INLINE void fold_strip(const T* x, int64_t pixels, int64_t n, Lane* folded) const {
    V best[kVectors];
    C code{};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) best[v] = load<kPartial>(x + v * kLanes, n);
    for (int64_t i = 1; i < pixels; i++) {
      x += p_.C;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++)
        Rule::template fold<false>(&best[v], &code, load<kPartial>(x + v * kLanes, n), code);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) Vec<Lane>::store(folded + v * kLanes, best[v]);
  }

  template <int kPixels>
  TORCHCONV_INLINE void fold_next(const T* x, Range channels, Lane* folded) const {
    for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
      V best = Vec<Lane>::load(folded + c);
      C code{};
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; i++)
        Rule::template fold<false>(&best, &code, load<false>(x + i * p_.C + c, 0), code);
      Vec<Lane>::store(folded + c, best);
    }
  }

  // Codes of whole pixels that are not stored yet, with room for a vector past the last.
  struct CodeBuffer {
    explicit CodeBuffer(int64_t channels)
        : capacity(std::max<int64_t>(channels, 2048)), data(kCodes ? capacity + kLanes : 0) {}
    int64_t capacity;
    Buffer<Code> data;
    int64_t held = 0;
  };

  void output_row(int64_t row, const Lane* divisors, const T* y_end, CodeBuffer* codes) const {
    const int64_t n = row / p_.P, out_p = row % p_.P;
    const Range r = vertical_.valid_taps(out_p);
    const int64_t h = vertical_.start(out_p) + r.begin * p_.dilation_h;
    Window window;
    window.rows = r.size();
    // With a single row or column the step is not used, and its product might not fit.
    const int64_t dilation_h = r.size() > 1 ? p_.dilation_h : 0;
    window.row_step = dilation_h * p_.W * p_.C;
    window.code_row_step = static_cast<Count>(steps_.index ? dilation_h * p_.W : p_.S);
    int64_t out = row * p_.Q * p_.C;
    for (int64_t q = 0; q < p_.Q; q++, out += p_.C) {
      Code* pixel_codes = nullptr;
      if (kCodes && !selected_.direct()) {
        if (codes->held + p_.C > codes->capacity) flush(row, q - codes->held / p_.C, codes);
        pixel_codes = codes->data.get() + codes->held;
        codes->held += p_.C;
      }
      const Range s = columns_[static_cast<size_t>(q)];
      if (r.empty() || s.empty()) {
        none(out, pixel_codes);
        continue;
      }
      const int64_t w = horizontal_.start(q) + s.begin * p_.dilation_w;
      window.columns = s.size();
      const int64_t dilation_w = s.size() > 1 ? p_.dilation_w : 0;
      window.column_step = dilation_w * p_.C;
      window.code_column_step = static_cast<Count>(steps_.index ? dilation_w : 1);
      window.first = x_ + ((n * p_.H + h) * p_.W + w) * p_.C;
      window.code = static_cast<Count>(steps_.index ? h * p_.W + w : r.begin * p_.S + s.begin);
      if (p_.C < kLanes && q >= inside_.begin) {
        const int64_t done = narrow_pixels(window, q, divisors + q, out, y_end);
        if (done > 0) {
          q += done - 1, out += (done - 1) * p_.C;
          continue;
        }
      }
      if (prefetches_ && wide_) prefetch<2>(window);
      if (prefetches_ && !wide_) prefetch<3>(window);
      channels(window, divisors + q, out, y_end, pixel_codes);
    }
    if (codes->held > 0) flush(row, p_.Q - codes->held / p_.C, codes);
  }

  // What the next output row reads and this one does not, seen from this output: of every such row
  // as much as outputs are apart. The hardware gives up where rows are read in turns. Pixels of
  // several lines come to the second-level cache (kLocality 2): a row ahead, they would have left
  // the first before they are read, and its few buffers for misses are better used by the reads;
  // the shorter loops of narrow pixels wait for it. (Inlined, or GCC finds a function without
  // effects and drops the call.)
  template <int kLocality>
  TORCHCONV_INLINE void prefetch(const Window& window) const {
    const int64_t rows = std::min(window.rows, p_.stride_h);
    const T* row = window.first + (window.rows - rows) * window.row_step + ahead_;
    for (int64_t r = 0; r < rows; r++, row += window.row_step) {
      for (int64_t i = 0; i < p_.stride_w * p_.C; i += kLine)
        __builtin_prefetch(row + i, 0, kLocality);
    }
  }

  // Pixels of less than a vector, from output q on, as many as have the usual whole windows and can
  // be read and written by whole vectors; returns how many.
  int64_t narrow_pixels(const Window& window, int64_t q, const Lane* divisors, int64_t out,
                        const T* y_end) const {
    if (!Rule::kStride2 || (kCodes && !selected_.direct())) return 0;
    const int64_t last =
        (window.rows - 1) * window.row_step + (window.columns - 1) * window.column_step;
    const int64_t step = p_.stride_w * p_.C;
    const int64_t readable = floor_div(x_end_ - window.first - last - kLanes, step) + 1;
    const int64_t writable = floor_div(y_end - (y_ + out) - kLanes, p_.C) + 1;
    const int64_t n = std::min({inside_.end - q, readable, writable});
    if (n <= 0) return 0;
    if (window.rows == 2 && window.columns == 2) {
      narrow_run<2, 2>(window, n, divisors, out);
    } else if (window.rows == 3 && window.columns == 3) {
      narrow_run<3, 3>(window, n, divisors, out);
    } else {
      return 0;
    }
    return n;
  }

  template <int kRows, int kColumns>
  void narrow_run(const Window& window, int64_t n, const Lane* divisors, int64_t out) const {
    const int64_t step = p_.stride_w * p_.C;
    const T* from = window.first;
    for (int64_t i = 0; i < n; i++, from += step, out += p_.C) {
      V best = load<false>(from, kLanes);
      C code = Vec<Code>::broadcast(static_cast<Code>(window.code));
#pragma GCC unroll 9
      for (int t = 1; t < kRows * kColumns; t++) {
        const int r = t / kColumns, s = t % kColumns;
        const V v = load<false>(from + r * window.row_step + s * window.column_step, kLanes);
        const Count at = window.code + static_cast<Count>(r) * window.code_row_step +
                         static_cast<Count>(s) * window.code_column_step;
        Rule::template fold<kCodes>(&best, &code, v, Vec<Code>::broadcast(static_cast<Code>(at)));
      }
      W::store(y_ + out, rule_.finish_all(best, divisors + i));
      if constexpr (kCodes) selected_.template store_bytes<Code>(out, code, kLanes);
    }
  }

  void none(int64_t out, Code* codes) const {
    std::fill_n(y_ + out, p_.C, from_wide<T>(rule_.none()));
    if (kCodes && selected_.direct()) {
      std::fill_n(selected_.bytes() + out, p_.C, kNoOffset<uint8_t>);
    } else if (kCodes) {
      std::fill_n(codes, p_.C, Code{-1});
    }
  }

  // Stores the codes of the pixels of output row `row` from out_q on, and empties the buffer.
  void flush(int64_t row, int64_t out_q, CodeBuffer* codes) const {
    const int64_t position = (row * p_.Q + out_q) * p_.C;
    selected_.store(position, codes->data.get(), codes->held);
    if (steps_.finish) {
      int64_t* at = static_cast<int64_t*>(selected_.data) + position;
      for (int64_t i = 0; i < codes->held; i++)
        at[i] = index_from_offset(p_, at[i], row % p_.P, out_q + i / p_.C);
    }
    codes->held = 0;
  }

  void channels(const Window& window, const Lane* divisor, int64_t out, const T* y_end,
                Code* codes) const {
    const int64_t c =
        p_.C < kLanes ? 0 : fold_channels<kUnroll>(window, {0, p_.C}, divisor, out, codes);
    if (c == p_.C) return;
    // The last vector spills into the next pixel, which is written after it, but not past y_end;
    // and it may read what follows the channels, but not past the tensor.
    const T* last = window.first + (window.rows - 1) * window.row_step +
                    (window.columns - 1) * window.column_step + c;
    if (y_end - (y_ + out + c) >= kLanes && x_end_ - last >= kLanes) {
      fold_window<1, false>(window, c, divisor, out, codes + c, kLanes);
    } else {
      fold_window<1, true>(window, c, divisor, out, codes + c, p_.C - c);
    }
  }

  // As many vectors as there are, first kVectors at once; the channel they end at.
  template <int kVectors>
  TORCHCONV_INLINE int64_t fold_channels(const Window& window, Range channels, const Lane* divisor,
                                         int64_t out, Code* codes) const {
    int64_t& c = channels.begin;
    for (; c + kVectors * kLanes <= channels.end; c += kVectors * kLanes)
      fold_window<kVectors, false>(window, c, divisor, out, codes + c, kLanes);
    if constexpr (kVectors > 1)
      return fold_channels<kVectors / 4>(window, channels, divisor, out, codes);
    return c;
  }

  template <int kVectors, bool kPartial>
  TORCHCONV_INLINE void fold_window(const Window& window, int64_t c, const Lane* divisor,
                                    int64_t out, Code* codes, int64_t n) const {
    V best[kVectors];
    C code[kVectors];
    const T* row = window.first + c;
    Count row_code = window.code;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      best[i] = load<kPartial>(row + i * kLanes, n);
      code[i] = Vec<Code>::broadcast(static_cast<Code>(row_code));
    }
    for (int64_t r = 0; r < window.rows; r++) {
      const int64_t first = r == 0 ? 1 : 0;  // the first element is there already
      const T* at = row + first * window.column_step;
      Count at_code = row_code + static_cast<Count>(first) * window.code_column_step;
      for (int64_t s = first; s < window.columns; s++) {
        const C candidate_code = Vec<Code>::broadcast(static_cast<Code>(at_code));
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; i++) {
          if constexpr (kVectors == 16) __builtin_prefetch(at + i * kLanes + kVectors * kLanes);
          Rule::template fold<kCodes>(&best[i], &code[i], load<kPartial>(at + i * kLanes, n),
                                      candidate_code);
        }
        at += window.column_step;
        at_code += window.code_column_step;
      }
      row += window.row_step;
      row_code += window.code_row_step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      const int64_t position = out + c + i * kLanes;
      best[i] = rule_.finish_all(best[i], divisor);
      if constexpr (kPartial) {
        W::store_partial(y_ + position, best[i], n);
      } else {
        W::store(y_ + position, best[i], streams_);
      }
      if constexpr (kCodes) {
        if (selected_.direct()) {
          selected_.template store_bytes<Code>(position, code[i], n);
        } else {
          Vec<Code>::store(codes + i * kLanes, code[i]);
        }
      }
    }
  }

  template <bool kPartial>
  TORCHCONV_INLINE V load(const T* from, int64_t n) const {
    return rule_.prepare(kPartial ? W::load_partial(from, n) : W::load(from));
  }

  const PoolProblem& p_;
  Rule rule_;
  const T* x_;
  T* y_;
  SelectedArray selected_;
  Axis vertical_, horizontal_;
  Range inside_;
  CodeSteps steps_;
  const T* x_end_;
  bool prefetches_, wide_, streams_;
  int64_t ahead_;               // so many elements
  std::vector<Range> columns_;  // of the windows of output column q: their taps in the image
};

}  // namespace torchconv::cpu
