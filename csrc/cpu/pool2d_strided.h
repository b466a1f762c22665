// Max, min and average pooling of planes (NCHW) by windows whose columns no vector of the image
// holds side by side, strides above 2 along W: folded along H first, over all columns.
//
// What is left of an output row's windows is one row. Its columns i * stride + phase of one phase
// are then copied side by side, so that a tap of all outputs is a run of one phase; this costs an
// element a step, but once for an output row and not for each of its R input rows. Several output
// rows are taken at once: a load that straddles what was stored just before waits for it.
//
// Columns come before rows here, so of equal maxima the one in the earlier row is not the first
// that is met, and the row of each is kept: take_greater decides by it.
//
// Values alone of short rows are transposed, as many rows as a vector has lanes: a tap of an output
// is then a vector of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/buffer.h"
#include "cpu/conv_pack.h"
#include "cpu/pool2d_rules.h"
#include "cpu/pool_padded_rows.h"
#include "cpu/pooled_rows.h"

namespace torchconv::cpu {

// The columns of planes in the order of their phases (pool2d_geometry.cpp).
struct StridedColumns {
  StridedColumns(const PoolProblem& p, const RowReach& reach, int lanes);

  struct Phase {
    int64_t from, count;  // columns from, from + stride, ... of a folded row
  };
  int64_t origin;             // of a folded row: the column of its first element
  int64_t length;             // elements of a folded row
  int64_t line;               // elements of a phase, with room for a vector past the last
  std::vector<Phase> phases;  // those that taps are in
  std::vector<int64_t> taps;  // where tap t of output 0 is among the phases' elements
  int64_t first_tap;          // the window's tap that taps[0] is
};

template <typename Rule, bool kCodes>
class PoolStrided {
  using T = typename Rule::Element;
  using W = WideVec<T>;
  using Lane = typename Rule::Lane;
  using Code = typename Rule::Code;
  using V = typename Rule::V;
  using C = typename Rule::C;
  using Divisors = typename Rule::Divisors;
  using Values = Vec<Lane>;
  using Codes = Vec<Code>;
  static constexpr int kLanes = Rule::kLanes;

 public:
  static bool applies(const PoolProblem& p) {
    return p.stride_w > (Rule::kStride2 ? 2 : 1) && RowReach(horizontal_axis(p), kLanes).regular;
  }

  PoolStrided(const PoolProblem& p, Rule rule, const T* x, T* y, SelectedArray selected)
      : p_(p),
        rule_(rule),
        x_(x),
        out_(p, rule, y, selected),
        columns_(p, RowReach(horizontal_axis(p), kLanes), kLanes),
        valid_rows_(vertical_axis(p).all_valid_taps()),
        transposes_(!kCodes && columns_.length <= kBlockLanes / kLanes),
        block_(transposes_ ? kLanes
                           : std::clamp<int64_t>(kBlockLanes / columns_.length, 1, kBlock)) {}

  void run(const Parallel& pool) const {
    const int64_t row_bytes = p_.W * (std::min(p_.R, p_.H) + 2) * static_cast<int64_t>(sizeof(T));
    parallel_for_with_scratch(pool, 0, p_.N * p_.C * p_.P, pool_grain(row_bytes),
                              [&](int64_t begin, int64_t end) {
                                Work work(*this, end);
                                rows(begin, end, &work);
                                if (out_.streams()) stream_fence();
                              });
  }

 private:
  static constexpr int64_t kBlock = 8;          // output rows at once,
  static constexpr int64_t kBlockLanes = 4096;  // or as many as stay in L1
  static constexpr Code kNoRow = std::numeric_limits<Code>::max();

  // Rows of values, and of the rows that these came from.
  struct Lines {
    Lines(int64_t rows, int64_t length, Lane fill)
        : length(length), values(rows * length), codes(kCodes ? rows * length : 0) {
      std::fill_n(values.get(), rows * length, fill);
      if (kCodes) std::fill_n(codes.get(), rows * length, kNoRow);
    }
    Lane* value_row(int64_t i) const { return values.get() + i * length; }
    Code* code_row(int64_t i) const { return kCodes ? codes.get() + i * length : nullptr; }
    int64_t length;
    Buffer<Lane> values;
    Buffer<Code> codes;
  };

