// Max, min and average pooling of planes (NCHW): vectors over the outputs of a row, and windows
// folded along W before H.
//
// Windows of up to 3 rows are folded in registers, from the image to the output. Of larger ones
// each input row is folded along W once and kept for the next output rows whose windows also
// contain it, so an output costs R + S steps, not R * S. Rows with windows that reach into the
// padding are read from copies between margins of what folds to nothing (pool_padded_rows.h); so
// are those at the tensor's end, which whole vectors would read past.
#pragma once

#include <cstdint>
#include <vector>

#include "core/buffer.h"
#include "cpu/pool2d_rules.h"
#include "cpu/pool_padded_rows.h"
#include "cpu/pooled_rows.h"

namespace torchconv::cpu {

// Rule is Selection or Averaging; kCodes where selections are wanted too.
template <typename Rule, bool kCodes>
class PoolPlanes {
  using T = typename Rule::Element;
  using W = WideVec<T>;
  using Divisors = typename Rule::Divisors;
  using Lane = typename Rule::Lane;
  using Code = typename Rule::Code;
  using V = typename Rule::V;
  using C = typename Rule::C;
  static constexpr int kLanes = Rule::kLanes;
  using Values = Vec<Lane>;
  using Codes = Vec<Code>;

 public:
  PoolPlanes(const PoolProblem& p, Rule rule, const T* x, T* y, SelectedArray selected)
      : p_(p),
        rule_(rule),
        x_(x),
        out_(p, rule, y, selected),
        vertical_(vertical_axis(p)),
        horizontal_(horizontal_axis(p)),
        reach_(horizontal_, kLanes),
        x_end_(x + p.N * p.C * p.H * p.W),
        prefetches_((x_end_ - x_) * static_cast<int64_t>(sizeof(T)) >= Rule::kPrefetchedSize),
        row_lanes_((ceil_div(p.Q, kLanes) + 1) * kLanes),
        first_codes_(kCodes ? row_lanes_ : 0),
        valid_rows_(vertical_.all_valid_taps()) {
    if constexpr (kCodes) {
      for (int64_t q = 0; q < row_lanes_; q++)
        first_codes_[q] = q < p.Q ? code_of(horizontal_.valid_taps(q).begin) : 0;
    }
  }

  void run(const Parallel& pool) {
    const int64_t row_bytes = (std::min(p_.stride_h, p_.H) * p_.W +
                               p_.Q * (std::min(p_.R, p_.H) + std::min(p_.S, p_.W))) *
                              static_cast<int64_t>(sizeof(T));
    parallel_for_with_scratch(pool, 0, p_.N * p_.C * p_.P, pool_grain(row_bytes),
                              [&](int64_t begin, int64_t end) {
                                Work work(*this, end);
                                rows(begin, end, &work);
                                if (out_.streams()) stream_fence();
                              });
  }

 private:
  static constexpr int64_t kBatch = 16;       // rows folded at once along H
  static constexpr int64_t kCopied = 4;       // rows copied at once
  static constexpr int64_t kInRegisters = 3;  // rows of a window folded with nothing stored

  // Rows of values and codes that are folded along W.
  struct Folded {
    Folded(int64_t rows, int64_t lanes)
        : lanes(lanes), values(rows * lanes), codes(kCodes ? rows * lanes : 0) {}
    Lane* value_row(int64_t i) const { return values.get() + i * lanes; }
    Code* code_row(int64_t i) const { return kCodes ? codes.get() + i * lanes : nullptr; }
    int64_t lanes;
    Buffer<Lane> values;
    Buffer<Code> codes;
  };

  // What one thread works with.
  struct Work {
    Work(const PoolPlanes& k, int64_t end)
        : ring(k.rows_to_keep()),
          slots(ring.keeps() ? k.rows_to_keep() : std::min(kBatch, k.p_.R)),
          folded(k.folds_in_registers() ? 0 : slots + 1, k.row_lanes_),
          padded(k.p_.W, k.p_.H, k.reach_, from_wide<T>(k.rule_.none())),
          divisors(k.p_, k.vertical_, k.horizontal_, k.row_lanes_),
          codes(k.p_.Q),
          y_end(k.out_.row(end)) {}
    RowRing ring;
    int64_t slots;
    Folded folded;  // the last row: a window's earlier batches
    PaddedRows<T> padded;
    Divisors divisors;
    typename PooledRows<Rule, kCodes>::CodeBuffer codes;
    const T* y_end;
  };

