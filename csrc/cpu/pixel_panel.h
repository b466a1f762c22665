// Panels [c][t][vector] of pixels from a source whose pixels are contiguous: im2col on the fly, one
// cache-sized panel at a time (Chetlur et al., "cuDNN", 2014, section 3). What a panel needs of the
// source is planned once, as a list of copies with bounds worked out, and the plan then runs for
// every channel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/conv_pack.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// A run of the grid's pixels in one row of a sample, as columns [lane, lane + count) of a panel.
struct PixelRun {
  int64_t n, i, j, lane, count;
};

// The runs of `count` pixels from index `first` of all samples' pixels; returns how many.
inline int64_t pixel_runs(const ConvView& view, int64_t first, int64_t count, PixelRun* runs) {
  int64_t found = 0, row = first / view.J, j = first % view.J;
  int64_t n = row / view.I, i = row % view.I;
  for (int64_t lane = 0; lane < count;) {
    const int64_t length = std::min(view.J - j, count - lane);
    runs[found++] = {n, i, j, lane, length};
    lane += length;
    j = 0;
    if (++i == view.I) {
      i = 0;
      ++n;
    }
  }
  return found;
}
inline int64_t max_pixel_runs(int64_t count, int64_t J) { return std::min(count, count / J + 2); }

// Lanes [begin, end) of a vector of panels.
struct LaneCopy {
  int64_t src;  // of lane begin
  int64_t dst;
  int32_t begin, end;
  bool last;         // of its vector
  bool more_follow;  // the run goes on past its last lane
};

// The copies that fill a panel at dst for each tap of the block.
template <typename A>
int64_t plan_pixel_panel(const ConvView& view, const ReductionBlock& block, const PixelRun* runs,
                         int64_t run_count, int64_t vectors, int64_t dst, LaneCopy* plan) {
  constexpr int64_t kL = kLanes<A>;
  int64_t size = 0;
  for (int64_t t = 0; t < block.tn; ++t) {
    const ConvTap& tap = view.taps[block.t0 + t];
    int64_t r = 0;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t start = size, to = dst + t * kPanel<A> + v * kL;
      for (;; ++r) {
        if (r == run_count || runs[r].lane >= (v + 1) * kL) break;
        const PixelRun& run = runs[r];
        const int64_t h = run.i * view.step_h + tap.h;
        if (h >= 0 && h < view.H) {
          const int64_t w = run.j * view.step_w + tap.w;
          const Range range = valid_range(run.count, view.step_w, w, view.W);
          const int64_t begin = std::max(run.lane + range.begin - v * kL, int64_t{0});
          const int64_t end = std::min(run.lane + range.end - v * kL, kL);
          if (begin < end)
            plan[size++] = {run.n * view.src.n + h * view.src.row + w +
                                (begin + v * kL - run.lane) * view.step_w,
                            to,
                            static_cast<int32_t>(begin),
                            static_cast<int32_t>(end),
                            false,
                            run.lane + range.end - v * kL > end};
        }
        if (run.lane + run.count > (v + 1) * kL) break;  // goes on in the next vector
      }
      if (size == start) plan[size++] = {0, to, 0, 0, false, false};
      plan[size - 1].last = true;
    }
  }
  return size;
}

// Most copies that the plan of a panel can hold.
inline int64_t max_pixel_plan(int64_t taps, int64_t vectors, int64_t runs) {
  return taps * (2 * vectors + runs);
}

// Whether the columns of a run are so few, or so far apart, that they are copied one by one: a
// vector of several runs is else put together from as many loads with masks.
inline bool copies_lanes(const ConvView& view) {
  constexpr int64_t kFewColumns = 4, kFewStridedColumns = 8;
  return view.step_w > 2 || view.J <= (view.step_w == 2 ? kFewStridedColumns : kFewColumns);
}

// pack_pixel_panels, lane by lane. Not through a vector in memory, whose load would wait for all of
// its lanes' stores.
template <typename T>
void pack_lanes(const ConvView& view, const ReductionBlock& block, const T* src,
                const LaneCopy* plan, int64_t plan_size, Wide<T>* panels) {
  using R = typename WideVec<T>::Registers;
  for (int64_t c = 0; c < block.cn; ++c) {
    bool first = true;
    for (const LaneCopy* copy = plan; copy != plan + plan_size; ++copy) {
      Wide<T>* const to = panels + copy->dst;
      if (first) R::store(to, typename R::Type{});
      const T* from = src + copy->src;
      for (int32_t lane = copy->begin; lane < copy->end; ++lane, from += view.step_w)
        to[lane] = to_wide<T>(*from);
      first = copy->last;
    }
    src += view.src.c;
    panels += block.tn * kPanel<Wide<T>>;
  }
}

// Runs a plan for each channel of the block. src is at its first; channels of panels are
// [tn][kPanel] apart.
template <typename T>
void pack_pixel_panels(const ConvView& view, const ReductionBlock& block, const T* src,
                       const LaneCopy* plan, int64_t plan_size, Wide<T>* panels) {
  using V = WideVec<T>;
  if (copies_lanes(view)) return pack_lanes(view, block, src, plan, plan_size, panels);
  for (int64_t c = 0; c < block.cn; ++c) {
    auto sum = typename V::Type{};
    for (int64_t i = 0; i < plan_size; ++i) {
      const LaneCopy& copy = plan[i];
      if (view.step_w == 2)
        sum += load_lanes_strided(src + copy.src, 2, copy.begin, copy.end, copy.more_follow);
      else if (copy.begin == 0 && copy.end == V::kLanes)
        sum = V::load(src + copy.src);
      else
        sum += load_lanes(src + copy.src - copy.begin, copy.begin, copy.end);
      if (copy.last) {
        V::Registers::store(panels + copy.dst, sum);
        sum = typename V::Type{};
      }
    }
    src += view.src.c;
    panels += block.tn * kPanel<Wide<T>>;
  }
}

}  // namespace torchconv::cpu