  // What one thread works with. The margins of folded rows, the padding, keep what they hold here.
  struct Work {
    Work(const PoolStrided& k, int64_t end)
        : folded(k.block_, round_up(k.columns_.length, kLanes),
                 k.rule_.prepare(to_wide<T>(k.none()))),
          phases(k.transposes_ ? 0 : k.block_,
                 k.columns_.line * static_cast<int64_t>(k.columns_.phases.size()), 0),
          columns(k.transposes_ ? folded.length : 0, kLanes, 0),
          outputs(k.transposes_ ? round_up(k.p_.Q, kLanes) : 0, kLanes, 0),
          divisors(k.p_, vertical_axis(k.p_), horizontal_axis(k.p_), round_up(k.p_.Q, kLanes)),
          codes(k.p_.Q),
          y_end(k.out_.row(end)) {}
    Lines folded, phases;
    Lines columns, outputs;  // of transposed rows, a lane each
    Divisors divisors;
    typename PooledRows<Rule, kCodes>::CodeBuffer codes;
    const T* y_end;
  };

  T none() const { return from_wide<T>(rule_.none()); }

  // Output rows [begin, end) of the N * C * P.
  void rows(int64_t begin, int64_t end, Work* work) const {
    for (int64_t i = begin; i < end; i += block_) {
      const int64_t count = std::min(block_, end - i);
      for (int64_t j = 0; j < count; j++)
        fold_down(i + j, work->folded.value_row(j), work->folded.code_row(j));
      if constexpr (!kCodes) {
        if (transposes_) {
          finish_transposed(i, count, work);
          continue;
        }
      }
      for (int64_t j = 0; j < count; j++) {
        sort(work->folded.value_row(j), work->phases.value_row(j));
        if constexpr (kCodes) sort(work->folded.code_row(j), work->phases.code_row(j));
      }
      for (int64_t j = 0; j < count; j++) finish(i + j, j, work);
    }
    out_.flush(end, &work->codes);
  }

  // The windows' rows of output row i.
  Range taps_down(int64_t i) const { return valid_rows_[static_cast<size_t>(i % p_.P)]; }
  int64_t top(int64_t i) const { return vertical_axis(p_).start(i % p_.P); }

  // Along H: every column, and which of the window's rows it is from.
  void fold_down(int64_t i, Lane* values, Code* codes) const {
    const Range taps = taps_down(i);
    if (taps.empty()) return;
    const int64_t pitch = p_.dilation_h * p_.W, row = i / p_.P * p_.H + top(i);
    const int64_t begin = std::max<int64_t>(0, columns_.origin);
    const int64_t end = std::min(p_.W, columns_.origin + columns_.length);
    const T* const from = x_ + (row + taps.begin * p_.dilation_h) * p_.W;
    for (int64_t w = begin; w < end; w += kLanes) {
      const int64_t to = w - columns_.origin, n = end - w;
      if (n >= kLanes) {
        fold_column<false>(from + w, pitch, taps, n, values + to, codes + to);
      } else {
        fold_column<true>(from + w, pitch, taps, n, values + to, codes + to);
      }
    }
  }

  template <bool kPartial>
  TORCHCONV_INLINE void fold_column(const T* from, int64_t pitch, Range taps, int64_t n,
                                    Lane* values, Code* codes) const {
    V best{};
    C code = Codes::broadcast(static_cast<Code>(taps.begin));
    for (int64_t r = taps.begin; r < taps.end; r++, from += pitch) {
      const V v = rule_.prepare(kPartial ? W::load_partial(from, n) : W::load(from));
      if (r == taps.begin) {
        best = v;
      } else {
        Rule::template fold<kCodes>(&best, &code, v, Codes::broadcast(static_cast<Code>(r)));
      }
    }
    if (kPartial) {
      Values::store_partial(values, best, n);
      if constexpr (kCodes) Codes::store_partial(codes, code, n);
    } else {
      Values::store(values, best);
      if constexpr (kCodes) Codes::store(codes, code);
    }
  }

  // to[c*to_row + r] = from[r*from_row + c] for r, c < kLanes.
  static TORCHCONV_INLINE void transpose(const Lane* from, int64_t from_row, Lane* to,
                                         int64_t to_row) {
    V rows[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; r++) rows[r] = Values::load(from + r * from_row);
    transpose_steps<1>(rows);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; r++) Values::store(to + r * to_row, rows[r]);
  }

