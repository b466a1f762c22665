// Max, min and average pooling by large overlapping windows (stride 1 along W), both layouts.
//
// Along each axis a window of n elements is folded in two levels: runs of about sqrt(n) elements,
// each shared by the windows that contain it, then the runs of a window. An output costs about
// 2 sqrt(R) + 2 sqrt(S) steps; no element is folded into a window twice and nothing is subtracted,
// so an average's error stays below (R + S) ulp of the mean of |x|. A row is flat over columns and
// channels, C = 1 on planes: a column is a constant distance, and vectors need no edges. Pixels
// (NHWC) are taken in strips of columns, so that rows are read in long pieces and yet stay in
// cache. Padding is zero for the average; for max and min it repeats the image's edge, which every
// window that reaches the padding contains, and folding an element in again changes nothing.
// Rows are folded as lanes: only reading a row and storing an output look at the element type, so
// that max and min pooling of float, bfloat16 and float16 share one kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/pool2d_rules.h"

namespace torchconv::cpu {

// How a problem is cut, the same for all element types of `lanes` lanes (pool2d_geometry.cpp).
class LargeWindows {
 public:
  // Where two levels cost less than a window's elements one by one; codes: with their positions.
  static bool applies(const PoolProblem& p, int lanes, bool codes);

 protected:
  LargeWindows(const PoolProblem& p, int lanes);

  static int64_t power_of_two(int64_t at_least);

  // A window's n elements are `runs` runs of `run` elements and `rest` more.
  struct Levels {
    explicit Levels(int64_t n);
    int64_t most() const { return std::max(run, runs + rest); }  // rows folded at once
    int64_t run = 1, runs, rest;
  };

  int64_t pixel_, chunk_, chunks_;  // channels of a pixel in memory, of a unit; units of a pixel
  int64_t strip_, strips_;          // output columns of a unit, units of a row
  int64_t row_;                     // elements of a padded row, and a vector past it
  Levels across_, down_;
};

// Rule is one of lanes, Selection or Averaging of float or double; the run-time element type is one
// of First and Others.
template <typename Rule, bool kCodes, typename First, typename... Others>
class PoolLarge : LargeWindows {
  using Lane = typename Rule::Lane;
  using Code = typename Rule::Code;
  using V = typename Rule::V;
  using C = typename Rule::C;
  using Divisors = typename Rule::Divisors;
  using Values = Vec<Lane>;
  using Codes = Vec<Code>;
  static constexpr int kLanes = Rule::kLanes;

 public:
  PoolLarge(const PoolProblem& p, Rule rule, const void* x, void* y, SelectedArray selected)
      : LargeWindows(p, kLanes),
        p_(p),
        rule_(rule),
        x_(x),
        y_(y),
        selected_(selected),
        code_row_(static_cast<Code>(indices() ? p.W : p.S)) {}

  void run(const Parallel& pool) const {
    const int64_t row_bytes = row_ * static_cast<int64_t>(sizeof(First)) * 8;
    const int64_t units = p_.N * p_.C / pixel_ * chunks_ * strips_;
    parallel_for_with_scratch(pool, 0, units * p_.P, pool_grain(row_bytes),
                              [&](int64_t begin, int64_t end) { rows(begin, end); });
  }

 private:
  static constexpr int64_t kAhead = 2;  // rows, prefetched

  // f(an element of the run-time type).
  template <typename Only, typename F>
  TORCHCONV_INLINE void with_element(const F& f) const {
    f(Only{});
  }
  template <typename Only, typename Next, typename... Rest, typename F>
  TORCHCONV_INLINE void with_element(const F& f) const {
    constexpr DType kOnly = std::is_same_v<Only, BFloat16>  ? DType::kBFloat16
                            : std::is_same_v<Only, Float16> ? DType::kFloat16
                                                            : DType::kFloat32;
    if (p_.dtype == kOnly) return f(Only{});
    with_element<Next, Rest...>(f);
  }
  bool indices() const { return selected_.kind == Selected::kIndex64; }

