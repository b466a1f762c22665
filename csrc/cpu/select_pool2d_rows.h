// Max and min pooling's backward in gather form, both layouts: an element of dx visits the outputs
// whose windows contain it and adds the gradients of those that selected it, found by comparing
// their codes with the element's own.
//
// Outputs beyond the end of an output row would need care, but where Q * stride >= W the memory
// there needs none: it holds outputs of the neighbouring rows, which the comparison refuses,
// because the tap that would lead back to this row lies outside the image for them. So rows are
// read in place, except the first and last of the tensor and those of other shapes, which are
// copied between margins. For the same reason stride 1 with as many outputs as inputs has no rows
// at all: the whole tensor is one run, with one tap for each element of the window.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/buffer.h"
#include "cpu/pool2d.h"
#include "cpu/pool2d_backward_rows.h"

namespace torchconv::cpu {

// The taps of rows of dx, one row after another and by phase: of all in one list, because a list
// for each row costs more than the kernel on small planes.
struct SelectionTaps {
  // Element 0 of a phase: how far in memory the output that it may receive from is, and the code
  // that says so.
  struct Tap {
    int64_t distance, code;
  };
  std::vector<Tap> list;
  // Of phase f, counted through the rows: list[first[f]] up to list[first[f + 1]].
  std::vector<size_t> first = {0};

  // Appends row h, whose output rows are `pitch` elements apart: those of a plane, which starts at
  // `origin`, or copies of those that the row needs.
  void list_row(const PoolProblem& p, const RowGeometry& g, int64_t h, int64_t origin,
                int64_t pitch, bool copied);

  // Appends a row that is not used.
  void skip_row(const RowGeometry& g);

  // Of the whole tensor.
  void list_run(const PoolProblem& p, const RowGeometry& g);
};

// Whether the outputs of row h of the plane whose outputs begin at `plane`, read by vectors of
// `lanes`, and their margins lie within the tensor's `total` elements.
bool selection_reads_inside(const RowGeometry& g, int64_t plane, int64_t h, int64_t total,
                            int lanes);

// The taps of a call. As SelectionTaps it is in select_pool2d_backward.cpp, compiled once for all
// element types.
struct SelectionPlan {
  // Copied rows are `copied_pitch` elements long. in_place: rows are read in place where they may
  // be, of `total` elements by vectors of `lanes`.
  SelectionPlan(const PoolProblem& p, const RowGeometry& g, int64_t copied_pitch, bool in_place,
                int64_t total, int lanes);
  ~SelectionPlan();

  SelectionTaps run;          // where the whole tensor is one run, else empty
  SelectionTaps rows;         // of a plane, where any is read in place, else empty
  SelectionTaps copied_rows;  // of a plane; nothing of those that every plane reads in place
};

// kIndex: codes are indices in the image, else offsets of a byte in the window.
template <typename T, bool kIndex>
class SelectionRows {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using Code = LaneInt<T>;
  using Codes = Vec<Code>;
  static constexpr int kLanes = W::kLanes;
  using Given = std::conditional_t<kIndex, int64_t, uint8_t>;
  // In registers. Offsets are read in place, indices converted when they are copied.
  using Held = std::conditional_t<kIndex, Code, uint8_t>;

 public:
  SelectionRows(const PoolProblem& p, const T* dy, const void* selected, T* dx)
      : p_(p),
        dy_(dy),
        selected_(selected),
        dx_(dx),
        g_(p, sizeof(T)),
        total_(p.N * p.C * p.P * p.Q),
        scratch_row_(g_.left + g_.reach(kLanes)),
        rows_in_place_(!kIndex && p.Q * p.stride_w >= std::max(p.W, p.S)),
        plan_(p, g_, scratch_row_, rows_in_place_, total_, kLanes) {
    if constexpr (!kIndex) return;
    for (int64_t phase = 0; phase < std::min(p.stride_w, p.W); phase++) {
      for (int64_t j = 0; j < g_.line_length(kLanes); j++)
        columns_.push_back(static_cast<Code>(j / g_.channels * p.stride_w + phase));
    }
  }

  void run(const Parallel& pool) const {
    const int64_t taps =
        ceil_div(std::min(p_.R, p_.H), p_.stride_h) * ceil_div(std::min(p_.S, p_.W), p_.stride_w);
    const int64_t row_bytes = g_.in_row * static_cast<int64_t>(sizeof(T)) * (taps + 2);
    parallel_for_with_scratch(pool, 0, g_.planes * p_.H, pool_grain(row_bytes),
                              [&](int64_t begin, int64_t end) { rows(begin, end); });
  }

 private:
  using Tap = SelectionTaps::Tap;

  struct Sums {
    const T* values;  // what distances count from
    const Held* codes;
    const Tap* taps;
    const size_t* first;
    const Code* columns;  // kIndex: the column of element j of each phase
    int64_t columns_of_phase;
    Code row_index;  // kIndex: of the row's first element