  // Along W, of the folded rows: output rows [i, i + count).
  void finish_transposed(int64_t i, int64_t count, Work* work) const {
    const Lines &folded = work->folded, &columns = work->columns, &outputs = work->outputs;
    for (int64_t c = 0; c < folded.length; c += kLanes)
      transpose(folded.value_row(0) + c, folded.length, columns.value_row(c), kLanes);
    const auto taps = static_cast<int64_t>(columns_.taps.size());
    for (int64_t q = 0; q < p_.Q; q++) {
      const Lane* tap = columns.value_row(q * p_.stride_w);
      V best = Values::load(tap);
      C code{};
      for (int64_t t = 1; t < taps; t++) {
        tap += p_.dilation_w * kLanes;
        Rule::template fold<false>(&best, &code, Values::load(tap), code);
      }
      Values::store(outputs.value_row(q), best);
    }
    // A row is written whole before the next.
    Lane* const finished = columns.value_row(0);
    const int64_t length = round_up(p_.Q, kLanes);
    for (int64_t q = 0; q < length; q += kLanes)
      transpose(outputs.value_row(q), kLanes, finished + q, length);
    for (int64_t j = 0; j < count; j++) {
      T* const y = out_.row(i + j);
      if (taps_down(i + j).empty()) {
        out_.empty_row(y, nullptr);
        continue;
      }
      const Lane* const divisors = work->divisors.at((i + j) % p_.P);
      for (int64_t q = 0; q < p_.Q; q += kLanes)
        out_.store(Values::load(finished + j * length + q), C{}, q, divisors, y, work->y_end,
                   nullptr);
      out_.empty_outputs(y, nullptr);
    }
  }

  // The elements of a folded row by their phases.
  template <typename X>
  void sort(const X* from, X* to) const {
    for (const StridedColumns::Phase& phase : columns_.phases) {
      const X* column = from + phase.from;
      for (int64_t i = 0; i < phase.count; i++, column += p_.stride_w) to[i] = *column;
      to += columns_.line;
    }
  }

  // Along W, of the sorted row j: output row i.
  void finish(int64_t i, int64_t j, Work* work) const {
    T* const y = out_.row(i);
    Code* const codes = out_.codes_of(i, &work->codes);
    if (taps_down(i).empty()) return out_.empty_row(y, codes);
    const Lane* const values = work->phases.value_row(j);
    const Code* const rows = work->phases.code_row(j);
    const Lane* const divisors = work->divisors.at(i % p_.P);
    for (int64_t q = 0; q < p_.Q; q += kLanes) {
      V best = Values::load(values + columns_.taps[0] + q);
      C code{};
      if constexpr (kCodes) {
        code = fold_across(values + q, rows + q, &best);
        if (out_.index()) code += static_cast<Code>(top(i) * p_.W);
        out_.finish_codes(q, &code);
      } else {
        for (size_t t = 1; t < columns_.taps.size(); t++)
          Rule::template fold<false>(&best, &code, Values::load(values + columns_.taps[t] + q),
                                     code);
      }
      out_.store(best, code, q, divisors, y, work->y_end, codes);
    }
    out_.empty_outputs(y, codes);
  }

  TORCHCONV_INLINE C fold_across(const Lane* values, const Code* rows, V* best) const {
    const Code step = static_cast<Code>(out_.index() ? p_.dilation_w : 1);
    Code at = static_cast<Code>(columns_.first_tap) * step;
    C row = Codes::load(rows + columns_.taps[0]), column = Codes::broadcast(at);
    for (size_t t = 1; t < columns_.taps.size(); t++) {
      at += step;
      take_greater(best, &row, &column, Values::load(values + columns_.taps[t]),
                   Codes::load(rows + columns_.taps[t]), Codes::broadcast(at));
    }
    row = row == Codes::broadcast(kNoRow) ? C{} : row;  // of outputs that meet padding alone
    return row * static_cast<Code>(out_.index() ? p_.dilation_h * p_.W : p_.S) + column;
  }

  const PoolProblem& p_;
  Rule rule_;
  const T* x_;
  PooledRows<Rule, kCodes> out_;
  StridedColumns columns_;
  std::vector<Range> valid_rows_;  // of the window of output row p
  bool transposes_;
  int64_t block_;  // output rows at once
};

}  // namespace torchconv::cpu
