// Pooling's backward on planes (NCHW), with vectors over the columns of one phase of the stride.
//
// The output rows that an input row receives from are widened once into rows with zero margins, so
// that every tap is a shifted load with no edges; they are kept while following input rows need
// them. Maximum and minimum compare the selected codes with the tap's own and add where they are
// equal. The average first sums its output rows, then adds shifted copies of the sum.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/buffer.h"
#include "cpu/avg_pool2d.h"
#include "cpu/pool2d.h"
#include "cpu/pool2d_backward.h"
#include "cpu/pool_simd.h"
#include "cpu/pool_window.h"

namespace torchconv::cpu {

// What a tap is compared with: nothing, the offset in the window, or the index in the image.
enum class Match : uint8_t { kAll, kOffset, kIndex };

template <typename T, Match kMatch>
class PlanesBackward {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using Code = LaneInt<T>;
  using Values = Vec<Lane>;
  using Codes = Vec<Code>;
  using V = typename Values::Type;
  using C = typename Codes::Type;
  static constexpr int kLanes = W::kLanes;
  static constexpr bool kAverage = kMatch == Match::kAll;
  using Divisors = std::conditional_t<kAverage, DivisorRow<Lane>, NoDivisors>;

 public:
  PlanesBackward(const PoolProblem& p, const T* dy, Selected kind, const void* selected, T* dx)
      : p_(p),
        dy_(dy),
        kind_(kind),
        selected_(selected),
        dx_(dx),
        vertical_(vertical_axis(p)),
        horizontal_(horizontal_axis(p)),
        windows_(vertical_),
        columns_(horizontal_),
        phases_(horizontal_),
        left_(ceil_div(phases_.left, kLanes) * kLanes),
        lanes_(left_ + ceil_div(p.Q + phases_.right, kLanes) * kLanes + 2 * kLanes) {}

  void run(const Parallel& pool) const {
    const int64_t taps = ceil_div(std::min(p_.R, p_.H), p_.stride_h) * std::min(p_.S, p_.W);
    const int64_t row_bytes = p_.W * static_cast<int64_t>(sizeof(T)) * (kAverage ? 4 : taps + 2);
    parallel_for_with_scratch(pool, 0, p_.N * p_.C * p_.H, pool_grain(row_bytes),
                              [&](int64_t begin, int64_t end) { rows(begin, end); });
  }

 private:
  // An output row in scratch memory and the tap that it contributes through.
  struct Source {
    const Lane* values;
    const Code* codes;
    int64_t tap;
  };

  struct Scratch {
    Scratch(int64_t slots, int64_t lanes, int64_t width)
        : lanes(lanes), values(slots * lanes), codes(kAverage ? 0 : slots * lanes), line(width) {
      std::fill_n(values.get(), slots * lanes, Lane{0});
      if (!kAverage) std::fill_n(codes.get(), slots * lanes, Code{-1});
    }
    Lane* value_row(int64_t i) const { return values.get() + i * lanes; }
    Code* code_row(int64_t i) const { return kAverage ? nullptr : codes.get() + i * lanes; }
    int64_t lanes;
    Buffer<Lane> values;
    Buffer<Code> codes;
    Buffer<Lane> line;  // gather_strided_row's row of dx
  };

  // Input rows [begin, end) of the N * C * H.
  void rows(int64_t begin, int64_t end) const {
    const int64_t row_bytes = lanes_ * static_cast<int64_t>(sizeof(Lane) + sizeof(Code));
    const int64_t kept = RowRing::slots_to_keep(outputs_spanned(vertical_), 0, row_bytes);
    const int64_t slots = kept > 0 ? kept : std::min(p_.P, p_.R);
    RowRing ring(kept);
    const Scratch scratch(slots + 1, lanes_, p_.W + kLanes);
    Divisors divisors(p_, vertical_, horizontal_, p_.Q + kLanes);
    std::vector<Source> sources;
    int64_t plane = begin / p_.H, h = begin % p_.H;
    for (int64_t i = begin; i < end; i++, h++) {
      if (h == p_.H) {
        h = 0;
        plane++;
        ring.clear();
      }
      T* row = dx_ + i * p_.W;
      if (kAverage && i > begin && h > 0 && windows_.same_outputs(h, h - 1)) {
        std::copy_n(row - p_.W, p_.W, row);
        continue;
      }
      sources.clear();
      for (const Contribution* window = windows_.begin(h); window != windows_.end(h); window++) {
        const int64_t slot =
            ring.keeps() ? ring.slot(window->output) : static_cast<int64_t>(sources.size());
        Lane* values = scratch.value_row(slot) + left_;
        Code* codes = kAverage ? nullptr : scratch.code_row(slot) + left_;
        if (!ring.keeps() || ring.claim(window->output))
          fill(plane, window->output, &divisors, values, codes);
        sources.push_back({values, codes, window->tap});
      }
      if (kAverage) sum_rows(&sources, scratch.value_row(slots) + left_);
      gather_row(sources, h, scratch.line.get(), row);
    }
  }