  // Rows of values and codes; row i stands in slot i modulo a power of two.
  struct Rows {
    Rows(int64_t count, int64_t length)
        : slots(power_of_two(count)),
          length(length),
          values(slots * length),
          codes(kCodes ? slots * length : 0) {}
    Lane* value(int64_t i) const { return values.get() + (i & (slots - 1)) * length; }
    Code* code(int64_t i) const {
      return kCodes ? codes.get() + (i & (slots - 1)) * length : nullptr;
    }
    int64_t slots, length;
    Buffer<Lane> values;
    Buffer<Code> codes;
  };

  // Rows that are folded into one, element by element. (Not a std::vector of pairs: copying a pair
  // just made waits for its two halves to reach the cache.)
  class Sources {
   public:
    explicit Sources(int64_t most) : values_(most), codes_(most) {}
    void clear() { count_ = 0; }
    void add(const Lane* values, const Code* codes) {
      values_[count_] = values;
      codes_[count_] = codes;
      count_++;
    }

    // Elements from j on, n vectors.
    template <int n>
    TORCHCONV_INLINE void fold(int64_t j, V* best, C* code) const {
      load<n>(0, j, best, code);
      for (int64_t s = 1; s < count_; s++) {
        V candidate[n];
        C candidate_code[n];
        load<n>(s, j, candidate, candidate_code);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++)
          Rule::template fold<kCodes>(&best[i], &code[i], candidate[i], candidate_code[i]);
      }
    }

   private:
    template <int n>
    TORCHCONV_INLINE void load(int64_t s, int64_t j, V* values, C* codes) const {
#pragma GCC unroll 4
      for (int i = 0; i < n; i++) {
        values[i] = Values::load(values_[s] + j + i * kLanes);
        codes[i] = C{};
        if constexpr (kCodes) codes[i] = Codes::load(codes_[s] + j + i * kLanes);
      }
    }

    Buffer<const Lane*> values_;
    Buffer<const Code*> codes_;
    int64_t count_ = 0;
  };

