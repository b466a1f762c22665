// The weight gradient as a product over pixels, dw = dz^T x for each tap, on the images where they
// lie.
//
// One operand supplies rows, channels read one element at a time with any distance between pixels;
// the other columns, channels side by side in a vector. Where channels are innermost neither is
// copied; where pixels are, the columns are transposed, some panels and a chunk of pixels at a
// time. A task is a block of rows, some panels of columns and a slab of pixels. It adds its
// products to a partial gradient, chunk by chunk; the slabs are added in order at the end. Slabs
// and blocks follow from the shape alone, so that the bits do not depend on the number of threads.
//
// While a stripe of panels is multiplied, what the next one reads is fetched into cache: the images
// are read in pieces too short for the hardware to foresee.
#include "cpu/conv_wgrad.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "core/buffer.h"
#include "cpu/compensated_sum.h"
#include "cpu/conv_pack.h"
#include "cpu/microkernels/pixel_product.h"
#include "cpu/parallel_range.h"
#include "cpu/slabs.h"
#include "cpu/wgrad_band.h"
#include "cpu/wgrad_pixels.h"
#include "cpu/wide_array.h"

namespace torchconv::cpu {
namespace {

// Rows of a block, (channel, tap), and their channels: what a chunk reads stays in a second-level
// cache of 1 MB for all panels of columns.
constexpr int64_t kRows = 1024;
constexpr int64_t kRowChannels = 256;
// Fewer row channels than two tiles are padded, so that a tile can hold several taps.
constexpr int64_t kBandChannels = 2 * kProductRows;
// Columns of a stripe: as many, for the same reason.
constexpr int64_t kStripeColumns = 256;
// Slabs are cut until there are about this many tasks, but none below kMinChunks chunks.
constexpr int64_t kTasksWanted = 32;
constexpr int64_t kMinChunks = 4;
// Chunks that are added up plainly; their sums are added with compensation, so that the rounding
// error does not grow with the number of pixels.
constexpr int64_t kFlushChunks = 64;
// Partial gradients take at most about this many bytes, and half the slabs will do where they would
// take more than the second-level caches of a few cores.
constexpr int64_t kPartialBytes = 64 << 20;
constexpr int64_t kCheapPartialBytes = 1 << 20;

template <typename A>
class ConvWgrad {
 public:
  static constexpr int64_t kL = kLanes<A>;
  // Columns that are summed over the slabs at a time: each slab's are one run of memory.
  static constexpr int64_t kStrip = 8 * kL;

  ConvWgrad(const ConvView& view, const A* dz, const A* x, bool band)
      : view_(view), dz_(dz), x_(x), pixels_(view), taps_(static_cast<int64_t>(view.taps.size())) {
    choose_columns(band);
    vectors_ = ceil_div(columns_.channels, kL);
    panels_ = ceil_div(vectors_, kProductVectors);
    width_ = ceil_div(vectors_, panels_) * kL;
    stripe_ = std::max<int64_t>(1, kStripeColumns / width_);
    ld_ = vectors_ * kL;
    const int64_t most = std::min(kRowChannels, std::max<int64_t>(1, kRows / taps_));
    blocks_ = ceil_div(rows_.channels, most);
    block_ = ceil_div(rows_.channels, blocks_);
    blocks_ = ceil_div(rows_.channels, block_);
    if (band && filters_ && taps_ > 1 && !pixels_.shared() && block_ < kBandChannels)
      band_.emplace(view, pixels_, block_);
    if (band_ && !band_->fits()) band_.reset();
    neighbours_ =
        across_ || (!band_ && vectors_ == 1 && rows_.stride == 1 && block_ > kProductRows);
    partial_ = block_ * taps_ * ld_;
    const int64_t tasks = view.groups * blocks_;
    const int64_t bytes = std::max<int64_t>(1, tasks * partial_ * static_cast<int64_t>(sizeof(A)));
    const int64_t wanted =
        std::clamp(kCheapPartialBytes / bytes * tasks, kTasksWanted / 2, kTasksWanted);
    slabs_ = std::min(ceil_div(wanted, tasks), pixels_.chunks() / kMinChunks);
    slabs_ = even_slabs(std::max<int64_t>(1, std::min(slabs_, kPartialBytes / bytes)));
    slab_chunks_ = ceil_div(pixels_.chunks(), slabs_);
    compensated_ = slab_chunks_ > kFlushChunks;
    parts_ = std::min(panels_, ceil_div(kTasksWanted / 2, tasks * slabs_));
  }

