// Max, min and average pooling of planes (NCHW): each input row is folded along W once, with
// vectors over the outputs of the row, and the folded rows of a window are then folded along H.
//
// A folded row is kept for the next output rows whose windows also contain it, so an output costs
// R + S steps, not R * S. Outputs whose window reaches into the padding are folded apart, element
// by element; an output row's tail repeats part of its last full vector.
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
  PoolPlanes(const PoolProblem& p, const T* x, T* y, SelectedArray selected)
      : p_(p),
        x_(x),
        y_(y),
        selected_(selected),
        vertical_(vertical_axis(p)),
        horizontal_(horizontal_axis(p)),
        inside_(horizontal_.interior()),
        dead_(horizontal_.dead_outputs()),
        steps_(CodeSteps::choose<Code>(p, selected.kind)),
        row_lanes_(ceil_div(p.Q, kLanes) * kLanes) {}

  void run(const Parallel& pool) {
    const int64_t row_bytes = (std::min(p_.stride_h, p_.H) * p_.W +
                               p_.Q * (std::min(p_.R, p_.H) + std::min(p_.S, p_.W))) *
                              static_cast<int64_t>(sizeof(T));
    parallel_for_with_scratch(pool, 0, p_.N * p_.C * p_.P, pool_grain(row_bytes),
                              [&](int64_t begin, int64_t end) { rows(begin, end); });
  }

 private:
  static constexpr int64_t kBatch = 16;  // rows folded at once along H

  struct Scratch {
    Scratch(int64_t rows, int64_t lanes)
        : lanes(lanes), values(rows * lanes), codes(kCodes ? rows * lanes : 0) {}
    Lane* value_row(int64_t i) const { return values.get() + i * lanes; }
    Code* code_row(int64_t i) const { return kCodes ? codes.get() + i * lanes : nullptr; }
    int64_t lanes;
    Buffer<Lane> values;
    Buffer<Code> codes;
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
    const int64_t slots = kept > 0 ? kept : std::min(kBatch, p_.R);
    Divisors divisors(p_, vertical_, horizontal_, row_lanes_);
    const Scratch folded(slots + 1, row_lanes_);  // the last row: a window's earlier batches
    int64_t plane = -1;
    for (int64_t i = begin; i < end; i++) {
      const int64_t out_p = i % p_.P;
      if (i / p_.P != plane) {
        plane = i / p_.P;
        ring.clear();
      }
      output_row(plane, out_p, &ring, folded, slots, &divisors);
    }
  }

  void output_row(int64_t plane, int64_t out_p, RowRing* ring, const Scratch& folded, int64_t slots,
                  Divisors* divisors) const {
    const int64_t out = (plane * p_.P + out_p) * p_.Q;
    const Range taps = vertical_.valid_taps(out_p);
    if (taps.empty()) {
      for (int64_t q = 0; q < p_.Q; q++) none(out + q);
      return;
    }
    Batch batch;
    for (int64_t r = taps.begin; r < taps.end; r++) {
      const int64_t h = vertical_.start(out_p) + r * p_.dilation_h;
      const int64_t slot = ring->keeps() ? ring->slot(h) : batch.count;
      Lane* values = folded.value_row(slot);
      Code* codes = folded.code_row(slot);
      if (!ring->keeps() || ring->claim(h)) {
        const T* row = x_ + (plane * p_.H + h) * p_.W;
        if (p_.stride_w == 1) {
          fold_row<1>(row, values, codes);
        } else if (p_.stride_w == 2) {
          fold_row<2>(row, values, codes);
        } else {
          fold_row<0>(row, values, codes);
        }
      }
      batch.push(values, codes, steps_.index ? h * p_.W : r * p_.S);
      if (batch.count == (ring->keeps() ? kBatch : slots) && r + 1 < taps.end) {
        fold_batch_to_scratch(batch, folded.value_row(slots), folded.code_row(slots));
        batch = Batch();
        batch.push(folded.value_row(slots), folded.code_row(slots), 0);
      }
    }
    fold_batch_to_output(batch, divisors->at(out_p), out);
    for (const int64_t q : dead_) none(out + q);
    if (kCodes && steps_.finish) finish(plane, out_p);
  }

  void none(int64_t position) const {
    y_[position] = from_wide<T>(Rule::none());
    if (kCodes) selected_.store_none(position);
  }

  void finish(int64_t plane, int64_t out_p) const {
    int64_t* row = static_cast<int64_t*>(selected_.data) + (plane * p_.P + out_p) * p_.Q;
    for (int64_t q = 0; q < p_.Q; q++) row[q] = index_from_offset(p_, row[q], out_p, q);
  }

  // Along W: values[q] and codes[q] of the row for every output q.
  template <int kStride>
  void fold_row(const T* row, Lane* values, Code* codes) const {
    for (int64_t q = 0; q < inside_.begin; q++) fold_one(row, q, values, codes);
    int64_t q = inside_.begin;
    for (; q + kLanes < inside_.end; q += kLanes)
      fold_vector<kStride, false>(row, q, kLanes, values, codes);
    if (q < inside_.end) fold_vector<kStride, true>(row, q, inside_.end - q, values, codes);
    for (q = inside_.end; q < p_.Q; q++) fold_one(row, q, values, codes);
  }

  template <int kStride, bool kPartial>
  TORCHCONV_INLINE void fold_vector(const T* row, int64_t q, int64_t n, Lane* values,
                                    Code* codes) const {
    const int64_t start = horizontal_.start(q);
    const T* from = row + start;
    V best = Rule::prepare(load_strided<T, kStride, kPartial>(from, p_.stride_w, n));
    C code = {};
    const Code step = static_cast<Code>(steps_.index ? p_.dilation_w : 1);
    Code at = 0;
    for (int64_t s = 1; s < p_.S; s++) {
      from += p_.dilation_w;
      at += step;
      const V v = Rule::prepare(load_strided<T, kStride, kPartial>(from, p_.stride_w, n));
      Rule::template fold<kCodes>(&best, &code, v, Codes::broadcast(at));
    }
    if (kCodes && steps_.index) {
      const Code stride = static_cast<Code>(p_.stride_w);
      code += Codes::iota() * stride + static_cast<Code>(start);
    }
    if constexpr (kPartial) {
      Values::store_partial(values + q, best, n);
      if constexpr (kCodes) Codes::store_partial(codes + q, code, n);
    } else {
      Values::store(values + q, best);
      if constexpr (kCodes) Codes::store(codes + q, code);
    }
  }

  // An output whose window reaches into the padding.
  void fold_one(const T* row, int64_t q, Lane* values, Code* codes) const {
    const Range taps = horizontal_.valid_taps(q);
    Lane best = Lane{};
    Code code = 0;
    for (int64_t s = taps.begin; s < taps.end; s++) {
      const int64_t w = horizontal_.start(q) + s * p_.dilation_w;
      const Lane v = Rule::prepare(to_wide<T>(row[w]));
      const Code at = static_cast<Code>(steps_.index ? w : s);
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

  void fold_batch_to_scratch(const Batch& batch, Lane* values, Code* codes) const {
    for (int64_t q = 0; q < p_.Q; q += kLanes) {
      V best;
      C code{};
      fold_rows(batch, q, &best, &code);
      Values::store(values + q, best);
      if constexpr (kCodes) Codes::store(codes + q, code);
    }
  }

  void fold_batch_to_output(const Batch& batch, const Lane* divisors, int64_t out) const {
    for (int64_t q = 0; q < p_.Q; q += kLanes) {
      V best;
      C code{};
      fold_rows(batch, q, &best, &code);
      best = Rule::finish(best, divisors + q);
      if (q + kLanes <= p_.Q) {
        W::store(y_ + out + q, best);
        if constexpr (kCodes) selected_.template store<Code, false>(out + q, code, kLanes);
      } else {
        W::store_partial(y_ + out + q, best, p_.Q - q);
        if constexpr (kCodes) selected_.template store<Code, true>(out + q, code, p_.Q - q);
      }
    }
  }

  const PoolProblem& p_;
  const T* x_;
  T* y_;
  SelectedArray selected_;
  Axis vertical_, horizontal_;
  Range inside_;
  std::vector<int64_t> dead_;
  CodeSteps steps_;
  int64_t row_lanes_;  // Q rounded up to whole vectors
};

}  // namespace torchconv::cpu