  // Folded rows of one window, and what their codes still lack.
  struct Batch {
    const Lane* values[kBatch];
    const Code* codes[kBatch];
    Code add[kBatch];
    int64_t count = 0;
    void push(const Lane* v, const Code* c, int64_t a) {
      values[count] = v;
      codes[count] = c;
      add[count++] = static_cast<Code>(a);
    }
  };

  bool folds_in_registers() const {
    // With codes, folding a row again costs more than keeping it.
    if (kCodes && p_.stride_h < p_.R) return false;
    return Rule::kStride2 && p_.R <= kInRegisters && p_.dilation_h == 1 && p_.dilation_w == 1 &&
           reach_.regular && p_.stride_w <= 2 && reach_.taps.size() >= 2 && reach_.taps.size() <= 3;
  }

  int64_t rows_to_keep() const {
    const int64_t row_bytes = row_lanes_ * static_cast<int64_t>(sizeof(Lane) + sizeof(Code));
    return RowRing::slots_to_keep(vertical_.span(), p_.stride_h, row_bytes);
  }

  // The code of tap s, less what is the same for all taps of an output.
  Code code_of(int64_t s) const { return static_cast<Code>(out_.index() ? s * p_.dilation_w : s); }
  Code code_of_row(int64_t r, int64_t h) const {
    return static_cast<Code>(out_.index() ? h * p_.W : r * p_.S);
  }

  // Output rows [begin, end) of the N * C * P.
  void rows(int64_t begin, int64_t end, Work* work) const {
    if (reach_.taps.empty()) return empty_rows(begin, end, work);
    const bool in_registers = folds_in_registers();
    const int64_t most =
        in_registers ? std::max<int64_t>(1, (work->padded.most() - p_.R) / p_.stride_h + 1) : p_.P;
    for (int64_t i = begin; i < end;) {
      const int64_t plane = i / p_.P, first = i % p_.P;
      const Range block{first, std::min({first + most, p_.P, first + end - i})};
      if (in_registers) {
        block_in_registers(plane, block, work);
      } else {
        block_by_rows(plane, block, work);
      }
      i += block.size();
    }
    out_.flush(end, &work->codes);
  }

  void empty_rows(int64_t begin, int64_t end, Work* work) const {
    for (int64_t i = begin; i < end; i++)
      out_.empty_row(out_.row(i), out_.codes_of(i, &work->codes));
    out_.flush(end, &work->codes);
  }

  // ---- Windows of few rows.

  // Output rows of one plane; their input rows are read where they are, or all copied first.
  void block_in_registers(int64_t plane, Range block, Work* work) const {
    if constexpr (Rule::kStride2) {
      if (p_.stride_w == 1) {
        reach_.taps.size() == 2 ? finish_block<1, 2>(plane, block, work)
                                : finish_block<1, 3>(plane, block, work);
      } else {
        reach_.taps.size() == 2 ? finish_block<2, 2>(plane, block, work)
                                : finish_block<2, 3>(plane, block, work);
      }
    }
  }

  template <int kStride, int kTaps>
  void finish_block(int64_t plane, Range block, Work* work) const {
    const T* const x = x_ + plane * p_.H * p_.W;
    const int64_t begin = std::max<int64_t>(0, vertical_.start(block.begin));
    const int64_t end = std::min(p_.H, vertical_.start(block.end - 1) + p_.R);
    const T* lines = x + begin * p_.W + reach_.origin;
    int64_t pitch = p_.W, ahead = Rule::kAhead;
    if (!reach_.inside || x_end_ - (lines + (end - 1 - begin) * p_.W) < reach_.length) {
      lines = work->padded.at(x, begin, end - begin);
      pitch = work->padded.pitch();
      ahead = work->padded.most() * p_.W;
    }
    for (int64_t out_p = block.begin; out_p < block.end; out_p++) {
      const int64_t i = plane * p_.P + out_p;
      T* const y = out_.row(i);
      Code* const codes = out_.codes_of(i, &work->codes);
      const Range taps = valid_rows_[static_cast<size_t>(out_p)];
      if (taps.empty()) {
        out_.empty_row(y, codes);
        continue;
      }
      const int64_t h = vertical_.start(out_p) + taps.begin;
      finish_window<kStride, kTaps>(lines + (h - begin) * pitch, pitch, taps.size(),
                                    x + h * p_.W + ahead, code_of_row(taps.begin, h),
                                    work->divisors.at(out_p), y, work->y_end, codes);
    }
  }

