// The order of a task's pixels and terms, see direct_tasks.h.
#include "cpu/direct_tasks.h"

#include <algorithm>
#include <limits>

#include "cpu/parallel_range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

// See kDepth; a reduction in place has no panel that must fit the first-level cache.
constexpr int64_t kTermsInRegisters = 256;
// The sums are rounded to fewer bits than any number of pairs would lose.
constexpr int64_t kPairsInRegisters = 1024;
// The tasks of one call should be enough for several threads when it is large, and then have so
// many panels each.
constexpr int64_t kTasksWanted = 16, kPanelsEnough = 4;
// Of a task that is worth a thread.
constexpr double kEnoughOperations = 1e12;
// From so many pixels on a tile is as fast as a full one.
constexpr int64_t kTileEnough = ceil_div(kMaxRows, 2);

// Units of filters of the busiest of some threads, if those of each of `blocks` of pixels are cut
// in so many pieces. See WorkSplit for the runs of tasks that threads get.
int64_t most_units(int64_t blocks, int64_t units, int64_t pieces, int64_t threads) {
  const int64_t tasks = blocks * pieces;
  const int64_t slots = WorkSplit(tasks, kEnoughOperations).slots;
  const int64_t share = ceil_div(slots, threads);
  const auto before = [&](int64_t slot) {
    const int64_t task = std::min(slot, slots) * tasks / slots;
    return task / pieces * units + task % pieces * units / pieces;
  };
  int64_t most = 0;
  for (int64_t slot = 0; slot < slots; slot += share)
    most = std::max(most, before(slot + share) - before(slot));
  return most;
}

// In how many pieces to cut the units of filters: as two and four threads have them most evenly, of
// such numbers the largest that leaves a piece `enough`, or else the smallest.
int64_t pieces_of(int64_t blocks, int64_t units, int64_t enough) {
  const int64_t most = std::min(ceil_div(kTasksWanted, blocks), units);
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t pieces = 1; pieces <= most; ++pieces) {
    const int64_t cost =
        most_units(blocks, units, pieces, 2) * 2 + most_units(blocks, units, pieces, 4) * 4;
    if (cost < least || (cost == least && units >= enough * pieces)) {
      least = cost;
      best = pieces;
    }
  }
  return best;
}

// Whether one of two threads has no more to do by a last panel that joins one of so many whole
// ones.
bool joins_evenly(int64_t blocks, int64_t whole_panels) {
  return whole_panels > 0 && (blocks % 2 == 0 || whole_panels % 2 == 0);
}

// Filters that stay together, of which threads take whole numbers: a panel, or where tasks may
// `cut` it less. A vector where two threads would share an odd number of panels, and half of one
// where the last panel is at most half full, as of 112 filters, of which each thread then takes 56.
int64_t unit_of(int64_t blocks, int64_t filters, int64_t panel, int64_t cut) {
  const int64_t panels = ceil_div(filters, panel), left = panels * panel - filters;
  if (cut < panel && blocks * panels % 2 == 1) return panel / kMaxVectors;
  const bool halves = cut < panel / kMaxVectors && blocks % 2 == 1 && panels > 1;
  return halves && 2 * left >= panel ? cut : panel;
}

Range block(int64_t index, int64_t size, int64_t total) {
  return {index * size, std::min((index + 1) * size, total)};
}

}  // namespace

void fill_steps(int64_t* to, int64_t n, int64_t first, int64_t step) {
  using V = Vec<int64_t>;
  int64_t l = 0;
  V::Type v = V::iota() * step + first;
  for (; l + V::kLanes <= n; l += V::kLanes, v += V::kLanes * step) V::store(to + l, v);
  for (; l < n; ++l) to[l] = first + l * step;
}

DirectTasks::DirectTasks(const ConvView& view, const DirectPlan& plan, const DirectSource& source,
                         int64_t panel, int64_t cut, bool joins)
    : view_(view),
      plan_(plan),
      source_(source),
      taps_(static_cast<int64_t>(view.taps.size())),
      blocks_i_(ceil_div(view.I, plan.rows)),
      blocks_j_(ceil_div(view.J, plan.columns)),
      blocks_n_(ceil_div(view.N, plan.samples)),
      unit_(unit_of(blocks() * view.groups, view.K, panel, cut)),
      units_(joins && unit_ == panel && joins_evenly(blocks() * view.groups, view.K / panel)
                 ? view.K / panel
                 : ceil_div(view.K, unit_)),
      filter_pieces_(pieces_of(blocks() * view.groups, units_, kPanelsEnough * panel / unit_)),
      filters_((ceil_div(units_, filter_pieces_) + (units_ * unit_ < view.K ? 1 : 0)) * unit_) {
  const int64_t terms = plan.channels * taps_;
  const auto tables = std::make_shared<Tables>(Tables{Buffer<int32_t>(2 * terms), {}, {}, {}});
  group_pixels(tables.get());
  if (view.terms() > 0) {
    fill_terms(plan.channels, tables->terms.get());
    fill_terms(plan.chunk_channels(view, plan.chunks - 1), tables->terms.get() + terms);
  }
  tables_ = tables;
}