  // False where a band was used and an element is not finite: padding that is multiplied by
  // infinity or NaN gives NaN, so that the caller has to do without a band.
  template <typename T>
  bool run(T* dw, const Parallel& pool) {
    const int64_t tasks = view_.groups * blocks_ * slabs_ * parts_;
    const WorkSplit split(tasks, static_cast<double>(slab_chunks_ * pixels_.chunk()) *
                                     static_cast<double>(partial_ / parts_));
    const int64_t stripe_size =
        columns_in_place_ ? 0 : std::min(stripe_, panels_) * pixels_.chunk() * width_;
    const int64_t pieces = pixels_.max_pieces();
    // A single slab is finished at once, while it is in cache, or it is dw itself.
    const int64_t partials = tasks / parts_;
    const bool by_slot = slabs_ == 1 && split.slots < partials;
    A* in_place = nullptr;
    if constexpr (std::is_same_v<T, A>)
      if (sums_in_place()) in_place = dw;
    // What is written once.
    const bool streams =
        in_place != nullptr && pixels_.chunks() == 1 &&
        WideVec<A>::streams(in_place, view_.groups * view_.K * view_.weight_k, view_.weight_k);
    Buffer<A> partial(in_place != nullptr ? 0 : (by_slot ? split.slots : partials) * partial_);
    Buffer<A> totals(compensated_ ? 2 * (by_slot ? split.slots : partials) * partial_ : 0);
    const int64_t band_size = band_ ? round_up(band_->size(), 16) : 0;
    Buffer<A> stripes(split.slots * stripe_size);
    Buffer<A> bands(split.slots * band_size);
    Buffer<PixelPiece> piece_lists(split.slots * 2 * pieces);
    Buffer<TapPixels> tap_lists(split.slots * pieces);
    Buffer<ProductRun> run_lists(split.slots * pieces);
    const int64_t ranges = pixels_.max_ranges();
    Buffer<Range> range_lists(split.slots * ranges);
    Buffer<uint64_t> fetch_lists(split.slots * (FetchList::kCapacity + FetchList::kSlack));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      Scratch s{
          stripes.get() + slot * stripe_size,
          bands.get() + slot * band_size,
          {piece_lists.get() + slot * 2 * pieces, piece_lists.get() + (slot * 2 + 1) * pieces},
          tap_lists.get() + slot * pieces,
          run_lists.get() + slot * pieces,
          range_lists.get() + slot * ranges,
          FetchList(fetch_lists.get() + slot * (FetchList::kCapacity + FetchList::kSlack))};
      for (int64_t task = begin; task < end; ++task) {
        Task t;
        const int64_t part = task % parts_;
        t.first_panel = part * panels_ / parts_;
        t.last_panel = (part + 1) * panels_ / parts_;
        t.slab = task / parts_ % slabs_;
        const int64_t block = task / parts_ / slabs_ % blocks_;
        t.group = task / parts_ / slabs_ / blocks_;
        t.row = block * block_;
        t.rows = std::min(block_, rows_.channels - t.row);
        const int64_t own = by_slot ? slot : task / parts_;
        t.partial = partial.get() + own * partial_;
        t.in_place = in_place != nullptr;
        t.streams = streams;
        if (t.in_place)
          t.partial = in_place + t.group * view_.weight_group + t.row * view_.weight_k;
        t.totals = totals.get() + 2 * own * partial_;
        accumulate(t, s);
        if (slabs_ == 1 && !t.in_place)
          for (int64_t row = 0; row < t.rows * taps_; row += kL) finish_rows(t, row, t.partial, dw);
      }
      if (streams) stream_fence();
    });
    if (slabs_ > 1) finish(partial.get(), dw, pool);
    return !band_ || finite_.load();
  }