  // One output row from `rows` input rows.
  template <int kStride, int kTaps>
  TORCHCONV_INLINE void finish_window(const T* from, int64_t pitch, int64_t rows, const T* ahead,
                                      Code add, const Lane* divisors, T* y, const T* y_end,
                                      Code* codes) const {
    const Code step = static_cast<Code>(out_.index() ? p_.W : p_.S);
    for (int64_t q = 0; q < p_.Q; q += kLanes, from += kStride * kLanes) {
      V best;
      C code{};
      fold_taps<kStride, kTaps>(from, q, &best, &code);
      prefetch<kStride>(ahead + q * kStride, p_.stride_h);
      for (int64_t r = 1; r < rows; r++) {
        V candidate;
        C candidate_code{};
        fold_taps<kStride, kTaps>(from + r * pitch, q, &candidate, &candidate_code);
        if constexpr (kCodes) candidate_code += static_cast<Code>(r) * step;
        Rule::template fold<kCodes>(&best, &code, candidate, candidate_code);
      }
      if constexpr (kCodes) code += add;
      out_.store(best, code, q, divisors, y, y_end, codes);
    }
    out_.empty_outputs(y, codes);
  }

  // What a vector of outputs takes of each of some rows. The hardware prefetches badly where short
  // rows are read in turns, or copied in bursts.
  template <int kStride>
  TORCHCONV_INLINE void prefetch(const T* at, int64_t rows) const {
    if (!prefetches_) return;
    for (int64_t r = 0; r < rows; r++) {
      for (int i = 0; i < kStride; i++) __builtin_prefetch(at + r * p_.W + i * kLanes);
    }
  }

  template <int kStride, int kTaps>
  TORCHCONV_INLINE void fold_taps(const T* from, int64_t q, V* best, C* code) const {
    V taps[kTaps];
    load_taps<T, kStride, kTaps>(from, taps);
    *best = rule_.prepare(taps[0]);
    if constexpr (kCodes) *code = Codes::load(first_codes_.get() + q);
#pragma GCC unroll 3
    for (int s = 1; s < kTaps; s++) {
      const Code at = code_of(reach_.taps.begin + s);
      Rule::template fold<kCodes>(best, code, rule_.prepare(taps[s]), Codes::broadcast(at));
    }
    out_.finish_codes(q, code);
  }

  // ---- Windows of any size.

  void block_by_rows(int64_t plane, Range block, Work* work) const {
    work->ring.clear();
    for (int64_t out_p = block.begin; out_p < block.end; out_p++) {
      const int64_t i = plane * p_.P + out_p;
      T* const y = out_.row(i);
      Code* const codes = out_.codes_of(i, &work->codes);
      const Range taps = valid_rows_[static_cast<size_t>(out_p)];
      if (taps.empty()) {
        out_.empty_row(y, codes);
        continue;
      }
      const Batch last = fold_window_rows(plane, out_p, taps, work);
      finish_row(last, work->divisors.at(out_p), y, work->y_end, codes);
    }
  }

  // The rows of output row out_p's windows folded along W, all but the last kBatch also along H.
  Batch fold_window_rows(int64_t plane, int64_t out_p, Range taps, Work* work) const {
    Batch batch;
    const Folded& folded = work->folded;
    for (int64_t r = taps.begin; r < taps.end; r++) {
      const int64_t h = vertical_.start(out_p) + r * p_.dilation_h;
      if (batch.count == (work->ring.keeps() ? kBatch : work->slots)) {
        fold_batch(batch, folded.value_row(work->slots), folded.code_row(work->slots));
        batch = Batch();
        batch.push(folded.value_row(work->slots), folded.code_row(work->slots), 0);
      }
      const int64_t slot = work->ring.keeps() ? work->ring.slot(h) : batch.count;
      Lane* values = folded.value_row(slot);
      Code* codes = folded.code_row(slot);
      if (!work->ring.keeps() || work->ring.claim(h))
        fold_row(x_ + plane * p_.H * p_.W, h, values, codes, work);
      batch.push(values, codes, code_of_row(r, h));
    }
    return batch;
  }

