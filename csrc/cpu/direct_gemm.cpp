// Blocking and order of direct_gemm.h.
//
// A task owns a block of pixels (rows of a sample, or small samples whole) and filters. For each
// chunk of channels it copies the block's band of the image, unless the image itself will do (no
// padding, or few products), and multiplies it with the chunk's panels of weights; sums of earlier
// chunks wait in the destination, or in scratch where the epilogue needs more than the kernel
// offers. The panel stays in the second-level cache while the block's tiles pass (Goto and van de
// Geijn, 2008).
#include "cpu/direct_gemm.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/buffer.h"
#include "cpu/axis_groups.h"
#include "cpu/channel_band.h"
#include "cpu/channel_pairs.h"
#include "cpu/direct_plan.h"
#include "cpu/direct_terms.h"
#include "cpu/microkernels/direct_tile.h"
#include "cpu/parallel_range.h"
#include "cpu/plane_store.h"
#include "cpu/row_pairs.h"
#include "cpu/source_prefetch.h"

namespace torchconv::cpu {
namespace {

// See kDepth; a reduction in place has no panel that must fit the first-level cache.
constexpr int64_t kTermsInRegisters = 256;
// The sums are rounded to fewer bits than any number of pairs would lose.
constexpr int64_t kPairsInRegisters = 1024;
// What a block's weights may take of the second-level cache.
constexpr int64_t kWeightBytes = 640 << 10;
// The tasks of one call should be enough for several threads when it is large.
constexpr int64_t kTasksWanted = 16;
// Lines that are asked for together do not hold up the products that follow.
constexpr int64_t kLinesAtOnce = 8;
// From so many pixels on a tile is as fast as a full one.
constexpr int64_t kTileEnough = ceil_div(kMaxRows, 2);

// to[l] = first + l*step
void fill_steps(int64_t* to, int64_t n, int64_t first, int64_t step) {
  using V = Vec<int64_t>;
  int64_t l = 0;
  V::Type v = V::iota() * step + first;
  for (; l + V::kLanes <= n; l += V::kLanes, v += V::kLanes * step) V::store(to + l, v);
  for (; l < n; ++l) to[l] = first + l * step;
}

template <typename T, typename Terms = ChannelTerms>
class DirectGemm {
 public:
  using A = Wide<T>;
  using Plan = DirectPlan;

  // view: of terms, but for the strides; channels: of the source.
  DirectGemm(const ConvView& view, int64_t channels, const Plan& plan, const T* src,
             const A* weights, const T* bias, const Epilogue<T>& epilogue, Terms of_terms = {})
      : view_(view),
        of_terms_(of_terms),
        source_channels_(channels),
        plan_(plan),
        src_(src),
        weights_(weights),
        epilogue_(epilogue),
        taps_(static_cast<int64_t>(view.taps.size())),
        blocks_i_(ceil_div(view.I, plan.rows)),
        blocks_j_(ceil_div(view.J, plan.columns)),
        blocks_n_(ceil_div(view.N, plan.samples)),
        zero_bias_(view.groups * plan.padded_filters),
        bias_(zero_bias_ + round_up(plan.padded_filters, kPanel<A>)),
        terms_(2 * plan.channels * taps_) {
    group_pixels();
    for (int64_t g = 0; g < view.groups; ++g)
      for (int64_t k = 0; k < plan.padded_filters; ++k)
        bias_[g * plan.padded_filters + k] =
            bias != nullptr && k < view.K ? to_wide(bias[g * view.K + k]) : A{0};
    fill_zero(bias_.get() + zero_bias_, round_up(plan.padded_filters, kPanel<A>));
    if (view.terms() > 0) {
      fill_terms(plan.channels, terms_.get());
      fill_terms(plan.chunk_channels(view, plan.chunks - 1), terms_.get() + plan.channels * taps_);
    }
    high_ = epilogue.most();
    const bool simple = epilogue.preactivation == nullptr && epilogue.clamps_at_most();
    to_dst_ = std::is_same_v<T, A> && view.dst.c == 1 && simple;
    rounds_ = kPairs && simple && (view.dst.c == 1 || view.dst.column == 1);
    if constexpr (std::is_same_v<T, A>)
      streams_ =
          to_dst_ && plan.chunks == 1 && view.K % kLanes<A> == 0 &&
          WideVec<T>::streams(epilogue.y + view.dst_offset,
                              view.N * view.pixels() * view.groups * view.K, view.dst.column);
    const int64_t blocks = blocks_n_ * blocks_i_ * blocks_j_ * view.groups;
    const int64_t pieces = std::min(ceil_div(kTasksWanted, blocks), ceil_div(view.K, 128));
    filters_ = round_up(ceil_div(view.K, pieces), kPanel<A>);
    filter_pieces_ = ceil_div(view.K, filters_);
  }