Range DirectTasks::filters_of(int64_t piece) const {
  return {piece * units_ / filter_pieces_ * unit_,
          piece + 1 == filter_pieces_ ? view_.K : (piece + 1) * units_ / filter_pieces_ * unit_};
}

std::vector<int64_t> DirectTasks::cuts() const {
  std::vector<int64_t> first;
  for (int64_t piece = 0; piece < filter_pieces_; ++piece) first.push_back(filters_of(piece).begin);
  return first;
}

DirectPosition DirectTasks::position(int64_t task) const {
  DirectPosition at;
  at.k = filters_of(task % filter_pieces_);
  task /= filter_pieces_;
  at.j = block(task % blocks_j_, plan_.columns, view_.J);
  task /= blocks_j_;
  at.i = block(task % blocks_i_, plan_.rows, view_.I);
  task /= blocks_i_;
  at.g = task % view_.groups;
  at.n = block(task / view_.groups, plan_.samples, view_.N);
  return at;
}

bool DirectTasks::same_pixels(const DirectPosition& a, const DirectPosition& b) {
  return a.n.size() == b.n.size() && a.i.begin == b.i.begin && a.j.begin == b.j.begin;
}

bool DirectTasks::same_source(const DirectPosition& a, const DirectPosition& b) {
  return same_pixels(a, b) && a.n.begin == b.n.begin && a.g == b.g;
}

void DirectTasks::add_source(const DirectPosition& at, int64_t chunk, SourcePrefetch* ahead) const {
  if (view_.terms() == 0 || plan_.reads_neighbours || plan_.reads_taps) return;
  const int64_t channels = plan_.chunk_channels(view_, chunk) * source_.term_channels;
  for (int64_t n = 0; n < at.n.size(); ++n) {
    const char* sample = static_cast<const char*>(source_.first) +
                         (source_offset(at, chunk) + n * view_.src.n) * source_.element_size;
    if (!plan_.band) {
      for (int64_t i = at.i.begin; i < at.i.end; ++i)
        ahead->add(sample + ((i * view_.step_h + view_.taps[0].h) * view_.src.row +
                             (at.j.begin * view_.step_w + view_.taps[0].w) * view_.src.column) *
                                source_.element_size,
                   at.j.size(), view_.step_w * view_.src.column * source_.element_size,
                   channels * source_.element_size);
      continue;
    }
    const int64_t planes =
        source_.rows_of != nullptr ? source_.rows_of->C : std::min(channels, source_.channels);
    if (view_.src.c != 1 && at.j.size() == view_.J) {
      // Rows are neighbours as their pixels are.
      plan_.band->for_image_rows(view_, at.i, [&](int64_t row, int64_t count) {
        ahead->add(sample + row * view_.src.row * source_.element_size, planes,
                   view_.src.c * source_.element_size,
                   ((count - 1) * view_.src.row + view_.W) * source_.element_size);
      });
      continue;
    }
    plan_.band->for_pieces(
        view_, at.i, at.j, [&](int64_t, int64_t, Range inside, int64_t from, int64_t step) {
          if (view_.src.c == 1)
            ahead->add(sample + from * source_.element_size, inside.size(),
                       step * source_.element_size, channels * source_.element_size);
          else if (!inside.empty())
            ahead->add(sample + from * source_.element_size, planes,
                       view_.src.c * source_.element_size,
                       ((inside.size() - 1) * step + 1) * source_.element_size);
        });
  }
}

// The terms of a chunk, as offsets from a pixel's first.
void DirectTasks::fill_terms(int64_t channels, int32_t* terms) const {
  for (const ConvTap& tap : view_.taps) {
    const int64_t offset = plan_.band         ? plan_.band->tap_offset(tap)
                           : plan_.reads_taps ? (tap.h * view_.src.row + tap.w * view_.src.column) /
                                                    source_.term_channels
                                              : 0;
    for (int64_t c = 0; c < channels; ++c) *terms++ = static_cast<int32_t>(offset + c);
  }
}

void DirectTasks::group_pixels(Tables* tables) const {
  const auto group = [](int64_t count, int64_t total, int64_t size, const auto& of_block) {
    std::vector<std::vector<AxisGroup>> groups;
    for (int64_t b = 0; b < count; ++b) groups.push_back(of_block(block(b, size, total)));
    return groups;
  };
  if (!plan_.band && !plan_.reads_taps) {
    const auto whole = [](Range outputs) { return std::vector<AxisGroup>{{outputs, {0, 0}}}; };
    tables->row_groups = group(blocks_i_, view_.I, plan_.rows, whole);
    tables->column_groups.push_back(group(blocks_j_, view_.J, plan_.columns, whole));
    return;
  }
  const std::vector<int64_t> taps_h = distinct_offsets(view_, &ConvTap::h);
  const std::vector<int64_t> taps_w = distinct_offsets(view_, &ConvTap::w);
  const auto rank = [](const std::vector<int64_t>& offsets, int64_t offset) {
    return std::lower_bound(offsets.begin(), offsets.end(), offset) - offsets.begin();
  };
  for (const ConvTap& tap : view_.taps)
    tables->ranks.push_back({rank(taps_h, tap.h), rank(taps_w, tap.w)});
  // In place there is no padding that could be read.
  const bool exact = plan_.reads_taps,
             deep = view_.terms() * source_.term_channels >= kTermsInRegisters;
  const int64_t rows =
      deep ? ceil_div(kTileEnough, plan_.nominal_samples * plan_.columns) : plan_.rows;
  tables->row_groups = group(blocks_i_, view_.I, plan_.rows, [&](Range outputs) {
    return group_outputs(taps_h, view_.step_h, view_.H, outputs, exact ? 1 : rows);
  });
  for (int64_t columns = 1; columns <= kTileEnough; ++columns)
    tables->column_groups.push_back(group(blocks_j_, view_.J, plan_.columns, [&](Range outputs) {
      return group_outputs(taps_w, view_.step_w, view_.W, outputs,
                           exact  ? 1
                           : deep ? columns
                                  : plan_.columns);
    }));
}