  // Output row out_p, widened: gradients over their divisors, or gradients and codes.
  void fill(int64_t plane, int64_t out_p, Divisors* divisors, Lane* values, Code* codes) const {
    const int64_t out = (plane * p_.P + out_p) * p_.Q;
    const Lane* divisor = divisors->at(out_p);
    int64_t q = 0;
    for (; q + kLanes <= p_.Q; q += kLanes) {
      V v = W::load(dy_ + out + q);
      if constexpr (kAverage) v /= Values::load(divisor + q);
      Values::store(values + q, v);
    }
    if (q < p_.Q) {
      V v = W::load_partial(dy_ + out + q, p_.Q - q);
      if constexpr (kAverage) v /= Values::load(divisor + q);
      Values::store_partial(values + q, v, p_.Q - q);
    }
    if constexpr (!kAverage) {
      switch (kind_) {
        case Selected::kOffset8:
          return fill_codes(static_cast<const uint8_t*>(selected_) + out, codes);
        case Selected::kOffset16:
          return fill_codes(static_cast<const uint16_t*>(selected_) + out, codes);
        case Selected::kOffset32:
          return fill_codes(static_cast<const int32_t*>(selected_) + out, codes);
        case Selected::kIndex64:
          break;
      }
      const int64_t* indices = static_cast<const int64_t*>(selected_) + out;
      if (kMatch == Match::kIndex) return fill_codes(indices, codes);
      for (q = 0; q < p_.Q; q++)
        codes[q] = static_cast<Code>(offset_from_index(indices[q], out_p, q));
    }
  }

  template <typename O>
  void fill_codes(const O* from, Code* codes) const {
    int64_t q = 0;
    for (; q + kLanes <= p_.Q; q += kLanes)
      Codes::store(codes + q, convert<Code, O, kLanes>(Vec<O, kLanes>::load(from + q)));
    for (; q < p_.Q; q++) codes[q] = static_cast<Code>(from[q]);
  }

  int64_t offset_from_index(int64_t index, int64_t out_p, int64_t q) const {
    if (index < 0 || index >= p_.H * p_.W) return -1;
    const int64_t h = index / p_.W - vertical_.start(out_p);
    const int64_t w = index % p_.W - horizontal_.start(q);
    return h / p_.dilation_h * p_.S + w / p_.dilation_w;
  }

  // The sum of the output rows takes their place.
  void sum_rows(std::vector<Source>* sources, Lane* sum) const {
    for (int64_t q = 0; q < p_.Q; q += kLanes) {
      V total{};
      for (const Source& source : *sources) total += Values::load(source.values + q);
      Values::store(sum + q, total);
    }
    sources->assign(1, Source{sum, nullptr, 0});
  }

  void gather_row(const std::vector<Source>& sources, int64_t h, Lane* line, T* row) const {
    if (p_.stride_w == 1) {
      for (int64_t i = 0; i < p_.W; i += kLanes) store(row, i, gather(sources, h, 0, i));
    } else if (p_.stride_w == 2 && p_.W > 1) {
      for (int64_t i = 0; i < phases_.columns; i += kLanes) {
        V low, high;
        interleave<Lane>(gather(sources, h, 0, i), gather(sources, h, 1, i), &low, &high);
        store(row, 2 * i, low);
        if (2 * i + kLanes < p_.W) store(row, 2 * i + kLanes, high);
      }
    } else {
      gather_strided_row(sources, h, line, row);
    }
  }

  // Element by element, for strides without a vector form.
  void gather_strided_row(const std::vector<Source>& sources, int64_t h, Lane* line, T* row) const {
    for (int64_t w = 0; w < p_.W; w++) {
      Lane sum = 0;
      for (const Source& source : sources) {
        for (const Contribution* t = columns_.begin(w); t != columns_.end(w); t++) {
          const Lane v = source.values[t->output];
          if constexpr (kAverage) {
            sum += v;
          } else {
            const int64_t wanted =
                kMatch == Match::kIndex ? h * p_.W + w : source.tap * p_.S + t->tap;
            if (source.codes[t->output] == static_cast<Code>(wanted)) sum += v;
          }
        }
      }
      line[w] = sum;
    }
    for (int64_t w = 0; w < p_.W; w += kLanes) store(row, w, Values::load(line + w));
  }

  TORCHCONV_INLINE void store(T* row, int64_t w, V v) const {
    if (w + kLanes <= p_.W) {
      W::store(row + w, v);
    } else {
      W::store_partial(row + w, v, p_.W - w);
    }
  }

  // dx at columns (i + lane) * stride + phase.
  TORCHCONV_INLINE V gather(const std::vector<Source>& sources, int64_t h, int phase,
                            int64_t i) const {
    V sum{};
    const Contribution* first = phases_.begin(static_cast<size_t>(phase));
    const Contribution* last = phases_.end(static_cast<size_t>(phase));
    C own{};
    if constexpr (kMatch == Match::kIndex) {
      own = (Codes::iota() + static_cast<Code>(i)) * static_cast<Code>(p_.stride_w) +
            static_cast<Code>(h * p_.W + phase);
    }
    for (const Source& source : sources) {
      for (const Contribution* t = first; t != last; t++) {
        const int64_t q = i + t->output;
        const V v = Values::load(source.values + q);
        if constexpr (kAverage) {
          sum += v;
        } else {
          const C wanted = kMatch == Match::kIndex
                               ? own
                               : Codes::broadcast(static_cast<Code>(source.tap * p_.S + t->tap));
          sum += Codes::load(source.codes + q) == wanted ? v : V{};
        }
      }
    }
    return sum;
  }

  const PoolProblem& p_;
  const T* dy_;
  Selected kind_;
  const void* selected_;
  T* dx_;
  Axis vertical_, horizontal_;
  Contributions windows_, columns_;
  Phases phases_;
  int64_t left_;   // lanes before output 0 in a scratch row
  int64_t lanes_;  // of a scratch row
};

}  // namespace torchconv::cpu