  void run(const Parallel& pool) {
    const int64_t pixels = plan_.samples * plan_.rows * plan_.columns;
    const int64_t tasks = blocks_n_ * view_.groups * blocks_i_ * blocks_j_ * filter_pieces_;
    const WorkSplit split(tasks, static_cast<double>(pixels) * static_cast<double>(filters_) *
                                     static_cast<double>(view_.terms() + 4));
    const int64_t band = plan_.band ? round_up(plan_.samples * plan_.band->size(), 16) : 0;
    const int64_t ld = scratch_ld();
    const int64_t sums = to_dst_ ? 0 : round_up(pixels * ld, 16);
    const int64_t rounded = rounds_ && view_.dst.c != 1 ? round_up(pixels * ld / 2, 16) : 0;
    const int64_t slot_size = band + kTileSize<A> + sums + rounded;
    Buffer<A> scratch(split.slots * slot_size);
    Buffer<int64_t> tables(split.slots * pixels * 3);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      Task t;
      t.totals = scratch.get() + slot * slot_size;
      t.band = t.totals + kTileSize<A>;
      t.scratch = t.band + band;
      t.rounded = reinterpret_cast<BFloat16*>(t.scratch + sums);
      t.src_offsets = tables.get() + slot * pixels * 3;
      t.dst_offsets = t.src_offsets + pixels;
      t.scratch_offsets = t.dst_offsets + pixels;
      if (!to_dst_ && view_.dst.c == 1) fill_steps(t.scratch_offsets, pixels, 0, ld);
      for (int64_t task = begin; task < end; ++task) {
        const Position at = position(task);
        const bool ordered = task > begin && same_pixels(at, t.at);
        t.at = at;
        if (!ordered) order_pixels(t);
        for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
          t.ahead.clear();
          if (chunk + 1 < plan_.chunks)
            add_source(t.at, chunk + 1, &t.ahead);
          else if (task + 1 < end)
            add_source(position(task + 1), 0, &t.ahead);
          run_chunk(t, chunk, ordered);
        }
      }
      if (streams_) stream_fence();
    });
  }

 private:
  static constexpr bool kPairs = Terms::kChannels > 1;

  // Of a tap's offsets among the distinct ones of their axis.
  struct TapRank {
    int64_t row, column;
  };
  // Pixels [begin, end) of the task's list, and what they read.
  struct PixelGroup {
    Range pixels, rows, columns;
    int64_t segments, terms;
  };
  struct Position {
    Range n, i, j, k;
    int64_t g;
    int64_t pixels() const { return n.size() * i.size() * j.size(); }
  };
  struct Task {
    Position at;
    A *totals, *band, *scratch;
    BFloat16* rounded;                                     // of pairs: [pixel][scratch_ld]
    int64_t *src_offsets, *dst_offsets, *scratch_offsets;  // [pixels]
    std::vector<PixelGroup> groups;
    std::vector<TermSegment> segments;
    SourcePrefetch ahead;  // of what is copied next
  };

  Position position(int64_t task) const {
    Position at;
    at.k = block(task % filter_pieces_, filters_, view_.K);
    task /= filter_pieces_;
    at.j = block(task % blocks_j_, plan_.columns, view_.J);
    task /= blocks_j_;
    at.i = block(task % blocks_i_, plan_.rows, view_.I);
    task /= blocks_i_;
    at.g = task % view_.groups;
    at.n = block(task / view_.groups, plan_.samples, view_.N);
    return at;
  }

  const T* source(const Position& at, int64_t chunk) const {
    return src_ + at.n.begin * view_.src.n + at.g * source_channels_ * view_.src.c +
           chunk * plan_.channels * Terms::kChannels * view_.src.c;
  }
  void add_source(const Position& at, int64_t chunk, SourcePrefetch* ahead) const {
    if (view_.terms() == 0 || plan_.reads_neighbours || plan_.reads_taps) return;
    constexpr int64_t kSize = sizeof(T);
    const int64_t channels = plan_.chunk_channels(view_, chunk) * Terms::kChannels;
    for (int64_t n = 0; n < at.n.size(); ++n) {
      const T* sample = source(at, chunk) + n * view_.src.n;
      if (!plan_.band) {
        for (int64_t i = at.i.begin; i < at.i.end; ++i)
          ahead->add(sample + (i * view_.step_h + view_.taps[0].h) * view_.src.row +
                         (at.j.begin * view_.step_w + view_.taps[0].w) * view_.src.column,
                     at.j.size(), view_.step_w * view_.src.column * kSize, channels * kSize);
        continue;
      }
      const int64_t planes = of_terms_.planes(std::min(channels, source_channels_));
      if (view_.src.c != 1 && at.j.size() == view_.J) {
        // Rows are neighbours as their pixels are.
        plan_.band->for_image_rows(view_, at.i, [&](int64_t row, int64_t count) {
          ahead->add(sample + row * view_.src.row, planes, view_.src.c * kSize,
                     ((count - 1) * view_.src.row + view_.W) * kSize);
        });
        continue;
      }
      plan_.band->for_pieces(
          view_, at.i, at.j, [&](int64_t, int64_t, Range inside, int64_t from, int64_t step) {
            if (view_.src.c == 1)
              ahead->add(sample + from, inside.size(), step * kSize, channels * kSize);
            else if (!inside.empty())
              ahead->add(sample + from, planes, view_.src.c * kSize,
                         ((inside.size() - 1) * step + 1) * kSize);
          });
    }
  }

  static Range block(int64_t index, int64_t size, int64_t total) {
    return {index * size, std::min((index + 1) * size, total)};
  }
  // The rows of a tile in different sets of the first-level cache.
  int64_t scratch_ld() const { return round_up(filters_, 32) + 16; }

  // The terms of a chunk, as offsets from a pixel's first.
  void fill_terms(int64_t channels, int32_t* terms) const {
    for (const ConvTap& tap : view_.taps) {
      const int64_t offset =
          plan_.band         ? plan_.band->tap_offset(tap)
          : plan_.reads_taps ? (tap.h * view_.src.row + tap.w * view_.src.column) / Terms::kChannels
                             : 0;
      for (int64_t c = 0; c < channels; ++c) *terms++ = static_cast<int32_t>(offset + c);
    }
  }

  void group_pixels() {
    const auto group = [](int64_t count, int64_t total, int64_t size, const auto& of_block) {
      std::vector<std::vector<AxisGroup>> groups;
      for (int64_t b = 0; b < count; ++b) groups.push_back(of_block(block(b, size, total)));
      return groups;
    };
    if (!plan_.band && !plan_.reads_taps) {
      const auto whole = [](Range outputs) { return std::vector<AxisGroup>{{outputs, {0, 0}}}; };
      row_groups_ = group(blocks_i_, view_.I, plan_.rows, whole);
      column_groups_.push_back(group(blocks_j_, view_.J, plan_.columns, whole));
      return;
    }
    const std::vector<int64_t> taps_h = distinct_offsets(view_, &ConvTap::h);
    const std::vector<int64_t> taps_w = distinct_offsets(view_, &ConvTap::w);
    const auto rank = [](const std::vector<int64_t>& offsets, int64_t offset) {
      return std::lower_bound(offsets.begin(), offsets.end(), offset) - offsets.begin();
    };
    for (const ConvTap& tap : view_.taps)
      ranks_.push_back({rank(taps_h, tap.h), rank(taps_w, tap.w)});
    // In place there is no padding that could be read.
    const bool exact = plan_.reads_taps,
               deep = view_.terms() * Terms::kChannels >= kTermsInRegisters;
    const int64_t rows =
        deep ? ceil_div(kTileEnough, plan_.nominal_samples * plan_.columns) : plan_.rows;
    row_groups_ = group(blocks_i_, view_.I, plan_.rows, [&](Range outputs) {
      return group_outputs(taps_h, view_.step_h, view_.H, outputs, exact ? 1 : rows);
    });
    for (int64_t columns = 1; columns <= kTileEnough; ++columns)
      column_groups_.push_back(group(blocks_j_, view_.J, plan_.columns, [&](Range outputs) {
        return group_outputs(taps_w, view_.step_w, view_.W, outputs,
                             exact  ? 1
                             : deep ? columns
                                    : plan_.columns);
      }));
  }

  // Whether pixels in this order are those of another position.
  static bool same_pixels(const Position& a, const Position& b) {
    return a.n.size() == b.n.size() && a.i.begin == b.i.begin && a.j.begin == b.j.begin;
  }

  // Lists the task's pixels, those that read through the same taps together. Planes are stored from
  // scratch where pixels lie in the image's order, in runs as long as there are.
  void order_pixels(Task& t) const {
    const Position& at = t.at;
    ConvStrides s = view_.src;
    s.n /= Terms::kChannels, s.row /= Terms::kChannels, s.column /= Terms::kChannels;
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
    t.groups.clear();
    int64_t p = 0;
    for (const AxisGroup& r : row_groups_[at.i.begin / plan_.rows]) {
      const int64_t least =
          std::min(ceil_div(kTileEnough, plan_.nominal_samples * r.outputs.size()),
                   static_cast<int64_t>(column_groups_.size()));
      for (const AxisGroup& c : column_groups_[least - 1][at.j.begin / plan_.columns]) {
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
        t.groups.push_back({{begin, p}, r.taps, c.taps, 0, 0});
      }
    }
  }

  // The terms of a chunk that each group of pixels reads, cut where sums go from registers to
  // memory: at the same places whatever is left out, so that this changes no bit.
  void cut_segments(Task& t, int64_t channels) const {
    const int64_t depth = channels * taps_;
    const int64_t block =
        even_piece(std::max<int64_t>(depth, 1), kPairs ? kPairsInRegisters : kTermsInRegisters);
    std::vector<TermSegment>& segments = t.segments;
    segments.clear();
    for (PixelGroup& group : t.groups) {
      group.segments = static_cast<int64_t>(segments.size());
      const auto reads = [&](int64_t tap) {
        return ranks_.empty() ||
               (group.rows.begin <= ranks_[tap].row && ranks_[tap].row < group.rows.end &&
                group.columns.begin <= ranks_[tap].column &&
                ranks_[tap].column < group.columns.end);
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
          segments.push_back(
              {static_cast<int32_t>(begin), static_cast<int32_t>(end), false, false});
          begin = end;
        }
      }
      if (group.terms == 0) segments.push_back({0, 0, true, true});
      segments.back().ends_block = segments.back().last = true;
    }
  }

  // ordered: the task's pixels are those of the one before it.
  void run_chunk(Task& t, int64_t chunk, bool ordered) const {
    const Position& at = t.at;
    const int64_t channels = view_.terms() > 0 ? plan_.chunk_channels(view_, chunk) : 0;
    const bool last = chunk + 1 == plan_.chunks;
    const T* src = source(at, chunk);
    DirectTile<A> tile{};
    if (plan_.band) {
      const int64_t first = chunk * plan_.channels * Terms::kChannels;
      for (int64_t n = 0; n < at.n.size(); ++n)
        of_terms_.fill(*plan_.band, view_, src + n * view_.src.n,
                       std::min(channels * Terms::kChannels, source_channels_ - first), at.i, at.j,
                       t.band + n * plan_.band->size());
      tile.a = t.band;
    } else {
      tile.a = reinterpret_cast<const A*>(src);
    }
    const bool cut = ordered && plan_.chunks == 1;
    if ((chunk == 0 || last) && !cut) cut_segments(t, channels);
    const bool rounds = last && rounds_;
    if (rounds && view_.dst.c != 1 && epilogue_.residual != nullptr) load_residual(t);
    tile.terms = terms_.get() + (last ? plan_.channels * taps_ : 0);
    tile.totals = t.totals;
    tile.panel_size = channels * taps_ * kPanel<A>;
    tile.stream = streams_;
    tile.clamp = last && (to_dst_ || rounds_) && epilogue_.activation != Activation::kNone;
    tile.high = high_;

    const int64_t depth = channels * taps_, panels = ceil_div(at.k.size(), kPanel<A>);
    const A* weights =
        weights_ + (at.g * view_.terms() + chunk * plan_.channels * taps_) * plan_.padded_filters;
    // Of `count` panels, whole ones if several.
    const auto run_tile = [&](int64_t panel, int64_t count, const PixelGroup& group, int64_t first,
                              int64_t rows) {
      const int64_t k = at.k.begin + panel * kPanel<A>;
      const Epilogue<T> to = epilogue_.at(dst_offset(at) + k);
      const int64_t filters = std::min(kPanel<A>, at.k.end - k);
      const int64_t vectors = ceil_div(filters, kLanes<A>);
      tile.pixels = t.src_offsets + first;
      tile.segments = t.segments.data() + group.segments;
      tile.b = weights + k * depth;
      tile.panels = count;
      tile.lanes = filters - (vectors - 1) * kLanes<A>;
      tile.bias = bias_.get() + (chunk == 0 ? at.g * plan_.padded_filters + k : zero_bias_);
      if (to_dst_) {
        if constexpr (std::is_same_v<T, A>) tile.c = to.y, tile.before = to.residual;
        tile.c_rows = t.dst_offsets + first;
      } else {
        tile.c = t.scratch + panel * kPanel<A>;
        tile.c_rows = t.scratch_offsets + first;
      }
      if (chunk > 0) tile.before = tile.c;
      if constexpr (kPairs) {
        if (rounds) {
          const bool in_place = view_.dst.c == 1;
          tile.rounded = in_place ? to.y : t.rounded + panel * kPanel<A>;
          if (to.residual != nullptr) tile.residual = in_place ? to.residual : tile.rounded;
          tile.rounded_rows = (in_place ? t.dst_offsets : t.scratch_offsets) + first;
        }
      }
      Terms::template kernel<A>(rows, vectors)(tile);
      tile.next = static_cast<const char*>(tile.next) + tile.next_step * group.terms * count;
      if (last && !to_dst_ && !rounds && view_.dst.c == 1)
        for (int64_t m = first; m < first + rows; ++m)
          epilogue_.store(t.scratch + t.scratch_offsets[m] + panel * kPanel<A>,
                          (count - 1) * kPanel<A> + filters, dst_offset(at) + t.dst_offsets[m] + k,
                          1);
    };
    const auto for_tiles = [&](const auto& f) {
      for (const PixelGroup& group : t.groups)
        for_row_tiles(group.pixels.size(), plan_.tile_rows, [&](int64_t first, int64_t rows) {
          f(group, group.pixels.begin + first, rows);
        });
    };
    constexpr int64_t kSize = sizeof(A);
    int64_t tiles = 0;
    for (const PixelGroup& group : t.groups)
      tiles += ceil_div(group.pixels.size(), plan_.tile_rows);
    const int64_t lines_ahead = ceil_div(t.ahead.lines(), tiles * panels);
    if (at.k.size() * depth * kSize <= kWeightBytes) {
      // All weights stay in the second-level cache, so that a tile's pixels are read once.
      const int64_t end = at.pixels();
      const T* const fetched = epilogue_.residual != nullptr ? epilogue_.residual : epilogue_.y;
      const bool fetches_dst = !plan_.reads_neighbours && to_dst_ && depth > 0 &&
                               (!streams_ || epilogue_.residual != nullptr);
      const int64_t whole_panels = at.k.size() / kPanel<A>;
      const int64_t most_panels =
          std::max<int64_t>(1, kLinesAtOnce / std::max<int64_t>(1, lines_ahead));
      tile.next = weights;
      tile.next_step = 0;
      for_tiles([&](const PixelGroup& group, int64_t first, int64_t rows) {
        if (plan_.reads_neighbours && first + 2 * rows <= end) {
          tile.next = tile.a + t.src_offsets[first + rows];
          tile.next_step =
              (t.src_offsets[first + rows] - t.src_offsets[first]) * kSize / (panels * depth);
        }
        if constexpr (std::is_same_v<T, A>) {
          // What few terms write would wait for its lines.
          if (fetches_dst && first + rows < end) {
            tile.next = fetched + dst_offset(at) + at.k.begin + t.dst_offsets[first + rows];
            tile.next_step = rows * view_.dst.column * kSize / (panels * depth) + 1;
          }
        }
        for (int64_t panel = 0, count; panel < panels; panel += count) {
          count = std::clamp<int64_t>(whole_panels - panel, 1, most_panels);
          if (plan_.reads_neighbours || fetches_dst)
            t.ahead.ask(lines_ahead * count);
          else
            t.ahead.give(lines_ahead * count, group.terms * count, &tile);
          run_tile(panel, count, group, first, rows);
        }
      });
      if (last && view_.dst.c != 1) store_planes(t);
      return;
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      tile.next = weights + (at.k.begin + std::min(panel + 1, panels - 1) * kPanel<A>)*depth;
      tile.next_step = kPanel<A> * kSize / tiles;
      for_tiles([&](const PixelGroup& group, int64_t first, int64_t rows) {
        t.ahead.ask(lines_ahead);
        run_tile(panel, 1, group, first, rows);
      });
    }
    if (last && view_.dst.c != 1) store_planes(t);
  }

  // Of a destination where pixels are neighbours.
  PlaneTarget planes(const Task& t) const {
    return {t.dst_offsets, t.at.pixels(),    dst_offset(t.at) + t.at.k.begin * view_.dst.c,
            view_.dst.c,   view_.dst.column, t.at.k.size()};
  }

  // To where the tiles put their rounded sums, in the same order.
  void load_residual(const Task& t) const {
    if constexpr (kPairs) {
      const PlaneTarget from = planes(t);
      const int64_t ld = scratch_ld() / 2;
      from.for_runs(from.count, [&](int64_t p, int64_t n) {
        transpose_pairs(epilogue_.residual + from.base + from.pixels[p], from.plane, from.step, n,
                        from.filters, reinterpret_cast<float*>(t.rounded) + p * ld, ld);
      });
    }
  }

  // The finished tiles in scratch to such a destination.
  void store_planes(const Task& t) const {
    if constexpr (kPairs) {
      const PlaneTarget to = planes(t);
      if (rounds_)
        store_rounded_planes(t.rounded, scratch_ld(), to, epilogue_.y);
      else
        store_float_planes(t.scratch, scratch_ld(), to, epilogue_);
    }
  }

  // Of the task's first pixel.
  int64_t dst_offset(const Position& at) const {
    return view_.dst_offset + at.n.begin * view_.dst.n + at.g * view_.K * view_.dst.c +
           at.i.begin * view_.dst.row + at.j.begin * view_.dst.column;
  }

  const ConvView& view_;
  const Terms of_terms_;
  const int64_t source_channels_;
  const Plan& plan_;
  const T* src_;
  const A* weights_;
  const Epilogue<T>& epilogue_;
  int64_t taps_, blocks_i_, blocks_j_, blocks_n_;
  int64_t filters_, filter_pieces_;
  int64_t zero_bias_;      // where panels of zeros lie behind the bias
  Buffer<A> bias_;         // [group][padded_filters]
  Buffer<int32_t> terms_;  // of a full chunk and of the last
  using BlockGroups = std::vector<std::vector<AxisGroup>>;  // [block]
  BlockGroups row_groups_;
  std::vector<BlockGroups> column_groups_;  // of at least 1, 2, ...; or of any number
  std::vector<TapRank> ranks_;  // [tap], or empty where every pixel reads through every tap
  A high_;
  bool to_dst_;                            // by the kernel
  bool streams_ = false, rounds_ = false;  // past the caches; by the kernel to a narrower type
};

}  // namespace

