// Max, min and average pooling of planes (NCHW): each input row is folded along W once, with
// vectors over the outputs of the row, and the folded rows of a window are then folded along H.
//
// A folded row is kept for the next output rows whose windows also contain it, so an output costs
// R + S steps, not R * S. Outputs whose window reaches into the padding are folded apart, element
// by element. A row's last vector reads and writes past the row, inside the same arrays, rather
// than being cut short.
#pragma once

#include <cstdint>
#include <vector>

#include "core/buffer.h"
#include "cpu/pool2d_rules.h"

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
        y_(y),
        selected_(selected),
        vertical_(vertical_axis(p)),
        horizontal_(horizontal_axis(p)),
        inside_(horizontal_.interior()),
        steps_(CodeSteps::choose<Code>(p, selected.kind)),
        x_end_(x + p.N * p.C * p.H * p.W),
        row_lanes_((ceil_div(p.Q, kLanes) + 1) * kLanes) {
    valid_rows_.reserve(static_cast<size_t>(p.P));
    for (int64_t out_p = 0; out_p < p.P; out_p++)
      valid_rows_.push_back(vertical_.valid_taps(out_p));
    for (int64_t q = 0; q < p.Q; q++) {
      if (q == inside_.begin && !inside_.empty()) q = inside_.end;
      if (q < p.Q) edges_.push_back({q, horizontal_.valid_taps(q)});
    }
  }

  void run(const Parallel& pool) {
    const int64_t row_bytes = (std::min(p_.stride_h, p_.H) * p_.W +
                               p_.Q * (std::min(p_.R, p_.H) + std::min(p_.S, p_.W))) *
                              static_cast<int64_t>(sizeof(T));
    parallel_for_with_scratch(pool, 0, p_.N * p_.C * p_.P, pool_grain(row_bytes),
                              [&](int64_t begin, int64_t end) { rows(begin, end); });
  }

 private:
  static constexpr int64_t kBatch = 16;  // rows folded at once along H

  // Rows of values and codes that are folded along W.
  struct Scratch {
    Scratch(int64_t rows, int64_t lanes)
        : lanes(lanes), values(rows * lanes), codes(kCodes ? rows * lanes : 0) {}
    Lane* value_row(int64_t i) const { return values.get() + i * lanes; }
    Code* code_row(int64_t i) const { return kCodes ? codes.get() + i * lanes : nullptr; }
    int64_t lanes;
    Buffer<Lane> values;
    Buffer<Code> codes;
  };

  // Codes of whole output rows that are not stored yet, with room for a vector past the last.
  struct CodeBuffer {
    explicit CodeBuffer(int64_t row)
        : capacity(std::max<int64_t>(row, 2048)), data(kCodes ? capacity + kLanes : 0) {}
    Code* end() const { return kCodes ? data.get() + held : nullptr; }
    int64_t capacity;
    Buffer<Code> data;
    int64_t held = 0;
  };

  // An output whose window reaches into the padding, and what of it is in the image.
  struct Edge {
    int64_t q;
    Range taps;
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

  // Output rows [begin, end) of the N * C * P.
  void rows(int64_t begin, int64_t end) const {
    const int64_t row_bytes = row_lanes_ * static_cast<int64_t>(sizeof(Lane) + sizeof(Code));
    const int64_t kept = RowRing::slots_to_keep(vertical_.span(), p_.stride_h, row_bytes);
    RowRing ring(kept);
    Divisors divisors(p_, vertical_, horizontal_, row_lanes_);
    const int64_t slots = kept > 0 ? kept : std::min(kBatch, p_.R);
    const Scratch folded(slots + 1, row_lanes_);  // the last row: a window's earlier batches
    CodeBuffer codes(p_.Q);
    const T* y_end = y_ + end * p_.Q;
    int64_t plane = begin / p_.P, out_p = begin % p_.P;
    for (int64_t i = begin; i < end; i++, out_p++) {
      if (out_p == p_.P) {
        out_p = 0;
        plane++;
        ring.clear();
      }
      if (kCodes && codes.held + p_.Q > codes.capacity) flush(i, &codes);
      const Range taps = valid_rows_[static_cast<size_t>(out_p)];
      T* y = y_ + i * p_.Q;
      if (taps.empty()) {
        for (int64_t q = 0; q < p_.Q; q++) none(q, y, codes.end());
      } else {
        const Batch last = fold_window_rows(plane, out_p, taps, &ring, folded, slots);
        finish_row(last, divisors.at(out_p), y, y_end, codes.end());
        for (const Edge& edge : edges_) {
          if (edge.taps.empty()) none(edge.q, y, codes.end());
        }
      }
      codes.held += p_.Q;
    }
    if (kCodes) flush(end, &codes);
  }

  // The rows of output row out_p's windows folded along W, all but the last kBatch also along H.
  Batch fold_window_rows(int64_t plane, int64_t out_p, Range taps, RowRing* ring,
                         const Scratch& folded, int64_t slots) const {
    Batch batch;
    for (int64_t r = taps.begin; r < taps.end; r++) {
      const int64_t h = vertical_.start(out_p) + r * p_.dilation_h;
      if (batch.count == (ring->keeps() ? kBatch : slots)) {
        fold_batch(batch, folded.value_row(slots), folded.code_row(slots));
        batch = Batch();
        batch.push(folded.value_row(slots), folded.code_row(slots), 0);
      }
      const int64_t slot = ring->keeps() ? ring->slot(h) : batch.count;
      Lane* values = folded.value_row(slot);
      Code* codes = folded.code_row(slot);
      if (!ring->keeps() || ring->claim(h)) {
        const T* row = x_ + (plane * p_.H + h) * p_.W;
        if (p_.stride_w == 1) {
          fold_row<1>(row, values, codes);
        } else if (Rule::kStride2 && p_.stride_w == 2) {
          fold_row<Rule::kStride2 ? 2 : 0>(row, values, codes);
        } else {
          fold_row<0>(row, values, codes);
        }
      }
      batch.push(values, codes, steps_.index ? h * p_.W : r * p_.S);
    }
    return batch;
  }

  // Output q of the row y has no element in the image.
  void none(int64_t q, T* y, Code* codes) const {
    y[q] = from_wide<T>(rule_.none());
    if (kCodes) codes[q] = -1;
  }

  // Stores the codes of the output rows before row `end`, and empties the buffer.
  void flush(int64_t end, CodeBuffer* codes) const {
    const int64_t position = end * p_.Q - codes->held;
    selected_.store(position, codes->data.get(), codes->held);
    if (steps_.finish) {
      int64_t* indices = static_cast<int64_t*>(selected_.data);
      for (int64_t i = position; i < end * p_.Q; i++)
        indices[i] = index_from_offset(p_, indices[i], i / p_.Q % p_.P, i % p_.Q);
    }
    codes->held = 0;
  }

  // Along W: values[q] and codes[q] of the row for every output q.
  template <int kStride>
  void fold_row(const T* row, Lane* values, Code* codes) const {
    int64_t q = inside_.begin;
    for (; q + kLanes < inside_.end; q += kLanes)
      fold_vector<kStride, false>(row, q, kLanes, values, codes);
    if (q < inside_.end) {
      // A whole vector also reads what follows the row; its lanes past inside_.end are then
      // overwritten or not used. Only the tensor's last elements are read one by one.
      const int64_t reach = horizontal_.start(q + kLanes) + (p_.S - 1) * p_.dilation_w;
      if (kStride != 0 && reach <= x_end_ - row) {
        fold_vector<kStride, false>(row, q, kLanes, values, codes);
      } else {
        fold_vector<kStride, true>(row, q, inside_.end - q, values, codes);
      }
    }
    for (const Edge& edge : edges_) fold_edge(row, edge, values, codes);
  }

  template <int kStride, bool kPartial>
  TORCHCONV_INLINE void fold_vector(const T* row, int64_t q, int64_t n, Lane* values,
                                    Code* codes) const {
    const int64_t start = horizontal_.start(q);
    const T* from = row + start;
    V best = rule_.prepare(load_strided<T, kStride, kPartial>(from, p_.stride_w, n));
    C code = {};
    const Code step = static_cast<Code>(steps_.index ? p_.dilation_w : 1);
    Code at = 0;
    for (int64_t s = 1; s < p_.S; s++) {
      from += p_.dilation_w;
      at += step;
      const V v = rule_.prepare(load_strided<T, kStride, kPartial>(from, p_.stride_w, n));
      Rule::template fold<kCodes>(&best, &code, v, Codes::broadcast(at));
    }
    if (kCodes && steps_.index) {
      const Code stride = static_cast<Code>(p_.stride_w);
      code += Codes::iota() * stride + static_cast<Code>(start);
    }
    Values::store(values + q, best);
    if constexpr (kCodes) Codes::store(codes + q, code);
  }

  void fold_edge(const T* row, const Edge& edge, Lane* values, Code* codes) const {
    const Range taps = edge.taps;
    Lane best = Lane{};
    Code code = 0;
    for (int64_t s = taps.begin; s < taps.end; s++) {
      const int64_t w = horizontal_.start(edge.q) + s * p_.dilation_w;
      const Lane v = rule_.prepare(to_wide<T>(row[w]));
      const Code at = static_cast<Code>(steps_.index ? w : s);
      if (s == taps.begin) {
        best = v;
        code = at;
      } else {
        Rule::template fold<kCodes>(&best, &code, v, at);
      }
    }
    values[edge.q] = best;
    if (kCodes) codes[edge.q] = code;
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

  // A row's last vector spills into the next row, which is written after it, but not past y_end.
  void finish_row(const Batch& batch, const Lane* divisors, T* y, const T* y_end,
                  Code* codes) const {
    for (int64_t q = 0; q < p_.Q; q += kLanes) {
      V best;
      C code{};
      fold_rows(batch, q, &best, &code);
      best = rule_.finish(best, divisors + q);
      if (y_end - (y + q) >= kLanes) {
        W::store(y + q, best);
      } else {
        W::store_partial(y + q, best, p_.Q - q);
      }
      if constexpr (kCodes) Codes::store(codes + q, code);
    }
  }

  const PoolProblem& p_;
  Rule rule_;
  const T* x_;
  T* y_;
  SelectedArray selected_;
  Axis vertical_, horizontal_;
  Range inside_;
  std::vector<Edge> edges_;
  std::vector<Range> valid_rows_;  // of the window of output row p
  CodeSteps steps_;
  const T* x_end_;
  int64_t row_lanes_;  // Q and room for a vector past the last
};

}  // namespace torchconv::cpu