 private:
  // The channels of one group that rows or columns stand for.
  struct Operand {
    const A* data;
    int64_t channels, stride, step;
  };
  struct Scratch {
    A* stripe;  // [panel][pixel of the chunk][width_]
    A* band;
    PixelPiece* pieces[2];
    TapPixels* pixels;
    ProductRun* runs;
    Range* ranges;
    FetchList fetch;
  };
  // The first `count` of the runs in scratch, and their pixels.
  struct Runs {
    int64_t count, pixels;
  };
  struct Task {
    int64_t group, slab;
    int64_t row, rows;  // channels
    int64_t first_panel, last_panel;
    bool in_place, streams;
    A* partial;  // [rows x taps][ld_], or in place the task's part of dw
    A* totals;   // two of these, if compensated: sums of partial, and what rounding lost of them
  };

  // Columns cost a register tile for every vector and, unless they are read in place, a copy.
  void choose_columns(bool band) {
    const Operand dz{dz_, view_.K, view_.dst.c, pixels_.dz_step()};
    const Operand x{x_, view_.C, view_.src.c, pixels_.x_step()};
    const auto in_place = [](const Operand& o) { return o.stride == 1 && o.channels % kL == 0; };
    const auto cost = [&](const Operand& columns, const Operand& rows) {
      const int64_t products = ceil_div(columns.channels, kL) * rows.channels * taps_;
      return products + (in_place(columns) ? 0 : columns.channels / 4);
    };
    // Columns that are channels give rows of dw where these are innermost there.
    filters_ = !(in_place(x) || taps_ == 1) || cost(dz, x) < cost(x, dz) ||
               (cost(dz, x) == cost(x, dz) && view_.weight_c != 1);
    rows_ = filters_ ? x : dz;
    columns_ = filters_ ? dz : x;
    columns_in_place_ = in_place(columns_);
    // Pixels of one vector: a tile takes several taps of them, which read a row's element once. A
    // band copies them as a run of memory.
    across_ = x.channels == kL && x.stride == 1 && dz.stride == 1 && dz.channels > kProductRows &&
              taps_ > 1 && (pixels_.shared() || (band && view_.groups == 1));
    if (across_ && !pixels_.shared()) {
      band_.emplace(view_, pixels_, view_.C);
      across_ = band_->fits();
    }
    if (!across_) return;
    filters_ = false;
    rows_ = dz;
    columns_ = x;
    columns_in_place_ = true;
  }

  // The order of the rows of a partial gradient, as close to that of dw as blocks allow.
  bool taps_inner() const { return !filters_ || view_.weight_c != 1; }

  // Whether columns are whole vectors of dw, and a single slab's sums those of dw.
  bool sums_in_place() const {
    return slabs_ == 1 && !compensated_ && !filters_ && !across_ && view_.weight_c == 1 &&
           columns_.channels % kL == 0;
  }