  // Along W: values[q] and codes[q] of row h for every output q.
  void fold_row(const T* plane, int64_t h, Lane* values, Code* codes, Work* work) const {
    if (!reach_.regular) {
      for (int64_t q = 0; q < p_.Q; q++) fold_output(plane + h * p_.W, q, values, codes);
      return;
    }
    const T* from = plane + h * p_.W + reach_.origin;
    if (!reach_.inside || x_end_ - from < reach_.length)
      from = work->padded.at(plane, h, p_.dilation_h == 1 ? kCopied : 1);
    const T* const ahead = plane + h * p_.W + std::max(kCopied * p_.W, Rule::kAhead);
    if (!Rule::kStride2 || p_.stride_w == 1) {
      fold_line<1>(from, ahead, values, codes);
    } else {
      fold_line<Rule::kStride2 ? 2 : 1>(from, ahead, values, codes);
    }
  }

  template <int kStride>
  void fold_line(const T* from, const T* ahead, Lane* values, Code* codes) const {
    const int64_t taps = reach_.taps.size(), dilation = p_.dilation_w;
    const Code step = code_of(1), first = code_of(reach_.taps.begin);
    for (int64_t q = 0; q < p_.Q; q += kLanes, from += kLanes * kStride) {
      prefetch<kStride>(ahead + q * kStride, 1);
      V best = rule_.prepare(load_strided<T, kStride>(from));
      C code{};
      if constexpr (kCodes) code = Codes::load(first_codes_.get() + q);
      const T* tap = from;
      Code at = first;
      for (int64_t s = 1; s < taps; s++) {
        tap += dilation;
        at += step;
        const V v = rule_.prepare(load_strided<T, kStride>(tap));
        Rule::template fold<kCodes>(&best, &code, v, Codes::broadcast(at));
      }
      out_.finish_codes(q, &code);
      Values::store(values + q, best);
      if constexpr (kCodes) Codes::store(codes + q, code);
    }
  }

  // Output q by itself, element by element.
  void fold_output(const T* row, int64_t q, Lane* values, Code* codes) const {
    const Range taps = horizontal_.valid_taps(q);
    Lane best = Lane{};
    Code code = 0;
    for (int64_t s = taps.begin; s < taps.end; s++) {
      const int64_t w = horizontal_.start(q) + s * p_.dilation_w;
      const Lane v = rule_.prepare(to_wide<T>(row[w]));
      const Code at = static_cast<Code>(out_.index() ? w : s);
      if (s == taps.begin) {
        best = v;
        code = at;
      } else {
        Rule::template fold<kCodes>(&best, &code, v, at);
      }
    }
    values[q] = best;
    if (kCodes) codes[q] = code;
  }

  TORCHCONV_INLINE void fold_rows(const Batch& batch, int64_t q, V* best, C* code) const {
    *best = Values::load(batch.values[0] + q);
    if constexpr (kCodes) *code = Codes::load(batch.codes[0] + q) + batch.add[0];
    for (int64_t i = 1; i < batch.count; i++) {
      C candidate_code{};
      if constexpr (kCodes) candidate_code = Codes::load(batch.codes[i] + q) + batch.add[i];
      Rule::template fold<kCodes>(best, code, Values::load(batch.values[i] + q), candidate_code);
    }
  }

  void fold_batch(const Batch& batch, Lane* values, Code* codes) const {
    for (int64_t q = 0; q < p_.Q; q += kLanes) {
      V best;
      C code{};
      fold_rows(batch, q, &best, &code);
      Values::store(values + q, best);
      if constexpr (kCodes) Codes::store(codes + q, code);
    }
  }

  void finish_row(const Batch& batch, const Lane* divisors, T* y, const T* y_end,
                  Code* codes) const {
    for (int64_t q = 0; q < p_.Q; q += kLanes) {
      V best;
      C code{};
      fold_rows(batch, q, &best, &code);
      out_.store(best, code, q, divisors, y, y_end, codes);
    }
    out_.empty_outputs(y, codes);
  }

  const PoolProblem& p_;
  Rule rule_;
  const T* x_;
  PooledRows<Rule, kCodes> out_;
  Axis vertical_, horizontal_;
  RowReach reach_;
  const T* x_end_;
  bool prefetches_;
  int64_t row_lanes_;              // Q and room for a vector past the last
  Buffer<Code> first_codes_;       // of output q: code_of its first tap in the image
  std::vector<Range> valid_rows_;  // of the window of output row p
};

}  // namespace torchconv::cpu
