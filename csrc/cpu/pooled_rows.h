// The results of a row of outputs of a plane (NCHW), as the kernels of planes store them: vectors
// along the row, the last of which spills into the row that is written after it, and selections.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/buffer.h"
#include "cpu/pool2d_rules.h"

namespace torchconv::cpu {

template <typename Rule, bool kCodes>
class PooledRows {
  using T = typename Rule::Element;
  using W = WideVec<T>;
  using Lane = typename Rule::Lane;
  using Code = typename Rule::Code;
  using V = typename Rule::V;
  using C = typename Rule::C;
  using Codes = Vec<Code>;
  static constexpr int kLanes = Rule::kLanes;

 public:
  PooledRows(const PoolProblem& p, Rule rule, T* y, SelectedArray selected)
      : p_(p),
        rule_(rule),
        y_(y),
        selected_(selected),
        steps_(CodeSteps::choose<Code>(p, selected.kind)),
        streams_(W::streams(y, p.N * p.C * p.P * p.Q, p.Q)),
        empty_(horizontal_axis(p).outputs_without_taps()) {}

  // Codes of whole output rows that are not stored yet, with room for a vector past the last.
  struct CodeBuffer {
    explicit CodeBuffer(int64_t row)
        : capacity(std::max<int64_t>(row, 2048)), data(kCodes ? capacity + kLanes : 0) {}
    Code* end() const { return kCodes ? data.get() + held : nullptr; }
    int64_t capacity;
    Buffer<Code> data;
    int64_t held = 0;
  };

  // Whether codes are indices in the image.
  bool index() const { return steps_.index; }
  // Whether stores go past the caches: stream_fence() after a thread's last.
  bool streams() const { return streams_; }

  T* row(int64_t i) const { return y_ + i * p_.Q; }

  // Makes room for the codes of output row i of the N * C * P, and gives it.
  Code* codes_of(int64_t i, CodeBuffer* codes) const {
    if (!kCodes || selected_.direct()) return nullptr;
    if (codes->held + p_.Q > codes->capacity) flush(i, codes);
    Code* const end = codes->end();
    codes->held += p_.Q;
    return end;
  }

  // From the first tap's column to the image's: indices only.
  TORCHCONV_INLINE void finish_codes(int64_t q, C* code) const {
    if (kCodes && steps_.index) {
      *code += Codes::iota() * static_cast<Code>(p_.stride_w) +
               static_cast<Code>(horizontal_axis(p_).start(q));
    }
  }

  // A row's last vector spills into the next row, which is written after it, but not past y_end.
  TORCHCONV_INLINE void store(V best, C code, int64_t q, const Lane* divisors, T* y, const T* y_end,
                              Code* codes) const {
    best = rule_.finish(best, divisors + q);
    if (y_end - (y + q) >= kLanes) {
      W::store(y + q, best, streams_);
    } else {
      W::store_partial(y + q, best, p_.Q - q);
    }
    if constexpr (kCodes) {
      if (selected_.direct()) {
        const int64_t n = y_end - (y + q) >= kLanes ? kLanes : p_.Q - q;
        selected_.template store_bytes<Code>(y + q - y_, code, n);
      } else {
        Codes::store(codes + q, code);
      }
    }
  }

  // The outputs of the row y that have no column in the image: after the others.
  void empty_outputs(T* y, Code* codes) const {
    for (const int64_t q : empty_) none(q, y, codes);
  }
  // An output row with no element in the image.
  void empty_row(T* y, Code* codes) const {
    for (int64_t q = 0; q < p_.Q; q++) none(q, y, codes);
  }

  // Stores the codes of the output rows before row `end`, and empties the buffer.
  void flush(int64_t end, CodeBuffer* codes) const {
    if (codes->held == 0) return;
    const int64_t position = end * p_.Q - codes->held;
    selected_.store(position, codes->data.get(), codes->held);
    if (steps_.finish) {
      int64_t* indices = static_cast<int64_t*>(selected_.data);
      for (int64_t i = position; i < end * p_.Q; i++)
        indices[i] = index_from_offset(p_, indices[i], i / p_.Q % p_.P, i % p_.Q);
    }
    codes->held = 0;
  }

 private:
  void none(int64_t q, T* y, Code* codes) const {
    y[q] = from_wide<T>(rule_.none());
    if (kCodes && selected_.direct()) {
      selected_.bytes()[y + q - y_] = kNoOffset<uint8_t>;
    } else if (kCodes) {
      codes[q] = -1;
    }
  }

  const PoolProblem& p_;
  Rule rule_;
  T* y_;
  SelectedArray selected_;
  CodeSteps steps_;
  bool streams_;
  std::vector<int64_t> empty_;  // outputs with no tap in the image
};

}  // namespace torchconv::cpu