  template <int n>
  static TORCHCONV_INLINE void fold_part(const Sources& sources, int64_t j, Code add, Lane* values,
                                         Code* codes) {
    V best[n];
    C code[n] = {};
    sources.template fold<n>(j, best, code);
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
      Values::store(values + j + i * kLanes, best[i]);
      if constexpr (kCodes) Codes::store(codes + j + i * kLanes, code[i] + add);
    }
  }

  // Elements [0, count) and what fills the last vector; add is added to the codes.
  static void fold_all(const Sources& sources, int64_t count, Code add, Lane* values, Code* codes) {
    int64_t j = 0;
    for (; j + 4 * kLanes <= count; j += 4 * kLanes) fold_part<4>(sources, j, add, values, codes);
    for (; j < count; j += kLanes) fold_part<1>(sources, j, add, values, codes);
  }

  // A chunk of channels of a strip of a plane.
  struct Unit {
    int64_t x;         // the chunk's first channel in the plane, in elements
    int64_t y;         // the same, of the strip's first column
    int64_t channels;  // at most chunk_
    Range columns;     // of the output
    int64_t elements(int64_t chunk) const { return columns.size() * chunk; }
  };

  Unit unit(int64_t i) const {
    const int64_t strip = i % strips_, c = i / strips_ % chunks_ * chunk_;
    const int64_t plane = i / strips_ / chunks_;
    const Range columns{strip * strip_, std::min(p_.Q, (strip + 1) * strip_)};
    return {plane * p_.H * p_.W * pixel_ + c, (plane * p_.P * p_.Q + columns.begin) * pixel_ + c,
            std::min(chunk_, pixel_ - c), columns};
  }

  // Scratch memory of one thread, and how far it is with the rows of a unit, which are counted from
  // the first row of the padding.
  struct Work {
    explicit Work(const PoolLarge& k)
        : lines(4, k.row_),
          line_runs(2, k.row_),
          folded(k.p_.R, k.row_),
          runs(k.p_.R, k.row_),
          codes(kCodes ? k.row_ : 0),
          columns(kCodes ? k.row_ : 0),
          starts(kCodes ? k.row_ : 0),
          divisors(Rule::kRepeats ? 0 : k.row_),
          sources(std::max(k.across_.most(), k.down_.most())) {
      if constexpr (!Rule::kRepeats) std::fill_n(divisors.get(), k.row_, Lane{1});
    }
    Rows lines, line_runs;  // input rows, and their runs
    Rows folded, runs;      // input rows folded along W, and runs of those
    Buffer<Code> codes;     // of an output row
    Buffer<Code> columns;   // of a line's element
    Buffer<Code> starts;    // of an output: its window's first column
    Buffer<Lane> divisors;  // of the average: of an output
    int64_t factor = 0;     // of the divisors held; none is 0
    int64_t next_line = 0, next_line_runs = 0, next_folded = 0;
    Sources sources;
  };

  // One output row after another of each unit.
  void rows(int64_t begin, int64_t end) const {
    Work work(*this);
    Divisors divisors(p_, vertical_axis(p_), horizontal_axis(p_), p_.Q);
    Unit now{};
    for (int64_t i = begin; i < end; i++) {
      const int64_t out_p = i % p_.P, top = out_p * p_.stride_h;
      if (i == begin || out_p == 0) {
        now = unit(i / p_.P);
        work.next_line = work.next_line_runs = work.next_folded = top;
        work.factor = 0;
        if (kCodes) name_columns(now, &work);
      }
      const int64_t last = std::min(p_.P - 1 - out_p, end - 1 - i) * p_.stride_h + top + p_.R;
      for (; work.next_folded < top + p_.R; work.next_folded++) {
        const int64_t row = work.next_folded;
        fold_row(now, row, last, &work);
        if (row >= top + down_.run - 1) fold_run(now, row - down_.run + 1, &work);
      }
      spread(divisors.at(out_p), now, out_p, &work);
      with_element<First, Others...>([&](auto element) {
        finish<decltype(element)>(now, top, now.y + out_p * p_.Q * pixel_, &work);
      });
    }
  }

  void name_columns(const Unit& u, Work* work) const {
    for (int64_t j = 0; j < row_; j++) {
      const int64_t w = u.columns.begin + j / chunk_ - p_.pad_w;
      work->columns[j] = static_cast<Code>(std::clamp<int64_t>(w, 0, p_.W - 1));
      work->starts[j] = static_cast<Code>(indices() ? 0 : w);
    }
  }

  // Row `row` of the padded image folded along W. Lines and their runs are a row ahead of what is
  // made of them, up to row `last`: a load that straddles two stores waits for both.
  void fold_row(const Unit& u, int64_t row, int64_t last, Work* work) const {
    for (; work->next_line < std::min(row + 3, last); work->next_line++)
      with_element<First, Others...>([&](auto element) {
        read_row<decltype(element)>(u, work->next_line, work->lines.value(work->next_line));
      });
    for (; work->next_line_runs < std::min(row + 2, last); work->next_line_runs++)
      fold_line_runs(u, work->next_line_runs, work);
    const int64_t h = image_row(row);
    const Lane* line = work->lines.value(row);
    const Lane* line_runs = work->line_runs.value(row);
    const Code* codes = work->line_runs.code(row);
    const Code* columns = work->columns.get();
    Sources& sources = work->sources;
    sources.clear();
    int64_t at = 0;
    for (int64_t i = 0; i < across_.runs; i++, at += across_.run * chunk_)
      sources.add(line_runs + at, kCodes ? codes + at : nullptr);
    for (int64_t i = 0; i < across_.rest; i++, at += chunk_)
      sources.add(line + at, kCodes ? columns + at : nullptr);
    fold_all(sources, u.elements(chunk_), static_cast<Code>(h) * code_row_, work->folded.value(row),
             work->folded.code(row));
  }

  void fold_line_runs(const Unit& u, int64_t row, Work* work) const {
    const Lane* line = work->lines.value(row);
    const Code* columns = work->columns.get();
    Sources& sources = work->sources;
    sources.clear();
    for (int64_t at = 0; at < across_.run * chunk_; at += chunk_)
      sources.add(line + at, kCodes ? columns + at : nullptr);
    fold_all(sources, u.elements(chunk_) + (p_.S - across_.run) * chunk_, 0,
             work->line_runs.value(row), work->line_runs.code(row));
  }

  // The row of the image that stands for row `row` of the padded image.
  int64_t image_row(int64_t row) const { return std::clamp<int64_t>(row - p_.pad_h, 0, p_.H - 1); }

  // The run of folded rows that begins with row `first`.
  void fold_run(const Unit& u, int64_t first, Work* work) const {
    Sources& sources = work->sources;
    sources.clear();
    for (int64_t r = first; r < first + down_.run; r++)
      sources.add(work->folded.value(r), work->folded.code(r));
    fold_all(sources, u.elements(chunk_), 0, work->runs.value(first), work->runs.code(first));
  }

  // The output row from element `row` on, whose windows begin with row `top` of the padded image.
  template <typename T>
  void finish(const Unit& u, int64_t top, int64_t row, Work* work) const {
    T* const y = static_cast<T*>(y_) + row;
    Sources& sources = work->sources;
    sources.clear();
    int64_t r = top;
    for (int64_t i = 0; i < down_.runs; i++, r += down_.run)
      sources.add(work->runs.value(r), work->runs.code(r));
    for (; r < top + p_.R; r++) sources.add(work->folded.value(r), work->folded.code(r));
    const Code row_code = indices() ? Code{0} : static_cast<Code>(top - p_.pad_h) * code_row_;
    // A row of whole pixels is one run of memory, else each pixel's chunk is one.
    const bool whole = pixel_ == chunk_;
    const int64_t run = whole ? u.elements(chunk_) : u.channels;
    const int64_t runs = whole ? 1 : u.columns.size();
    for (int64_t i = 0; i < runs; i++) {
      const int64_t from = i * chunk_;
      T* const to = y + i * pixel_;
      int64_t j = 0;
      for (; j + 4 * kLanes <= run; j += 4 * kLanes)
        finish_part<4>(sources, from + j, *work, row_code, kLanes, to + j);
      for (; j < run; j += kLanes)
        finish_part<1>(sources, from + j, *work, row_code, std::min<int64_t>(run - j, kLanes),
                       to + j);
      if (kCodes) selected_.store(row + i * pixel_, work->codes.get() + from, run);
    }
  }

  // n vectors of outputs from element j on, the last of which has `lanes` elements.
  template <int n, typename T>
  TORCHCONV_INLINE void finish_part(const Sources& sources, int64_t j, const Work& work,
                                    Code row_code, int64_t lanes, T* y) const {
    V best[n];
    C code[n] = {};
    sources.template fold<n>(j, best, code);
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
      const V value = rule_.finish(best[i], work.divisors.get() + j + i * kLanes);
      if (lanes >= kLanes) {
        WideVec<T>::store(y + i * kLanes, value);
      } else {
        WideVec<T>::store_partial(y + i * kLanes, value, lanes);
      }
      if constexpr (kCodes) {
        const C start = Codes::load(work.starts.get() + j + i * kLanes) + row_code;
        Codes::store(work.codes.get() + j + i * kLanes, code[i] - start);
      }
    }
  }

  // Row `row` of the padded image, as lanes: the columns of the strip's windows. A pixel takes
  // chunk_ lanes, of which u.channels are used.
  template <typename T>
  void read_row(const Unit& u, int64_t row, Lane* to) const {
    using W = WideVec<T>;
    if (!Rule::kRepeats && (row < p_.pad_h || row >= p_.pad_h + p_.H)) {
      std::fill_n(to, row_, Lane{0});
      return;
    }
    const int64_t first = u.columns.begin - p_.pad_w, columns = u.columns.size() + p_.S - 1;
    const int64_t begin = std::max(-first, int64_t{0}), end = std::min(p_.W - first, columns);
    const T* from =
        static_cast<const T*>(x_) + u.x + (image_row(row) * p_.W + first + begin) * pixel_;
    const int64_t ahead = kAhead * p_.W * pixel_;
    const bool whole = pixel_ == chunk_;
    const int64_t run = whole ? (end - begin) * chunk_ : u.channels;
    const int64_t runs = whole ? 1 : end - begin;
    for (int64_t i = 0; i < runs; i++, from += pixel_) {
      Lane* const at = to + (begin + i) * chunk_;
      int64_t j = 0;
      for (; j + kLanes <= run; j += kLanes) {
        __builtin_prefetch(from + j + ahead);
        Values::store(at + j, rule_.prepare(W::load(from + j)));
      }
      if (j < run) Values::store(at + j, rule_.prepare(W::load_partial(from + j, run - j)));
    }
    Lane* const last = to + end * chunk_;
    fill_padding(to, to + begin * chunk_, to + begin * chunk_);
    fill_padding(last, to + columns * chunk_, last - chunk_);
    std::fill(to + columns * chunk_, to + row_, Lane{0});
  }

  // Zeros, or copies of the pixel at the image's edge.
  void fill_padding(Lane* to, Lane* end, const Lane* edge) const {
    if (!Rule::kRepeats) {
      std::fill(to, end, Lane{0});
    } else if (chunk_ == 1) {
      std::fill(to, end, *edge);
    } else {
      for (; to < end; to += chunk_) std::copy_n(edge, chunk_, to);
    }
  }

  // Divisors of columns to divisors of elements, where they are not those of the row before.
  void spread(const Lane* row, const Unit& u, int64_t out_p, Work* work) const {
    const int64_t factor = vertical_factor(p_, vertical_axis(p_), out_p);
    if (factor == work->factor) return;
    work->factor = factor;
    Lane* to = work->divisors.get();
    for (int64_t q = u.columns.begin; q < u.columns.end; q++, to += chunk_)
      std::fill_n(to, chunk_, row[q]);
  }
  void spread(std::nullptr_t, const Unit&, int64_t, Work*) const {}

  const PoolProblem& p_;
  Rule rule_;
  const void* x_;
  void* y_;
  SelectedArray selected_;
  Code code_row_;  // codes count h * code_row_ + w
};

// Max and min pooling of float, bfloat16 and float16 (select_pool2d_float.cpp).
template <bool kCodes>
void select_large(const PoolProblem& p, Selection<float> rule, const void* x, void* y,
                  SelectedArray selected, const Parallel& pool);

template <bool kCodes, typename T>
void pool2d_large(const PoolProblem& p, Selection<T> rule, const void* x, void* y,
                  SelectedArray selected, const Parallel& pool) {
  if constexpr (sizeof(Wide<T>) == 8) {
    PoolLarge<Selection<T>, kCodes, T>(p, rule, x, y, selected).run(pool);
  } else {
    Selection<float> shared;
    shared.mirror = rule.mirror;
    select_large<kCodes>(p, shared, x, y, selected, pool);
  }
}

template <bool kCodes, typename T>
void pool2d_large(const PoolProblem& p, Averaging<T>, const void* x, void* y,
                  SelectedArray selected, const Parallel& pool) {
  const Averaging<Wide<T>> rule{};
  PoolLarge<Averaging<Wide<T>>, kCodes, T>(p, rule, x, y, selected).run(pool);
}

}  // namespace torchconv::cpu
