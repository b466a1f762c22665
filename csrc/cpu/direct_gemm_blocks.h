// Blocking and order of direct_gemm.h.
//
// A task owns a block of pixels (rows of a sample, or small samples whole) and filters. For each
// chunk of channels it copies the block's band of the image, unless the image itself will do (no
// padding, or few products), and multiplies it with the chunk's panels of weights; sums of earlier
// chunks wait in the destination, or in scratch where the epilogue needs more than the kernel
// offers. The panel stays in the second-level cache while the block's tiles pass (Goto and van de
// Geijn, 2008). Weights that only one block of pixels meets come from memory a panel ahead, and few
// of them, or of pixels, have each task pack its own a panel at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/activation.h"
#include "cpu/channel_pairs.h"
#include "cpu/conv_pack.h"
#include "cpu/direct_gemm.h"
#include "cpu/direct_plan.h"
#include "cpu/direct_tasks.h"
#include "cpu/microkernels/direct_run.h"
#include "cpu/microkernels/direct_tile.h"
#include "cpu/parallel_range.h"
#include "cpu/plane_store.h"

namespace torchconv::cpu {

// kPairs: the terms are pairs of bfloat16.
template <typename T, bool kPairs = false>
class DirectGemm : DirectTasks {
 public:
  using A = Wide<T>;

  // See DirectSource for rows_of; channels: of the source. weights: packed, or null where
  // each task packs its own from unpacked ones.
  DirectGemm(const ConvView& view, int64_t channels, const DirectPlan& plan, const T* src,
             const A* weights, const T* unpacked, const T* bias, const Epilogue<T>& epilogue,
             const ConvView* rows_of = nullptr)
      : DirectGemm({view,
                    plan,
                    {src, sizeof(T), channels, kTermChannels, rows_of},
                    kPanel<A>,
                    weights == nullptr ? kLanes<A> : kPanel<A>,
                    false},
                   src, weights, unpacked, bias, epilogue) {}

  // planned: with weights or not, as here. in_parts: the weights are.
  DirectGemm(const DirectTasks& planned, const T* src, const A* weights, const T* unpacked,
             const T* bias, const Epilogue<T>& epilogue, bool in_parts = false)
      : DirectTasks(planned, src),
        src_(src),
        weights_(in_parts ? nullptr : weights),
        parts_(in_parts ? weights : nullptr),
        unpacked_(unpacked),
        epilogue_(epilogue),
        zero_bias_(view_.groups * plan_.padded_filters),
        bias_(zero_bias_ + round_up(plan_.padded_filters, kPanel<A>)) {
    const ConvView& view = view_;
    const DirectPlan& plan = plan_;
    const int64_t known = bias != nullptr ? view.K : 0;
    for (int64_t g = 0; g < view.groups; ++g) {
      A* const filters = bias_.get() + g * plan.padded_filters;
      copy_wide(filters, bias + g * known, known);
      fill_zero(filters + known, plan.padded_filters - known);
    }
    fill_zero(bias_.get() + zero_bias_, round_up(plan.padded_filters, kPanel<A>));
    if (plan.reads_taps)
      for (const ConvTap& tap : view.taps)
        last_tap_ =
            std::max(last_tap_, (tap.h * view.src.row + tap.w * view.src.column) / kTermChannels);
    high_ = epilogue.most();
    const bool simple = epilogue.preactivation == nullptr && epilogue.clamps_at_most();
    to_dst_ = std::is_same_v<T, A> && view.dst.c == 1;
    runs_ = (kPairs ? taps_ == 1 : std::is_same_v<T, float> && to_dst_ && !plan.band) &&
            !plan.reads_taps && plan.tile_rows == kMaxRows;
    rounds_ = kPairs && simple && (view.dst.c == 1 || view.dst.column == 1);
    if constexpr (std::is_same_v<T, A>)
      streams_ =
          to_dst_ && simple && plan.chunks == 1 && view.K % kLanes<A> == 0 &&
          unit_ % kLanes<A> == 0 &&
          WideVec<T>::streams(epilogue.y + view.dst_offset,
                              view.N * view.pixels() * view.groups * view.K, view.dst.column);
  }