void DirectTasks::order_pixels(DirectTask& t) const {
  const DirectPosition& at = t.at;
  ConvStrides s = view_.src;
  s.n /= source_.term_channels, s.row /= source_.term_channels, s.column /= source_.term_channels;
  int64_t row = view_.step_h * s.row, column = view_.step_w * s.column, sample = s.n, first = 0;
  if (plan_.band) {
    row = plan_.band->row_step();
    column = plan_.band->column_step();
    sample = plan_.band->size();
  } else if (plan_.reads_taps) {
    first = at.i.begin * row + at.j.begin * column;
  } else if (taps_ == 1) {
    const ConvTap& tap = view_.taps[0];
    first = (at.i.begin * view_.step_h + tap.h) * s.row +
            (at.j.begin * view_.step_w + tap.w) * s.column;
  }
  t.pixel_step = column;
  t.groups.clear();
  int64_t p = 0;
  for (const AxisGroup& r : tables_->row_groups[at.i.begin / plan_.rows]) {
    const int64_t least = std::min(ceil_div(kTileEnough, plan_.nominal_samples * r.outputs.size()),
                                   static_cast<int64_t>(tables_->column_groups.size()));
    for (const AxisGroup& c : tables_->column_groups[least - 1][at.j.begin / plan_.columns]) {
      const int64_t begin = p, width = c.outputs.size();
      for (int64_t n = 0; n < at.n.size(); ++n) {
        for (int64_t i = r.outputs.begin - at.i.begin; i < r.outputs.end - at.i.begin;
             ++i, p += width) {
          const int64_t j0 = c.outputs.begin - at.j.begin;
          const int64_t from = first + n * sample + i * row + j0 * column;
          const int64_t to = n * view_.dst.n + i * view_.dst.row + j0 * view_.dst.column;
          const int64_t place = view_.dst.c == 1 ? p : (n * at.i.size() + i) * at.j.size() + j0;
          fill_steps(t.src_offsets + p, width, from, column);
          fill_steps(t.dst_offsets + place, width, to, view_.dst.column);
          if (view_.dst.c != 1)
            fill_steps(t.scratch_offsets + p, width, place * scratch_ld(), scratch_ld());
        }
      }
      const int64_t height = r.outputs.size();
      const bool rows_follow = row == width * column && view_.dst.row == width * view_.dst.column;
      const bool samples_follow =
          rows_follow && sample == height * row && view_.dst.n == height * view_.dst.row;
      const int64_t even = samples_follow ? p - begin : rows_follow ? height * width : width;
      t.groups.push_back({{begin, p}, r.taps, c.taps, even, 0, 0});
    }
  }
}

void DirectTasks::cut_segments(DirectTask& t, int64_t channels) const {
  const std::vector<TapRank>& ranks = tables_->ranks;
  const int64_t depth = channels * taps_;
  const int64_t block =
      even_piece(std::max<int64_t>(depth, 1),
                 source_.term_channels > 1 ? kPairsInRegisters : kTermsInRegisters);
  std::vector<TermSegment>& segments = t.segments;
  segments.clear();
  for (DirectPixels& group : t.groups) {
    group.segments = static_cast<int64_t>(segments.size());
    const auto reads = [&](int64_t tap) {
      return ranks.empty() ||
             (group.rows.begin <= ranks[tap].row && ranks[tap].row < group.rows.end &&
              group.columns.begin <= ranks[tap].column && ranks[tap].column < group.columns.end);
    };
    group.terms = 0;
    for (int64_t tap = 0; tap < taps_;) {
      if (!reads(tap)) {
        ++tap;
        continue;
      }
      int64_t begin = tap * channels;
      while (tap < taps_ && reads(tap)) ++tap;
      group.terms += tap * channels - begin;
      while (begin < tap * channels) {
        const int64_t end = std::min(tap * channels, (begin / block + 1) * block);
        if (static_cast<int64_t>(segments.size()) > group.segments)
          segments.back().ends_block = segments.back().begin / block != begin / block;
        segments.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end), false, false});
        begin = end;
      }
    }
    if (group.terms == 0) segments.push_back({0, 0, true, true});
    segments.back().ends_block = segments.back().last = true;
  }
}

}  // namespace torchconv::cpu