template <typename T>
void direct_gemm(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                 const T* bias, const Epilogue<T>& epilogue, const Parallel& pool) {
  using A = Wide<T>;
  const Buffer<A> own(packed != nullptr ? 0 : direct_gemm_weights_size<T>(view));
  if (packed == nullptr) direct_gemm_pack_weights(view, w, own.get(), pool);
  const A* weights = packed != nullptr ? packed : own.get();
  const int64_t pixel = view.step_w * view.src.column;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (takes_row_pairs(view)) {
      const ConvView rows = row_view(view), pairs = pair_view(rows);
      const DirectPlan plan(pairs, sizeof(A), false, 0);
      return DirectGemm<T, RowTerms>(pairs, rows.C, plan, src, weights, bias, epilogue, {view})
          .run(pool);
    }
    if (takes_pairs(view)) {
      const ConvView pairs = pair_view(view);
      const bool whole = view.src.c == 1 && view.C % 2 == 0 &&
                         reinterpret_cast<uintptr_t>(src) % alignof(float) == 0;
      const DirectPlan plan(pairs, sizeof(A), whole, pixel / 2);
      return DirectGemm<T, PairTerms>(pairs, view.C, plan, src, weights, bias, epilogue).run(pool);
    }
  }
  const DirectPlan plan(view, sizeof(A), std::is_same_v<T, A>, pixel);
  DirectGemm<T>(view, view.C, plan, src, weights, bias, epilogue).run(pool);
}

template void direct_gemm(const ConvView&, const float*, const float*, const float*, const float*,
                          const Epilogue<float>&, const Parallel&);
template void direct_gemm(const ConvView&, const double*, const double*, const double*,
                          const double*, const Epilogue<double>&, const Parallel&);
template void direct_gemm(const ConvView&, const BFloat16*, const BFloat16*, const float*,
                          const BFloat16*, const Epilogue<BFloat16>&, const Parallel&);
template void direct_gemm(const ConvView&, const Float16*, const Float16*, const float*,
                          const Float16*, const Epilogue<Float16>&, const Parallel&);

}  // namespace torchconv::cpu