  void accumulate(const Task& t, Scratch& s) const {
    const int64_t first = t.slab * pixels_.chunks() / slabs_;
    const int64_t last = (t.slab + 1) * pixels_.chunks() / slabs_;
    PixelPiece* pieces = s.pieces[0];
    PixelPiece* next = s.pieces[1];
    int64_t count = pixels_.pieces(first, pieces);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t next_count = chunk + 1 < last ? pixels_.pieces(chunk + 1, next) : 0;
      const Runs shared = shared_rows() ? plan_runs(t, 0, pieces, count, s) : Runs{0, 0};
      for (int64_t first_panel = t.first_panel; first_panel < t.last_panel;) {
        const Range panels = stripe(t, first_panel);
        s.fetch.clear();
        if (panels.end < t.last_panel) {
          fetch_columns(t, stripe(t, panels.end), pieces, count, s);
        } else {
          // The band is copied first.
          const bool rows_first = !band_ || filters_;
          if (rows_first) fetch_rows(t, next, next_count, s);
          fetch_columns(t, stripe(t, t.first_panel), next, next_count, s);
          if (!rows_first) fetch_rows(t, next, next_count, s);
        }
        s.fetch.close(s.runs);
        multiply(t, panels, pieces, count, shared,
                 compensated_ ? (chunk - first) % kFlushChunks > 0 : chunk > first, s);
        first_panel = panels.end;
      }
      if (compensated_ && ((chunk - first) % kFlushChunks == kFlushChunks - 1 || chunk + 1 == last))
        flush(t, chunk - first < kFlushChunks, chunk + 1 == last);
      std::swap(pieces, next);
      count = next_count;
    }
  }

  void flush(const Task& t, bool first, bool last) const {
    const int64_t begin = panel_begin(t.first_panel), end = panel_begin(t.last_panel);
    for (int64_t row = 0; row < t.rows * taps_; ++row) {
      const int64_t at = row * ld_ + begin;
      add_compensated(t.partial + at, end - begin, first, last, t.totals + 2 * at);
    }
  }

  int64_t panel_begin(int64_t panel) const {
    return (panel * (vectors_ / panels_) + std::min(panel, vectors_ % panels_)) * kL;
  }
  Range stripe(const Task& t, int64_t first) const {
    return {first, std::min(first + stripe_, t.last_panel)};
  }
  int64_t panel_channels(int64_t panel) const {
    return std::min(panel_begin(panel + 1), columns_.channels) - panel_begin(panel);
  }
  // Whether the runs of one tap are those of all, and a tile holds rows of several.
  bool shared_rows() const { return filters_ && !neighbours_ && (band_ || pixels_.shared()); }

  // `shared` are the runs of all taps, where they are shared.
  void multiply(const Task& t, Range panels, const PixelPiece* pieces, int64_t count,
                const Runs& shared, bool accumulate, Scratch& s) const {
    const A* rows = rows_.data + (t.group * rows_.channels + t.row) * rows_.stride;
    const A* columns = columns_.data + t.group * columns_.channels * columns_.stride;
    PixelProduct<A> tile;
    tile.row_step = band_ && filters_ ? band_->step() : rows_.step;
    tile.column_step = band_ && !filters_  ? band_->step()
                       : columns_in_place_ ? columns_.step
                                           : width_;
    tile.accumulate = accumulate;
    tile.stream = t.streams;
    tile.runs = s.runs;
    const int64_t panel_size = pixels_.chunk() * width_;
    if (!columns_in_place_)
      for (int64_t panel = panels.begin; panel < panels.end; ++panel)
        pack_panel(columns + panel_begin(panel) * columns_.stride, panel_channels(panel), pieces,
                   count, s, s.stripe + (panel - panels.begin) * panel_size);
    if (across_) return multiply_across(t, pieces, count, rows, columns, tile, s);
    int64_t fetched = 0;
    // `total` rows, whose first pixels `locate` lists in order and whose sums start at `sums`.
    const auto multiply_rows = [&](int64_t total, const Runs& runs, A* sums, auto&& locate) {
      const int64_t tiles = ceil_div(total, neighbours_ ? neighbour_rows(1) : kProductRows);
      tile.apart[0] = 0;
      tile.run_count = runs.count;
      int64_t row = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t n = total / tiles + (i < total % tiles ? 1 : 0);
        for (int64_t m = 0; m < n; ++m) {
          const A* first_pixel = locate();
          if (m == 0 || !neighbours_) tile.rows[m] = first_pixel;
        }
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
          const int64_t begin = panel_begin(panel);
          tile.columns =
              columns_in_place_ ? columns + begin : s.stripe + (panel - panels.begin) * panel_size;
          tile.sum = sums + row * tile.sum_stride + begin;
          tile.fetch = s.fetch.from(fetched);
          fetched += runs.pixels;
          if (neighbours_)
            pixel_product_neighbours_kernel<A>(n, 1)(tile);
          else
            pixel_product_kernel<A>(n, (panel_begin(panel + 1) - begin) / kL)(tile);
        }
        row += n;
      }
    };
    if (shared_rows()) {
      tile.sum_stride = ld_;
      const int64_t stride = band_ ? band_->channel_stride() : rows_.stride;
      int64_t channel = 0, tap = 0;
      multiply_rows(t.rows * taps_, shared, t.partial, [&] {
        const A* row = (band_ ? s.band + band_->tap_offset(tap) : rows + pixels_.tap_offset(tap)) +
                       channel * stride;
        int64_t& inner = taps_inner() ? tap : channel;
        int64_t& outer = taps_inner() ? channel : tap;
        if (++inner == (taps_inner() ? taps_ : t.rows)) {
          inner = 0;
          ++outer;
        }
        return row;
      });
      return;
    }
    const bool in_place = t.in_place;
    tile.sum_stride = in_place ? view_.weight_k : (taps_inner() ? taps_ : 1) * ld_;
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const Runs runs = plan_runs(t, tap, pieces, count, s);
      if (runs.count == 0 && accumulate) continue;
      const int64_t first =
          in_place ? view_.taps[tap].weight : (taps_inner() ? tap : tap * t.rows) * ld_;
      multiply_rows(t.rows, runs, t.partial + first, [row = rows, stride = rows_.stride]() mutable {
        return std::exchange(row, row + stride);
      });
    }
  }

  // All taps of x, some at a time, by rows of dz. `tile` has what does not change.
  void multiply_across(const Task& t, const PixelPiece* pieces, int64_t count, const A* rows,
                       const A* columns, PixelProduct<A> tile, Scratch& s) const {
    const Runs runs = plan_runs(t, 0, pieces, count, s);
    tile.run_count = runs.count;
    tile.columns = band_ ? s.band : columns;
    tile.sum_stride = taps_ * ld_;
    const int64_t groups = ceil_div(taps_, kNeighbourVectors);
    int64_t fetched = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * taps_ / groups, taps = (g + 1) * taps_ / groups - first;
      for (int64_t v = 0; v < taps; ++v)
        tile.apart[v] = band_ ? band_->tap_offset(first + v) : pixels_.tap_offset(first + v);
      const int64_t tiles = ceil_div(t.rows, neighbour_rows(static_cast<int>(taps)));
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t row = i * t.rows / tiles;
        tile.rows[0] = rows + row;
        tile.sum = t.partial + (row * taps_ + first) * ld_;
        tile.fetch = s.fetch.from(fetched);
        fetched += runs.pixels;
        pixel_product_neighbours_kernel<A>((i + 1) * t.rows / tiles - row, taps)(tile);
      }
    }
  }

  // The runs of a tap, into s.runs. Fills the band too.
  Runs plan_runs(const Task& t, int64_t tap, const PixelPiece* pieces, int64_t count,
                 Scratch& s) const {
    Runs runs{0, 0};
    if (band_) {
      const int64_t c = t.group * view_.C + (filters_ ? t.row : 0);
      runs.count = band_->fill(x_ + c * view_.src.c, filters_ ? t.rows : view_.C, pieces, count,
                               s.band, s.pixels);
    } else {
      runs.count = pixels_.tap_pixels(tap, pieces, count, s.pixels);
    }
    for (int64_t r = 0; r < runs.count; ++r) {
      const TapPixels& p = s.pixels[r];
      const int64_t column = filters_ ? p.dz : p.x;
      s.runs[r] = {filters_ ? p.x : p.dz, columns_in_place_ ? column : p.term * width_, p.count};
      runs.pixels += p.count;
    }
    return runs;
  }

  // ---- Columns that are not read in place.

  void pack_panel(const A* src, int64_t channels, const PixelPiece* pieces, int64_t count,
                  Scratch& s, A* panel) const {
    const int64_t runs = filters_ ? pixels_.dz_pixels(pieces, count, s.pixels)
                                  : pixels_.tap_pixels(0, pieces, count, s.pixels);
    for (int64_t r = 0; r < runs; ++r) {
      const TapPixels& run = s.pixels[r];
      const A* from = src + (filters_ ? run.dz : run.x);
      A* to = panel + run.term * width_;
      if (columns_.stride == 1) {
        for (int64_t i = 0; i < run.count; ++i, from += columns_.step, to += width_)
          copy_padded_row(to, from, 1, 0, channels, channels);
      } else {
        for (int64_t c = 0; c < channels; c += kL)
          transpose_columns(from + c * columns_.stride, std::min(kL, channels - c), run.count,
                            to + c);
      }
    }
  }

  // to[i*width_ + c] = from[c*stride + i*step] for c < n, zero for the other lanes of the vector.
  void transpose_columns(const A* from, int64_t n, int64_t count, A* to) const {
    using V = WideVec<A>;
    for (int64_t i = 0; i < count; i += kL, from += kL * columns_.step, to += kL * width_) {
      const int64_t last = std::min(kL, count - i);
      typename V::Type tile[kL];
      if (columns_.step == 1 && last == kL && n == kL) {
#pragma GCC unroll 16
        for (int c = 0; c < kL; ++c) tile[c] = V::load(from + c * columns_.stride);
      } else if (columns_.step == 1) {
#pragma GCC unroll 16
        for (int c = 0; c < kL; ++c)
          tile[c] = c < n ? V::load_partial(from + c * columns_.stride, last) : typename V::Type{};
      } else {
#pragma GCC unroll 16
        for (int c = 0; c < kL; ++c)
          tile[c] = c < n ? load_lanes_strided(from + c * columns_.stride, columns_.step, 0, last,
                                               i + kL < count)
                          : typename V::Type{};
      }
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l)
        if (l < last) V::Registers::store(to + l * width_, tile[l]);
    }
  }

  // ---- What the next panel or chunk reads.

  void fetch_rows(const Task& t, const PixelPiece* pieces, int64_t count, Scratch& s) const {
    const int64_t c = t.group * rows_.channels + t.row;
    if (filters_)
      pixels_.fetch_x(x_, sizeof(A), c, t.rows, pieces, count, s.ranges, &s.fetch);
    else
      pixels_.fetch_dz(dz_, sizeof(A), c, t.rows, pieces, count, s.ranges, &s.fetch);
  }

  void fetch_columns(const Task& t, Range panels, const PixelPiece* pieces, int64_t count,
                     Scratch& s) const {
    const int64_t begin = panel_begin(panels.begin);
    const int64_t n = std::min(panel_begin(panels.end), columns_.channels) - begin;
    const int64_t c = t.group * columns_.channels + begin;
    if (filters_)
      pixels_.fetch_dz(dz_, sizeof(A), c, n, pieces, count, s.ranges, &s.fetch);
    else
      pixels_.fetch_x(x_, sizeof(A), c, n, pieces, count, s.ranges, &s.fetch);
  }

  // ---- dw from the slabs' partial gradients, in order.

  int64_t weight(const Task& t, int64_t row) const {
    const int64_t channel = t.row + (taps_inner() ? row / taps_ : row % t.rows);
    const ConvTap& tap = view_.taps[taps_inner() ? row % taps_ : row / t.rows];
    return channel * (filters_ ? view_.weight_c : view_.weight_k) + tap.weight;
  }

  template <typename T>
  void finish(const A* partial, T* dw, const Parallel& pool) {
    const int64_t strips = ceil_div(block_ * taps_, kL);
    // Most is in another core's cache.
    const WorkSplit split(
        view_.groups * blocks_ * strips,
        kFarAddition * static_cast<double>(kL * ld_) * static_cast<double>(slabs_ + 1));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t item = begin; item < end; ++item) {
        Task t;
        t.group = item / strips / blocks_;
        t.row = item / strips % blocks_ * block_;
        t.rows = std::min(block_, rows_.channels - t.row);
        t.first_panel = 0;
        t.last_panel = panels_;
        const int64_t row = item % strips * kL;
        // The last block may have fewer strips.
        if (row < t.rows * taps_)
          finish_rows(t, row, partial + item / strips * slabs_ * partial_, dw);
      }
    });
  }

  // At most a vector of rows, from `row` on, of a task's panels.
  template <typename T>
  void finish_rows(const Task& t, int64_t row, const A* partial, T* dw) {
    const int64_t n = std::min(kL, t.rows * taps_ - row);
    const int64_t end = std::min(panel_begin(t.last_panel), columns_.channels);
    for (int64_t column = panel_begin(t.first_panel); column < end; column += kStrip)
      finish_strip(t, row, n, {column, std::min(column + kStrip, end)},
                   partial + row * ld_ + column, dw + t.group * view_.weight_group);
  }

  // n rows of the block, and at most kStrip columns.
  template <typename T>
  void finish_strip(const Task& t, int64_t row, int64_t n, Range columns, const A* partial, T* dw) {
    using V = WideVec<T>;
    alignas(kVectorBytes) A sums[kL * kStrip];
    const int64_t vectors = ceil_div(columns.size(), kL);
    auto check = typename V::Type{};  // NaN once any element is not finite
    int64_t at[kL];
    bool neighbours = true;
    for (int64_t r = 0; r < n; ++r) {
      at[r] = weight(t, row + r);
      neighbours = neighbours && at[r] == at[0] + r;
      A* to = sums + r * kStrip;
      for (int64_t slab = 0; slab < slabs_; ++slab)
        for (int64_t v = 0; v < vectors * kL; v += kL) {
          auto sum = V::Registers::load(partial + slab * partial_ + r * ld_ + v);
          if (slab > 0) sum += V::Registers::load(to + v);
          if (slab == slabs_ - 1) check += sum * 0;
          V::Registers::store(to + v, sum);
        }
    }
    const int64_t step = filters_ ? view_.weight_k : view_.weight_c;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t column = columns.begin + v * kL;
      const int64_t lanes = std::min(kL, columns.end - column);
      typename V::Type tile[kL];
#pragma GCC unroll 16
      for (int r = 0; r < kL; ++r)
        tile[r] = r < n ? V::Registers::load(sums + r * kStrip + v * kL) : typename V::Type{};
      T* to = dw + column * step;
      if (step == 1) {
#pragma GCC unroll 16
        for (int r = 0; r < kL; ++r)
          if (r < n) V::store_partial(to + at[r], tile[r], lanes);
      } else if (neighbours) {
        transpose_steps<1>(tile);
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l)
          if (l < lanes) V::store_partial(to + l * step + at[0], tile[l], n);
      } else {
        for (int64_t r = 0; r < n; ++r)
          for (int64_t l = 0; l < lanes; ++l)
            to[l * step + at[r]] = from_wide<T>(sums[r * kStrip + v * kL + l]);
      }
    }
    bool finite = true;
    for (int l = 0; l < kL; ++l) finite = finite && check[l] == 0;
    if (!finite) finite_.store(false);
  }

  const ConvView& view_;
  const A* dz_;
  const A* x_;
  WgradPixels pixels_;
  int64_t taps_;
  bool filters_;  // columns are filters and rows (channel, tap); else the other way round
  bool columns_in_place_;
  std::optional<WgradBand> band_;
  std::atomic<bool> finite_{true};
  Operand rows_, columns_;
  int64_t vectors_, panels_, width_, stripe_, ld_;  // of columns
  int64_t blocks_, block_;                          // of row channels
  int64_t partial_, slabs_, slab_chunks_, parts_;   // slabs have this many chunks or one less
  bool compensated_;
  bool neighbours_;  // a tile's rows are channels side by side, one tap's or dz's
  bool across_;      // its vectors are a pixel's, seen through several taps
};

}  // namespace

template <typename T>
void conv_wgrad(const ConvView& view, const T* dz, const T* x, T* dw, const Parallel& pool) {
  const WideArray<T> wide_dz(dz, view.N * view.dst.n, pool), wide_x(x, view.N * view.src.n, pool);
  if (!ConvWgrad<Wide<T>>(view, wide_dz.get(), wide_x.get(), true).run(dw, pool))
    ConvWgrad<Wide<T>>(view, wide_dz.get(), wide_x.get(), false).run(dw, pool);
}

template void conv_wgrad(const ConvView&, const float*, const float*, float*, const Parallel&);
template void conv_wgrad(const ConvView&, const double*, const double*, double*, const Parallel&);
template void conv_wgrad(const ConvView&, const BFloat16*, const BFloat16*, BFloat16*,
                         const Parallel&);
template void conv_wgrad(const ConvView&, const Float16*, const Float16*, Float16*,
                         const Parallel&);

}  // namespace torchconv::cpu