  void run(const Parallel& pool) {
    const int64_t pixels = plan_.samples * plan_.rows * plan_.columns;
    const WorkSplit split(count(), static_cast<double>(pixels) * static_cast<double>(filters_) *
                                       static_cast<double>(view_.terms() + 4));
    const int64_t band = plan_.band ? round_up(plan_.samples * plan_.band->size(), 16) : 0;
    const int64_t ld = scratch_ld();
    const int64_t sums = to_dst_ ? 0 : round_up(pixels * ld, 16);
    const int64_t rounded = rounds_ && view_.dst.c != 1 ? round_up(pixels * ld / 2, 16) : 0;
    const bool packs = weights_ == nullptr && parts_ == nullptr;
    const int64_t bands = packs ? plan_.chunks : 1;
    // One may join it.
    const int64_t panel = packs ? plan_.channels * taps_ * (kPanel<A> + kLanes<A>) : 0;
    const int64_t slot_size = bands * band + panel + kTileSize<A> + sums + rounded;
    Buffer<A> scratch(split.slots * slot_size);
    Buffer<int64_t> tables(split.slots * pixels * 3);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      Task t;
      t.totals = scratch.get() + slot * slot_size;
      t.band = t.totals + kTileSize<A>;
      t.band_size = band;
      t.panel = t.band + bands * band;
      t.scratch = t.panel + panel;
      t.rounded = reinterpret_cast<BFloat16*>(t.scratch + sums);
      t.src_offsets = tables.get() + slot * pixels * 3;
      t.dst_offsets = t.src_offsets + pixels;
      t.scratch_offsets = t.dst_offsets + pixels;
      if (!to_dst_ && view_.dst.c == 1) fill_steps(t.scratch_offsets, pixels, 0, ld);
      for (int64_t task = begin; task < end; ++task) {
        const DirectPosition at = position(task);
        const bool ordered = task > begin && same_pixels(at, t.at);
        const bool filled = task > begin && same_source(at, t.at);
        t.at = at;
        if (!ordered) order_pixels(t);
        if (parts_ != nullptr) {
          run_part(t, ordered, filled);
          continue;
        }
        if (packs) {
          if constexpr (std::is_same_v<T, A> || kPairs) run_packing(t, ordered, filled);
          continue;
        }
        for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
          t.ahead.clear();
          if (chunk + 1 < plan_.chunks)
            add_source(t.at, chunk + 1, &t.ahead);
          else if (task + 1 < end)
            add_source(position(task + 1), 0, &t.ahead);
          t.next_weights = chunk + 1 < plan_.chunks ? chunk_weights(at, chunk + 1)
                           : task + 1 < end         ? chunk_weights(position(task + 1), 0)
                                                    : chunk_weights(at, chunk);
          run_chunk(t, chunk, ordered);
        }
      }
      if (streams_) stream_fence();
    });
  }

 private:
  static constexpr int64_t kTermChannels = kPairs ? 2 : 1;
  // What a block's weights may take of the second-level cache, or its pixels.
  static constexpr int64_t kWeightBytes = 640 << 10, kPixelBytes = 448 << 10;
  // Of pixels, from which each of two threads takes one or shares one.
  static constexpr int64_t kBlocksOnce = 2;
  // Of weights that are fetched in no time, and lie in the first-level cache beside the pixels.
  static constexpr int64_t kFewWeightBytes = 24 << 10;
  // Terms of all panels that are worth a call, and runs that so few take together at most; and
  // calls that a block is worth, each of which asks for the next one's lines.
  static constexpr int64_t kTermsAtOnce = 2048, kRunsAtOnce = 16, kCallsEnough = 4;
  // Lines that are asked for together do not hold up the products that follow.
  static constexpr int64_t kLinesAtOnce = 8;

  struct Task : DirectTask {
    A *totals, *band, *panel, *scratch;
    int64_t band_size;
    const A* next_weights;  // of the chunk or task that follows
    BFloat16* rounded;      // of pairs: [pixel][scratch_ld]
  };

  // The first panel that a task needs of a chunk.
  const A* chunk_weights(const DirectPosition& at, int64_t chunk) const {
    const int64_t terms = view_.terms() > 0 ? plan_.chunk_channels(view_, chunk) * taps_ : 0;
    return weights_ +
           (at.g * view_.terms() + chunk * plan_.channels * taps_) * plan_.padded_filters +
           at.k.begin * terms;
  }

  // The part of a task's filters.
  const A* part_weights(const DirectPosition& at) const {
    int64_t before = 0;
    for (int64_t piece = 0; filters_of(piece).begin < at.k.begin; ++piece)
      before += round_up(filters_of(piece).size(), kLanes<A>);
    return parts_ +
           (view_.groups * before + at.g * round_up(at.k.size(), kLanes<A>)) * view_.terms();
  }

  static DirectMicrokernel<A> kernel(int64_t rows, int64_t vectors) {
    if constexpr (kPairs)
      return direct_pair_microkernel(rows, vectors);
    else
      return direct_microkernel<A>(rows, vectors);
  }
  static DirectMicrokernel<A> even_kernel() {
    if constexpr (kPairs)
      return direct_even_pair_microkernel();
    else
      return direct_even_microkernel<A>();
  }
  void fill(const T* src, int64_t channels, const DirectPosition& at, A* band) const {
    if constexpr (!kPairs)
      plan_.band->fill(view_, src, channels, at.i, at.j, band);
    else if (source_.rows_of != nullptr)
      fill_row_pairs(*source_.rows_of, *plan_.band, view_, src, channels, at.i, at.j, band);
    else
      fill_pairs(*plan_.band, view_, src, channels, at.i, at.j, band);
  }

  // What the tiles of a chunk have in common.
  struct Chunk {
    int64_t index, depth;
    bool last, rounds, runs;  // runs: of pixels, by direct_run.h
    bool even;                // or by direct_even_microkernel
    int64_t runs_at_once;
    DirectTile<A> tile;
  };

  int64_t chunk_channels(int64_t chunk) const {
    return view_.terms() > 0 ? plan_.chunk_channels(view_, chunk) : 0;
  }

  // Of the source, not of terms.
  int64_t first_channel(int64_t chunk) const { return chunk * plan_.channels * kTermChannels; }
  int64_t source_channels(int64_t chunk) const {
    return std::min(chunk_channels(chunk) * kTermChannels, source_.channels - first_channel(chunk));
  }

  void fill_band(const Task& t, int64_t chunk, A* band) const {
    const int64_t filled = source_channels(chunk);
    const T* const src = src_ + source_offset(t.at, chunk);
    for (int64_t n = 0; n < t.at.n.size(); ++n)
      fill(src + n * view_.src.n, filled, t.at, band + n * plan_.band->size());
  }

  // band: the chunk's, where the plan has one. ordered: the task's pixels are those of the one
  // before it.
  Chunk begin_chunk(Task& t, int64_t chunk, const A* band, bool ordered) const {
    const int64_t channels = chunk_channels(chunk);
    Chunk c{chunk, channels * taps_, chunk + 1 == plan_.chunks, false, false, false, 1, {}};
    c.rounds = c.last && rounds_;
    const bool cut = ordered && plan_.chunks == 1;
    if ((chunk == 0 || c.last) && !cut) cut_segments(t, channels);
    DirectTile<A>& tile = c.tile;
    tile.a = plan_.band ? band : reinterpret_cast<const A*>(src_ + source_offset(t.at, chunk));
    tile.terms = terms() + (c.last ? plan_.channels * taps_ : 0);
    tile.totals = t.totals;
    tile.panel_size = c.depth * kPanel<A>;
    tile.stream = streams_;
    tile.pixel_step = t.pixel_step;
    tile.run = channels;
    tile.packed = view_.dst.c == 1 && view_.dst.column == kLanes<A> && t.at.k.size() == kLanes<A>;
    tile.c_step = view_.dst.column;
    tile.clamp =
        c.last && (to_dst_ || rounds_) && epilogue_.clamps() && epilogue_.preactivation == nullptr;
    tile.high = high_;
    return c;
  }

  static bool is_run(int64_t rows) { return rows % kMaxRows == 0; }

  // How many panels a tile takes from this one on, by direct_run.h where `runs`: some whole ones,
  // or the last of them and the narrow one that joins it.
  int64_t panels_at_once(const Task& t, bool runs, int64_t panel, int64_t most) const {
    int64_t whole = t.at.k.size() / kPanel<A>;
    if constexpr (std::is_same_v<T, float>) {
      if (runs && direct_run_joins(t.at.k.size() % kPanel<A>)) {
        if (panel + 1 == whole) return 2;
        --whole;
      }
    }
    return std::clamp<int64_t>(whole - panel, 1, most);
  }

  // Of `count` panels from the task's panel on, as panels_at_once has them, whose weights are b.
  void run_tile(const Task& t, Chunk& c, const A* b, int64_t panel, int64_t count,
                const DirectPixels& group, int64_t first, int64_t rows) const {
    const DirectPosition& at = t.at;
    DirectTile<A>& tile = c.tile;
    const int64_t k = at.k.begin + panel * kPanel<A>;
    const Epilogue<T> to = epilogue_.at(dst_offset(at) + k);
    const int64_t whole = (count - 1) * kPanel<A>;  // before the last one
    const int64_t filters = std::min(kPanel<A>, at.k.end - k - whole);
    const int64_t vectors = ceil_div(filters, kLanes<A>);
    tile.rows = rows;
    tile.pixels = t.src_offsets + first;
    tile.segments = t.segments.data() + group.segments;
    tile.b = b;
    tile.panels = count;
    tile.lanes = filters - (vectors - 1) * kLanes<A>;
    tile.bias = bias_.get() + (c.index == 0 ? at.g * plan_.padded_filters + k : zero_bias_);
    if (to_dst_) {
      if constexpr (std::is_same_v<T, A>) tile.c = to.sums(), tile.before = to.residual;
      tile.c_rows = t.dst_offsets + first;
    } else {
      tile.c = t.scratch + panel * kPanel<A>;
      tile.c_rows = t.scratch_offsets + first;
    }
    if (c.index > 0) tile.before = tile.c;
    if constexpr (kPairs) {
      if (c.rounds) {
        const bool in_place = view_.dst.c == 1;
        tile.rounded = in_place ? to.y : t.rounded + panel * kPanel<A>;
        if (to.residual != nullptr) tile.residual = in_place ? to.residual : tile.rounded;
        tile.rounded_rows = (in_place ? t.dst_offsets : t.scratch_offsets) + first;
      }
    }
    const bool joins = whole > 0 && filters < kPanel<A>;
    tile_kernel(c, rows, joins ? kPanel<A> + filters : filters)(tile);
    const int64_t asked = group.terms * count * ceil_div(rows, int64_t{kMaxRows});
    tile.next = static_cast<const char*>(tile.next) + tile.next_step * asked;
    tile.also = static_cast<const char*>(tile.also) + tile.also_step * asked;
    const int64_t width = whole + filters;
    if constexpr (std::is_same_v<T, A>) {
      if (c.last && to_dst_ && (to.preactivation != nullptr || !to.clamps_at_most()))
        activate_rows(to.activation, tile.c, to.y, tile.c_rows, rows, width);
    }
    if (c.last && !to_dst_ && !c.rounds && view_.dst.c == 1)
      for (int64_t m = first; m < first + rows; ++m)
        epilogue_.store_few(t.scratch + t.scratch_offsets[m] + panel * kPanel<A>, width,
                            dst_offset(at) + t.dst_offsets[m] + k);
  }

  DirectMicrokernel<A> tile_kernel(const Chunk& c, int64_t rows, int64_t filters) const {
    if constexpr (std::is_same_v<T, float>)
      if (c.runs && is_run(rows)) return direct_run_microkernel(filters);
    if constexpr (kPairs)
      if (c.runs && is_run(rows)) return direct_pair_run_microkernel(ceil_div(filters, kLanes<A>));
    if (c.even) return even_kernel();
    return kernel(rows, ceil_div(filters, kLanes<A>));
  }

  // Where the rows of each group are whole runs, or follow each other: a run from one row to the
  // next would not be even. One vector of pairs has its own kernel, and of several samples' pixels
  // the other kernel takes more at a time.
  bool has_runs(const Task& t) const {
    if (!runs_ || (t.at.k.size() <= kLanes<A> && (kPairs || t.at.n.size() > 1))) return false;
    return std::all_of(t.groups.begin(), t.groups.end(), [](const DirectPixels& group) {
      return group.even % kMaxRows == 0 || group.even == group.pixels.size();
    });
  }

  template <typename F>
  void for_tiles(const Task& t, Chunk& c, F&& f) const {
    const bool one_vector = !c.runs && t.at.k.size() <= kLanes<A> && plan_.tile_rows == kMaxRows;
    for (const DirectPixels& group : t.groups) {
      int64_t begin = group.pixels.begin;
      while (c.runs && begin + kMaxRows <= group.pixels.end) {
        const int64_t left = group.even - (begin - group.pixels.begin) % group.even;
        const int64_t runs =
            std::min(c.runs_at_once, std::min(left, group.pixels.end - begin) / int64_t{kMaxRows});
        f(group, begin, runs * kMaxRows);
        begin += runs * kMaxRows;
      }
      while (one_vector && begin + kMaxRows <= group.pixels.end) {
        const int64_t left = group.even - (begin - group.pixels.begin) % group.even;
        const int64_t runs = std::min(left / kMaxRows, kRunsAtOnce);
        c.even = runs > 0;
        const int64_t rows = std::max<int64_t>(runs, 1) * kMaxRows;
        f(group, begin, rows);
        begin += rows;
      }
      c.even = false;
      for_row_tiles(group.pixels.end - begin, plan_.tile_rows,
                    [&](int64_t first, int64_t rows) { f(group, begin + first, rows); });
    }
  }
  int64_t count_tiles(const Task& t) const {
    int64_t tiles = 0;
    for (const DirectPixels& group : t.groups)
      tiles += ceil_div(group.pixels.size(), plan_.tile_rows);
    return tiles;
  }

  // What is read as well as written, where there is such.
  const T* results() const {
    return epilogue_.residual != nullptr ? epilogue_.residual : epilogue_.sums();
  }

  // From there to what is written, where that does not pass by the caches.
  int64_t results_apart() const {
    return streams_ ? 0
                    : static_cast<int64_t>(reinterpret_cast<uintptr_t>(epilogue_.sums()) -
                                           reinterpret_cast<uintptr_t>(results()));
  }

  // Asks for what the tile behind the next one will write: a part of each pixel's channels.
  void fetch_outputs(const Task& t, int64_t k, int64_t first, int64_t rows) const {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    const T* const y = epilogue_.y + dst_offset(t.at) + k;
    const int64_t filters = std::min(kPanel<A>, t.at.k.end - k);
    for (int64_t m = first; m < std::min(first + rows, t.at.pixels()); ++m)
      for (int64_t f = 0; f < filters; f += kLine)
        __builtin_prefetch(y + t.dst_offsets[m] + f, 1, 3);
  }

  // What a run of such a tile, of `count` panels, asks for beside weights: with the first panel the
  // next tile's pixels, which another core may have written, then its own part of each row of the
  // destination.
  void ask_along(const Task& t, bool reads, int64_t k, int64_t count, int64_t first, int64_t rows,
                 Chunk* c) const {
    DirectTile<A>& tile = c->tile;
    const int64_t next = first + rows;
    tile.also = t.panel;
    tile.also_step = tile.also_row = tile.also_apart = 0;
    if (reads && plan_.reads_neighbours && next < t.at.pixels()) {
      tile.also = tile.a + t.src_offsets[next] + last_tap_;
      tile.also_step =
          rows * tile.pixel_step * static_cast<int64_t>(sizeof(A)) / (count * c->depth);
    } else if (!streams_ || epilogue_.residual != nullptr) {
      tile.also = results() + dst_offset(t.at) + k + t.dst_offsets[first];
      tile.also_row = tile.c_step * static_cast<int64_t>(sizeof(A));
      tile.also_apart = results_apart();
    }
  }

  // Some panels, whose weights of the chunk are b, with all tiles. What follows them lies at
  // tile.next.
  void run_panels(const Task& t, Chunk& c, const A* b, int64_t panel, int64_t count) const {
    const int64_t k = t.at.k.begin + panel * kPanel<A>;
    const bool fetches = to_dst_ && !streams_ && view_.groups > 1, runs = c.runs;
    for_tiles(t, c, [&](const DirectPixels& group, int64_t first, int64_t rows) {
      if constexpr (std::is_same_v<T, A>)
        if (c.runs) ask_along(t, panel == 0, k, count, first, rows, &c);
      for (int64_t p = 0, n; p < count; p += n) {
        n = panels_at_once(t, runs && is_run(rows), panel + p, 1);
        if (fetches && c.last) fetch_outputs(t, k + p * kPanel<A>, first + rows, rows);
        run_tile(t, c, b + p * c.tile.panel_size, panel + p, n, group, first, rows);
      }
    });
  }

  // Packs each panel when it is its turn, from weights that were fetched during the one before.
  // filled: the bands are those of the task before it.
  void run_packing(Task& t, bool ordered, bool filled) const {
    const DirectPosition& at = t.at;
    if (plan_.band && !filled)
      for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk)
        fill_band(t, chunk, t.band + chunk * t.band_size);
    const int64_t panels = ceil_div(at.k.size(), kPanel<A>), tiles = count_tiles(t);
    if (rounds_ && view_.dst.c != 1 && epilogue_.residual != nullptr) load_residual(t);
    const bool runs = has_runs(t);
    for (int64_t panel = 0, count; panel < panels; panel += count) {
      count = panels_at_once(t, runs, panel, 1);
      const int64_t k = at.k.begin + panel * kPanel<A>;
      const T* const w = unpacked_ + at.g * view_.weight_group + k * view_.weight_k;
      const void* next = w + count * kPanel<A> * view_.weight_k;
      for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
        Chunk c = begin_chunk(t, chunk, t.band + chunk * t.band_size, ordered || panel > 0);
        for (int64_t p = 0; p < count; ++p)
          direct_gemm_pack_panel(
              view_, w + p * kPanel<A> * view_.weight_k + first_channel(chunk) * view_.weight_c,
              source_channels(chunk), std::min(kPanel<A>, at.k.end - k - p * kPanel<A>),
              t.panel + p * c.tile.panel_size);
        c.tile.next = next;
        // Rows of terms are read in the next panel's order, as the hardware foresees.
        c.tile.next_step =
            view_.weight_k == 1 ? 0 : kPanel<A> * static_cast<int64_t>(sizeof(T)) / tiles;
        c.runs = runs;
        run_panels(t, c, t.panel, panel, count);
        next = c.tile.next;
      }
    }
    if (view_.dst.c != 1) store_planes(t);
  }

  // The same with the part that holds the task's panels.
  void run_part(Task& t, bool ordered, bool filled) const {
    const int64_t panels = ceil_div(t.at.k.size(), kPanel<A>), tiles = count_tiles(t);
    const A* weights = part_weights(t.at);
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      if (plan_.band && !(filled && plan_.chunks == 1)) fill_band(t, chunk, t.band);
      Chunk c = begin_chunk(t, chunk, t.band, ordered);
      c.runs = has_runs(t);
      for (int64_t panel = 0, count; panel < panels; panel += count) {
        count = panels_at_once(t, c.runs, panel, 1);
        const A* const b = weights;
        weights +=
            std::min(count * kPanel<A>, round_up(t.at.k.size(), kLanes<A>) - panel * kPanel<A>) *
            c.depth;
        c.tile.next = weights;
        c.tile.next_step = kPanel<A> * static_cast<int64_t>(sizeof(A)) / tiles;
        run_panels(t, c, b, panel, count);
      }
    }
  }

  // ordered: the task's pixels are those of the one before it.
  void run_chunk(Task& t, int64_t chunk, bool ordered) const {
    const DirectPosition& at = t.at;
    if (plan_.band) fill_band(t, chunk, t.band);
    Chunk c = begin_chunk(t, chunk, t.band, ordered);
    DirectTile<A>& tile = c.tile;
    const int64_t depth = c.depth, panels = ceil_div(at.k.size(), kPanel<A>);
    if (c.rounds && view_.dst.c != 1 && epilogue_.residual != nullptr) load_residual(t);
    const A* const weights = chunk_weights(at, chunk);
    constexpr int64_t kSize = sizeof(A);
    const int64_t tiles = count_tiles(t);
    const int64_t lines_ahead = ceil_div(t.ahead.lines(), tiles * panels);
    const bool runs = has_runs(t);
    // Weights that no other block of pixels will read come from memory one panel ahead.
    const int64_t weight_bytes = at.k.size() * depth * kSize;
    const bool read_once = weight_bytes > kFewWeightBytes && blocks() <= kBlocksOnce &&
                           panels > panels_at_once(t, runs, 0, 1) &&
                           at.pixels() * depth * kSize <= kPixelBytes;
    if (weight_bytes <= kWeightBytes && !read_once) {
      // All weights stay in the second-level cache, so that a tile's pixels are read once.
      const int64_t end = at.pixels();
      const T* const fetched = results();
      const bool fetches_dst = !plan_.reads_neighbours && to_dst_ && depth > 0 &&
                               (!streams_ || epilogue_.residual != nullptr);
      const int64_t most_panels =
          std::max<int64_t>(1, kLinesAtOnce / std::max<int64_t>(1, lines_ahead));
      // Panels after each other write an even run of pixels as it lies in memory.
      c.runs = runs;
      const bool asks_results = c.runs && plan_.reads_neighbours && depth > 0 &&
                                (!streams_ || epilogue_.residual != nullptr);
      // Few terms do not repay a call for each run.
      if (plan_.reads_neighbours && depth > 0)
        c.runs_at_once = std::clamp<int64_t>(
            std::min(kTermsAtOnce / (panels * depth), tiles / kCallsEnough), 1, kRunsAtOnce);
      tile.next = tile.also = weights;
      tile.next_step = tile.also_step = 0;
      for_tiles(t, c, [&](const DirectPixels& group, int64_t first, int64_t rows) {
        const int64_t terms = panels * depth * ceil_div(rows, int64_t{kMaxRows});
        if (plan_.reads_neighbours && depth > 0 && first + rows < end) {
          tile.next = tile.a + t.src_offsets[first + rows] + last_tap_;
          tile.next_step = (t.src_offsets[first + rows] - t.src_offsets[first]) * kSize / terms;
        }
        if constexpr (std::is_same_v<T, A>) {
          if (asks_results && first + rows < end) {
            tile.also = fetched + dst_offset(at) + at.k.begin + t.dst_offsets[first + rows];
            tile.also_step = rows * tile.c_step * kSize / terms + 1;
            // In turn with each other no line may be left out.
            tile.also_apart = 2 * tile.also_step <= SourcePrefetch::kLine ? results_apart() : 0;
          }
          // What few terms write would wait for its lines.
          if (fetches_dst && first + rows < end) {
            tile.next = fetched + dst_offset(at) + at.k.begin + t.dst_offsets[first + rows];
            tile.next_step = rows * view_.dst.column * kSize / terms + 1;
          }
        }
        for (int64_t panel = 0, count; panel < panels; panel += count) {
          count = panels_at_once(t, c.runs && is_run(rows), panel, most_panels);
          if (plan_.reads_neighbours || fetches_dst)
            t.ahead.ask(lines_ahead * count);
          else
            t.ahead.give(lines_ahead * count, group.terms * count, &tile);
          run_tile(t, c, weights + panel * kPanel<A> * depth, panel, count, group, first, rows);
        }
      });
      if (c.last && view_.dst.c != 1) store_planes(t);
      return;
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      tile.next = panel + 1 < panels ? weights + (panel + 1) * kPanel<A> * depth : t.next_weights;
      tile.next_step = kPanel<A> * kSize / tiles;
      for_tiles(t, c, [&](const DirectPixels& group, int64_t first, int64_t rows) {
        t.ahead.ask(lines_ahead);
        run_tile(t, c, weights + panel * kPanel<A> * depth, panel, 1, group, first, rows);
      });
    }
    if (c.last && view_.dst.c != 1) store_planes(t);
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

  const T* src_;
  const A *weights_, *parts_;
  const T* unpacked_;
  const Epilogue<T>& epilogue_;
  int64_t zero_bias_;  // where panels of zeros lie behind the bias
  Buffer<A> bias_;     // [group][padded_filters]
  A high_;
  // Of several taps that are read in place: the one whose pixels no row before has read.
  int64_t last_tap_ = 0;
  bool to_dst_;                            // by the kernel
  bool streams_ = false, rounds_ = false;  // past the caches; by the kernel to a narrower type
  bool runs_;  // direct_run.h, or its like of pairs, computes pixels that lie evenly apart
};

}  // namespace torchconv::cpu