    template <int n>
    TORCHCONV_INLINE void add(size_t phase, int64_t j, typename W::Type* sum) const {
      typename Codes::Type own[n] = {};
      if constexpr (kIndex) {
        const Code* column = columns + static_cast<int64_t>(phase) * columns_of_phase + j;
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) own[i] = Codes::load(column + i * kLanes) + row_index;
      }
      const Tap* const end = taps + first[phase + 1];
      for (const Tap* t = taps + first[phase]; t != end; t++) {
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
          const int64_t at = t->distance + j + i * kLanes;
          const auto held = Vec<Held, kLanes>::load(codes + at);
          const auto v = W::load(values + at);
          if constexpr (kIndex) {
            sum[i] = add_where_equal<Lane, Held>(sum[i], held, own[i], v);
          } else {
            const auto code = Vec<Held, kLanes>::broadcast(static_cast<Held>(t->code));
            sum[i] = add_where_equal<Lane, Held>(sum[i], held, code, v);
          }
        }
      }
    }

    Lane one(size_t phase, int64_t j) const {
      Lane sum = 0;
      for (const Tap* t = taps + first[phase]; t != taps + first[phase + 1]; t++) {
        const Code own =
            kIndex ? columns[static_cast<int64_t>(phase) * columns_of_phase + j] + row_index
                   : static_cast<Code>(t->code);
        const int64_t at = t->distance + j;
        if (static_cast<Code>(codes[at]) == own) sum += to_wide<T>(values[at]);
      }
      return sum;
    }
  };

  // Copies of output rows between margins that no comparison accepts.
  struct Scratch {
    Scratch(int64_t rows, int64_t row, int64_t line_size)
        : values(rows * row), codes(rows * row), line(line_size) {
      std::fill_n(values.get(), rows * row, T{});
      std::fill_n(codes.get(), rows * row, static_cast<Held>(-1));
    }
    Buffer<T> values;
    Buffer<Held> codes;
    Buffer<T> line;
  };

  // Rows from `begin` on, before `end`, whose run stays inside the tensor.
  int64_t run_rows(int64_t begin, int64_t end) const {
    if (kIndex || plan_.run.list.empty() || begin * g_.in_row + plan_.run.list.front().distance < 0)
      return 0;
    const int64_t last = total_ - kLanes - std::max<int64_t>(plan_.run.list.back().distance, 0);
    return std::max<int64_t>(0, std::min(end, floor_div(last, g_.in_row)) - begin);
  }

  // Input rows [begin, end) of the planes * H.
  void rows(int64_t begin, int64_t end) const {
    const Scratch scratch(std::min(p_.P, outputs_spanned(g_.vertical)), scratch_row_,
                          g_.line_size(kLanes));
    for (int64_t i = begin; i < end;) {
      T* to = dx_ + i * g_.in_row;
      const int64_t run = run_rows(i, end);
      if (run > 0) {
        write_run(sums(dy_ + i * g_.in_row, offsets(i * g_.in_row), plan_.run, 0, 0), 0,
                  run * g_.in_row, g_.streams, to);
        i += run;
        continue;
      }
      const int64_t h = i % p_.H, plane = i / p_.H * p_.P * g_.out_row;
      const bool in_place = reads_in_place(plane, h);
      if (!in_place) copy_outputs(plane, h, scratch);
      const SelectionTaps& taps = in_place ? plan_.rows : plan_.copied_rows;
      const T* values = in_place ? dy_ + plane : scratch.values.get();
      const Held* codes = in_place ? offsets(plane) : scratch.codes.get();
      write_row(g_, sums(values, codes, taps, h * g_.phase_count(), h), scratch.line.get(), to);
      i++;
    }
    if (g_.streams) stream_fence();
  }

  // Of row h, whose phases in `taps` begin with first_phase.
  Sums sums(const T* values, const Held* codes, const SelectionTaps& taps, int64_t first_phase,
            int64_t h) const {
    return {values,
            codes,
            taps.list.data(),
            taps.first.data() + first_phase,
            columns_.data(),
            g_.line_length(kLanes),
            static_cast<Code>(kIndex ? h * p_.W : 0)};
  }

  const Held* offsets(int64_t from) const { return static_cast<const Held*>(selected_) + from; }

  bool reads_in_place(int64_t plane, int64_t h) const {
    return rows_in_place_ && selection_reads_inside(g_, plane, h, total_, kLanes);
  }

  void copy_outputs(int64_t plane, int64_t h, const Scratch& scratch) const {
    int64_t to = g_.left;
    for (const Contribution* w = g_.windows.begin(h); w != g_.windows.end(h); w++) {
      const int64_t from = plane + w->output * g_.out_row;
      std::copy_n(dy_ + from, g_.out_row, scratch.values.get() + to);
      convert_run(static_cast<const Given*>(selected_) + from, g_.out_row,
                  scratch.codes.get() + to);
      to += scratch_row_;
    }
  }

  const PoolProblem& p_;
  const T* dy_;
  const void* selected_;
  T* dx_;
  RowGeometry g_;
  int64_t total_;        // elements of dy
  int64_t scratch_row_;  // elements of a copied row with its margins
  bool rows_in_place_;
  SelectionPlan plan_;
  std::vector<Code> columns_;
};

}  // namespace torchconv::cpu
