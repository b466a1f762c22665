// dw = dz^T x over pairs of pixels: a term holds two neighbouring outputs of a row, and both
// operands are copied so, into scratch of the second-level cache.
//
// A chunk is a block of outputs (rows of a sample, or small samples whole). x becomes a band
// (channel_band.h with outputs that are pairs) whose element holds a pixel and the one that the
// next output reads, zero outside the image; all taps read it in place. dz becomes panels
// [pair][filters], the second half of a last odd pair being zero. Then a row of the product is a
// (channel, tap), a column a filter and a term a pair, which is what the tile of direct_tile.h
// computes. Where several blocks of channels need the panels, all are made beforehand. A task is a
// block of channels and of filters and a slab of chunks, and the slabs are added in order: blocks
// and slabs follow from the shape alone.
#include "cpu/pair_wgrad.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/buffer.h"
#include "cpu/channel_band.h"
#include "cpu/channel_pairs.h"
#include "cpu/conv_pack.h"
#include "cpu/microkernels/direct_tile.h"
#include "cpu/parallel_range.h"
#include "cpu/source_prefetch.h"
#include "cpu/winograd_groups.h"

namespace torchconv::cpu {
namespace {

using Bits = Vec<uint32_t>;
constexpr int64_t kL = Bits::kLanes;
constexpr int64_t kWidth = kPanel<float>;

// Outputs of a chunk: their sums stay in registers, and what they read, and what the next chunk
// reads, in the second-level cache.
constexpr int64_t kChunkPixels = kPairWgradPixels, kFewPixels = 256;
constexpr int64_t kChunkElements = 96 << 10;
constexpr int64_t kBandElements = (384 << 10) / 4;
constexpr int64_t kMostFilters = 512;
// Slabs are cut until there are about so many tasks, but none below kMinChunks chunks, and their
// partial gradients take at most about so many bytes.
constexpr int64_t kTasksWanted = 16, kMinChunks = 4, kPartialBytes = 16 << 20;
// Fewer filters leave a tile's vectors mostly empty: many taps are better summed along pixels then.
constexpr int64_t kFewestFilters = kL / 2, kFewTaps = 3;
// And in a group, of channels and of filters.
constexpr int64_t kFewestOfGroup = 16;

// The band's view: an output is a pair.
ConvView paired(const ConvView& view) {
  ConvView v = view;
  v.J = ceil_div(view.J, int64_t{2});
  v.step_w = 2 * view.step_w;
  return v;
}

// to[i] = (p[i], q[i]) for i < n; a null pointer stands for zeros. Whole vectors are written.
void zip_long_run(const BFloat16* p, const BFloat16* q, int64_t n, float* to, int64_t written) {
  int64_t i = 0;
  if (p != nullptr && q != nullptr)
    for (; i + 2 * kL <= n; i += 2 * kL) zip_two_vectors(p + i, q + i, to + i);
  for (; i < written; i += kL) {
    const int64_t left = std::min(kL, n - i);
    Bits::store_partial(to + i,
                        zip_pairs(p + i, p != nullptr ? left : 0, q + i, q != nullptr ? left : 0),
                        std::min(kL, written - i));
  }
}
TORCHCONV_INLINE void zip_run(const BFloat16* p, const BFloat16* q, int64_t n, float* to,
                              int64_t written) {
  if (p == nullptr || q == nullptr || written > 2 * kL) return zip_long_run(p, q, n, to, written);
  // Pixels of few channels, which come one by one.
  const int64_t first = std::min(kL, n);
  Bits::store_partial(to, zip_pairs(p, first, q, first), std::min(kL, written));
  if (written > kL)
    Bits::store_partial(to + kL, zip_pairs(p + kL, n - kL, q + kL, n - kL), written - kL);
}

class PairWgrad {
 public:
  // view: of a group; first: its channels' offset in x, which holds all of them.
  PairWgrad(const ConvView& view, const BFloat16* dz, const BFloat16* x, int64_t first,
            BFloat16* dw)
      : view_(flat_pixels(view)),
        pairs_(paired(view_)),
        dz_(dz),
        x_(x),
        first_(first),
        dw_(dw),
        taps_(static_cast<int64_t>(view.taps.size())),
        channels_inner_(view.src.c == 1) {
    const int64_t pixels = std::clamp(kChunkElements / (view_.C + std::min(view_.K, kMostFilters)),
                                      kFewPixels, kChunkPixels);
    columns_ = round_up(even_piece(view_.J, pixels), 2);
    rows_ = even_piece(view_.I, pixels / columns_);
    samples_ = 1;
    if (rows_ == view_.I && columns_ >= view_.J)
      samples_ = even_piece(view_.N, pixels / view_.pixels());
    blocks_j_ = ceil_div(view_.J, columns_);
    blocks_i_ = ceil_div(view_.I, rows_);
    chunks_ = ceil_div(view_.N, samples_) * blocks_i_ * blocks_j_;

    filters_ = round_up(even_piece(view_.K, kMostFilters), kWidth);
    filter_blocks_ = ceil_div(view_.K, filters_);
    const int64_t one = ChannelBand(pairs_, rows_, columns_ / 2, 1, sizeof(float)).size();
    channels_ = even_piece(view_.C, kBandElements / (one * samples_));
    const int64_t size = view_.terms() * round_up(view_.K, kWidth);
    const int64_t most = std::max<int64_t>(1, kPartialBytes / (4 * size));
    slabs_ = std::clamp<int64_t>(chunks_ / kMinChunks, 1, std::min(most, kTasksWanted));
    const int64_t blocks = ceil_div(kTasksWanted, slabs_ * filter_blocks_);
    channels_ = std::min(channels_, std::max(even_piece(view_.C, ceil_div(view_.C, blocks)),
                                             std::min<int64_t>(view_.C, 64)));
    channel_blocks_ = ceil_div(view_.C, channels_);
    slab_chunks_ = ceil_div(chunks_, slabs_);
    slabs_ = ceil_div(chunks_, slab_chunks_);
    partial_ = channels_ * taps_ * filters_;
  }

  bool run(const Parallel& pool) {
    const ChannelBand band(pairs_, rows_, columns_ / 2, channels_inner_ ? channels_ : 1,
                           sizeof(float));
    const int64_t sample = band.size() + (channels_inner_ ? 0 : kL);
    // Planes in different sets of a cache.
    const int64_t plane = channels_inner_ ? 1 : round_up(samples_ * sample, 32) + 16;
    const int64_t band_size = channels_inner_ ? samples_ * sample + kL : channels_ * plane;
    const int64_t most_pairs = samples_ * rows_ * columns_ / 2;
    const int64_t panel_size = most_pairs * filters_;
    const int64_t tasks = channel_blocks_ * filter_blocks_ * slabs_;
    const int64_t rows = channels_ * taps_;
    const WorkSplit split(
        tasks, static_cast<double>(partial_) * static_cast<double>(slab_chunks_ * most_pairs));
    const int64_t scratch_size =
        round_up(band_size, 16) + (channel_blocks_ > 1 ? 0 : round_up(panel_size, 16));
    Buffer<float> partials(tasks * partial_), scratch(split.slots * scratch_size);
    // [chunk][panels of all filters]
    const int64_t chunk_size = round_up(most_pairs * round_up(view_.K, kL), 16);
    const Buffer<float> shared(channel_blocks_ > 1 ? chunks_ * chunk_size : 0);
    if (channel_blocks_ > 1) {
      const WorkSplit chunks(chunks_, static_cast<double>(chunk_size));
      chunks.run(pool, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t chunk = begin; chunk < end; ++chunk)
          pack(block_at(chunk), {0, view_.K}, shared.get() + chunk * chunk_size);
      });
    }
    Buffer<int64_t> offsets(split.slots * 2 * rows);
    Buffer<int32_t> terms(split.slots * most_pairs);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* const source = scratch.get() + slot * scratch_size;
      float* const panels = source + round_up(band_size, 16);
      int64_t* const row_offsets = offsets.get() + slot * 2 * rows;
      int32_t* const term_offsets = terms.get() + slot * most_pairs;
      SourcePrefetch ahead;
      for (int64_t task = begin; task < end; ++task) {
        const Task t = task_at(task);
        for (int64_t m = 0; m < t.channels.size() * taps_; ++m) {
          const auto [c, tap] = row_at(t, m);
          row_offsets[m] = c * plane + band.tap_offset(view_.taps[tap]);
          row_offsets[rows + m] = m * filters_;
        }
        for (int64_t chunk = t.chunks.begin; chunk < t.chunks.end; ++chunk) {
          const Block b = block_at(chunk);
          if (chunk == t.chunks.begin || !b.same_size(block_at(chunk - 1)))
            fill_terms(band, b, sample, term_offsets);
          for (int64_t n = 0; n < b.n.size(); ++n)
            fill(band, b, b.n.begin + n, t.channels, plane, source + n * sample);
          const float* columns = panels;
          if (channel_blocks_ > 1)
            columns = shared.get() + chunk * chunk_size + t.filters.begin * b.depth();
          else
            pack(b, t.filters, panels);
          const bool same = chunk + 1 < t.chunks.end;
          ahead.clear();
          if (same || task + 1 < end) {
            const Task next = same ? t : task_at(task + 1);
            const int64_t first = same ? chunk + 1 : next.chunks.begin;
            const Block b_next = block_at(first);
            add_image(band, b_next, next, &ahead);
            if (channel_blocks_ > 1)
              ahead.add(shared.get() + first * chunk_size + next.filters.begin * b_next.depth(), 1,
                        0, b_next.depth() * next.filters.size() * int64_t{sizeof(float)});
            else
              add_gradient(b_next, next, &ahead);
          }
          multiply(t, source, row_offsets, row_offsets + rows, term_offsets,
                   static_cast<int32_t>(b.depth()), columns, chunk > t.chunks.begin,
                   partials.get() + task * partial_, &ahead);
        }
      }
    });
    finish(partials.get(), pool);
    return finite_.load();
  }

 private:
  struct Task {
    Range channels, filters, chunks;
  };
  struct Block {
    Range n, i, j;
    int64_t pairs() const { return ceil_div(j.size(), int64_t{2}); }
    int64_t depth() const { return n.size() * i.size() * pairs(); }
    bool same_size(const Block& b) const {
      return n.size() == b.n.size() && i.size() == b.i.size() && j.size() == b.j.size();
    }
  };
  struct Row {
    int64_t channel, tap;
  };

  static Range piece(int64_t index, int64_t size, int64_t total) {
    return {index * size, std::min((index + 1) * size, total)};
  }
  Task task_at(int64_t task) const {
    const int64_t slab = task % slabs_, block = task / slabs_;
    return {piece(block % channel_blocks_, channels_, view_.C),
            piece(block / channel_blocks_, filters_, view_.K), piece(slab, slab_chunks_, chunks_)};
  }
  Block block_at(int64_t chunk) const {
    return {piece(chunk / blocks_j_ / blocks_i_, samples_, view_.N),
            piece(chunk / blocks_j_ % blocks_i_, rows_, view_.I),
            piece(chunk % blocks_j_, columns_, view_.J)};
  }
  // Row m of a task's product, in the order of a filter of dw.
  Row row_at(const Task& t, int64_t m) const {
    const int64_t n = t.channels.size();
    return view_.weight_c == 1 ? Row{m % n, m / n} : Row{m / taps_, m % taps_};
  }

  // Where the band of a tap holds the block's pairs.
  static void fill_terms(const ChannelBand& band, const Block& b, int64_t sample, int32_t* terms) {
    for (int64_t n = 0; n < b.n.size(); ++n)
      for (int64_t i = 0; i < b.i.size(); ++i)
        for (int64_t j = 0; j < b.pairs(); ++j)
          *terms++ =
              static_cast<int32_t>(n * sample + i * band.row_step() + j * band.column_step());
  }

  // The band of a sample's block.
  void fill(const ChannelBand& band, const Block& b, int64_t n, Range channels, int64_t plane,
            float* to) const {
    const ConvStrides& s = view_.src;
    const BFloat16* src = x_ + first_ + n * s.n + channels.begin * s.c;
    band.rows.for_runs(
        b.i.begin, b.i.size(), [&](int64_t y, int64_t h, int64_t height, int64_t step_h) {
          for (const int64_t end = y + height; y < end; ++y, h += step_h) {
            const bool outside = h < 0 || h >= view_.H;
            band.columns.for_runs(
                b.j.begin / 2, b.pairs(), [&](int64_t p, int64_t w, int64_t count, int64_t step) {
                  Range lo = outside ? Range{0, 0} : valid_range(count, step, w, view_.W);
                  Range hi =
                      outside ? Range{0, 0} : valid_range(count, step, w + view_.step_w, view_.W);
                  float* row = to + y * band.row + p * band.pixel;
                  // Of position 0, which may not exist.
                  const int64_t at = h * s.row + w * s.column, next = view_.step_w * s.column;
                  const int64_t n = channels.size();
                  const Range both{std::max(lo.begin, hi.begin), std::min(lo.end, hi.end)};
                  if (channels_inner_ && step == 1 && band.pixel == n && s.column == n) {
                    // The channels of all positions are one run.
                    const auto run = [&](int64_t first, int64_t last, bool low, bool high) {
                      if (first >= last) return;
                      const BFloat16* from = src + at + first * n;
                      zip_run(low ? from : nullptr, high ? from + next : nullptr,
                              (last - first) * n, row + first * n, (last - first) * n);
                    };
                    if (both.begin >= both.end) {
                      for (int64_t i = 0; i < count; ++i)
                        run(i, i + 1, i >= lo.begin && i < lo.end, i >= hi.begin && i < hi.end);
                      return;
                    }
                    run(0, hi.begin, false, false);
                    run(hi.begin, lo.begin, false, true);
                    run(both.begin, both.end, true, true);
                    run(hi.end, lo.end, true, false);
                    run(lo.end, count, false, false);
                  } else if (channels_inner_) {
                    const BFloat16* from = src + at;
                    const int64_t pixel = step * s.column;
                    const auto edge = [&](int64_t i) {
                      zip_run(i >= lo.begin && i < lo.end ? from + i * pixel : nullptr,
                              i >= hi.begin && i < hi.end ? from + i * pixel + next : nullptr, n,
                              row + i * band.pixel, n);
                    };
                    int64_t i = 0;
                    for (; i < std::min(both.begin, count); ++i) edge(i);
                    if (n <= kL) {
                      const BFloat16* p = from + i * pixel;
                      for (; i < both.end; ++i, p += pixel)
                        Bits::store_partial(row + i * band.pixel, zip_pairs(p, n, p + next, n), n);
                    }
                    for (; i < count; ++i) edge(i);
                  } else {
                    fill_rows(src, channels.size(), at, step, count, lo, hi, row, plane);
                  }
                });
          }
        });
  }

  // Positions of rows of pixels that are neighbours: position i of a channel holds pixels at +
  // i*step and, an output further, at + i*step + step_w.
  void fill_rows(const BFloat16* src, int64_t channels, int64_t at, int64_t step, int64_t count,
                 Range lo, Range hi, float* to, int64_t plane) const {
    const int64_t next = view_.step_w, size = view_.N * view_.src.n;
    const bool vectors = step == 1 || (step == 2 && next == 1) || (step == 4 && next == 2);
    for (int64_t i = 0; i < count; i += kL) {
      const int64_t n = std::min(kL, count - i);
      const auto lane = Vec<int32_t>::iota() + static_cast<int32_t>(i);
      const auto within = [&](Range r) {
        return bit_cast<Bits::Type>(lane >= static_cast<int32_t>(r.begin)) &
               bit_cast<Bits::Type>(lane < static_cast<int32_t>(r.end));
      };
      const Bits::Type inside = (within(lo) & 0xffffu) | (within(hi) << 16);
      // Whole vectors may reach beyond the row, but not beyond the image.
      const int64_t reach = std::max(step * kL, kL + next);
      int64_t from = src - x_ + at + i * step;
      float* row = to + i;
      for (int64_t c = 0; c < channels; ++c, from += view_.src.c, row += plane) {
        if (vectors && from >= 0 && from + reach <= size) {
          Bits::store_partial(row, load_positions(x_ + from, step) & inside, n);
          continue;
        }
        for (int64_t l = 0; l < n; ++l) {
          const auto pixel = [&](Range r, int64_t offset) {
            return i + l >= r.begin && i + l < r.end ? x_[from + l * step + offset].bits : 0u;
          };
          row[l] = bit_cast<float>(pixel(lo, 0) | pixel(hi, next) << 16);
        }
      }
    }
  }

  // A vector of positions whose pixels are there, `step` as above.
  Bits::Type load_positions(const BFloat16* p, int64_t step) const {
    if (step == 1) return zip_pairs(p, kL, p + view_.step_w, kL);
    if (step == 2) return Bits::load(p);
    const Bits::Type a = Bits::load(p), b = Bits::load(p + 2 * kL);
    constexpr auto kAll = std::make_integer_sequence<int, kL>();
    return (alternate_lanes<0>(a, b, kAll) & 0xffffu) | alternate_lanes<1>(a, b, kAll) << 16;
  }

  // What a block's copies read.
  void add_image(const ChannelBand& band, const Block& b, const Task& t,
                 SourcePrefetch* ahead) const {
    constexpr int64_t kSize = sizeof(BFloat16);
    const ConvStrides& s = view_.src;
    const int64_t channels = t.channels.size();
    for (int64_t n = b.n.begin; n < b.n.end; ++n) {
      const BFloat16* src = x_ + first_ + n * s.n + t.channels.begin * s.c;
      if (!channels_inner_ && b.j.size() == view_.J) {
        band.for_image_rows(view_, b.i, [&](int64_t row, int64_t count) {
          ahead->add(src + row * s.row, channels, s.c * kSize,
                     ((count - 1) * s.row + view_.W) * kSize);
        });
        continue;
      }
      band.rows.for_runs(
          b.i.begin, b.i.size(), [&](int64_t, int64_t h, int64_t height, int64_t step_h) {
            for (; height > 0; --height, h += step_h) {
              if (h < 0 || h >= view_.H) continue;
              band.columns.for_runs(
                  b.j.begin / 2, b.pairs(), [&](int64_t, int64_t w, int64_t count, int64_t step) {
                    // All positions' pixels and the next outputs'.
                    const int64_t every = step == 1 ? 1 : view_.step_w;
                    const int64_t end =
                        std::min(w + (count - 1) * step + view_.step_w + 1, view_.W);
                    const int64_t first = w >= 0 ? w : w + ceil_div(-w, every) * every;
                    if (first >= end) return;
                    const BFloat16* from = src + h * s.row + first * s.column;
                    if (channels_inner_)
                      ahead->add(from, ceil_div(end - first, every), every * s.column * kSize,
                                 channels * kSize);
                    else
                      ahead->add(from, channels, s.c * kSize, (end - first) * kSize);
                  });
            }
          });
    }
  }
  void add_gradient(const Block& b, const Task& t, SourcePrefetch* ahead) const {
    constexpr int64_t kSize = sizeof(BFloat16);
    const ConvStrides& d = view_.dst;
    const int64_t filters = t.filters.size();
    for (int64_t n = b.n.begin; n < b.n.end; ++n) {
      const BFloat16* dst = dz_ + n * d.n + t.filters.begin * d.c + b.j.begin * d.column;
      if (d.c != 1 && b.j.size() == view_.J) {
        ahead->add(dst + b.i.begin * d.row, filters, d.c * kSize,
                   ((b.i.size() - 1) * d.row + view_.J) * kSize);
        continue;
      }
      for (int64_t i = b.i.begin; i < b.i.end; ++i) {
        if (d.c == 1)
          ahead->add(dst + i * d.row, b.j.size(), d.column * kSize, filters * kSize);
        else
          ahead->add(dst + i * d.row, filters, d.c * kSize, b.j.size() * kSize);
      }
    }
  }

  // The panels of a block: [panel][pair][kWidth], or of fewer vectors in the last.
  void pack(const Block& b, Range filters, float* panels) const {
    const int64_t depth = b.depth();
    // Where pixels are neighbours, whole rows of pairs are one row.
    const bool whole = view_.dst.column == 1 && view_.dst.row == b.j.size() && b.j.size() % 2 == 0;
    const int64_t rows = whole ? b.i.size() : 1, pixels = rows * b.j.size();
    for (int64_t k = filters.begin; k < filters.end; k += kWidth) {
      const int64_t n = std::min(kWidth, filters.end - k), width = round_up(n, kL);
      float* to = panels + (k - filters.begin) * depth;
      for (int64_t sample = b.n.begin; sample < b.n.end; ++sample)
        for (int64_t i = b.i.begin; i < b.i.end; i += rows) {
          const BFloat16* from = dz_ + sample * view_.dst.n + i * view_.dst.row +
                                 b.j.begin * view_.dst.column + k * view_.dst.c;
          if (view_.dst.c == 1)
            pack_channels(from, pixels, n, width, to);
          else
            pack_pixels(from, pixels, n, width, to);
          to += ceil_div(pixels, int64_t{2}) * width;
        }
    }
  }

  void pack_channels(const BFloat16* from, int64_t pixels, int64_t n, int64_t width,
                     float* to) const {
    const int64_t step = view_.dst.column;
    int64_t j = 0;
    if (n == 2 * kL)
      for (; j + 2 <= pixels; j += 2, from += 2 * step, to += width)
        zip_two_vectors(from, from + step, to);
    if (n == kL)
      for (; j + 2 <= pixels; j += 2, from += 2 * step, to += width)
        Bits::store(to, zip_pairs(from, kL, from + step, kL));
    for (; j < pixels; j += 2, from += 2 * step, to += width)
      zip_run(from, j + 1 < pixels ? from + step : nullptr, n, to, width);
  }

  void pack_pixels(const BFloat16* from, int64_t pixels, int64_t n, int64_t width,
                   float* to) const {
    using Halves = Vec<uint16_t, 2 * kL>;
    for (int64_t k = 0; k < width; k += kL) {
      const int64_t filters = std::min(kL, n - k);
      for (int64_t j = 0; j < pixels; j += 2 * kL) {
        const int64_t count = std::min(2 * kL, pixels - j);
        Bits::Type tile[kL];
#pragma GCC unroll 16
        for (int f = 0; f < kL; ++f)
          tile[f] = f < filters ? bit_cast<Bits::Type>(
                                      Halves::load_partial(from + (k + f) * view_.dst.c + j, count))
                                : Bits::Type{};
        transpose_steps<1>(tile);
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l)
          if (2 * l < count) Bits::store(to + (j / 2 + l) * width + k, tile[l]);
      }
    }
  }

  void multiply(const Task& t, const float* source, const int64_t* row_offsets,
                const int64_t* sum_offsets, const int32_t* terms, int32_t depth,
                const float* panels, bool accumulate, float* partial, SourcePrefetch* ahead) const {
    static constexpr float kZero[kWidth] = {};
    const TermSegment segment{0, depth, true, true};
    DirectTile<float> tile{};
    tile.a = source;
    tile.terms = terms;
    tile.segments = &segment;
    tile.lanes = kL;
    tile.panels = 1;
    tile.bias = kZero;
    const int64_t rows_of_tiles = ceil_div(t.channels.size() * taps_, kMaxRows);
    const int64_t lines =
        ceil_div(ahead->lines(), rows_of_tiles * ceil_div(t.filters.size(), kWidth));
    for (int64_t k = 0; k < t.filters.size(); k += kWidth) {
      const int64_t vectors = ceil_div(std::min(kWidth, t.filters.size() - k), kL);
      tile.b = panels + k * depth;
      tile.c = partial + k;
      tile.before = accumulate ? tile.c : nullptr;
      tile.next = tile.b;
      for_row_tiles(t.channels.size() * taps_, [&](int64_t first, int64_t rows) {
        ahead->give(lines, depth, &tile);
        tile.pixels = row_offsets + first;
        tile.c_rows = sum_offsets + first;
        direct_pair_microkernel(rows, vectors)(tile);
      });
    }
  }

  // dw from the slabs' sums.
  void finish(const float* partials, const Parallel& pool) {
    using V = WideVec<BFloat16>;
    const int64_t strips = ceil_div(channels_ * taps_, kL),
                  blocks = channel_blocks_ * filter_blocks_;
    const WorkSplit split(blocks * strips, static_cast<double>(kL * filters_ * (slabs_ + 1)));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      auto check = V::Type{};  // NaN once any element is not finite
      for (int64_t item = begin; item < end; ++item) {
        const Task t = task_at(item / strips * slabs_);
        const int64_t m = item % strips * kL;
        const int64_t rows = std::min(kL, t.channels.size() * taps_ - m);
        if (rows <= 0) continue;
        int64_t at[kL];
        bool neighbours = true;
        for (int64_t r = 0; r < rows; ++r) {
          const auto [c, tap] = row_at(t, m + r);
          at[r] = (t.channels.begin + c) * view_.weight_c + view_.taps[tap].weight;
          neighbours = neighbours && at[r] == at[0] + r;
        }
        for (int64_t k = 0; k < t.filters.size(); k += kL) {
          const int64_t filters = std::min(kL, t.filters.size() - k);
          const float* from = partials + item / strips * slabs_ * partial_ + m * filters_ + k;
          V::Type tile[kL] = {};
          for (int64_t slab = 0; slab < slabs_; ++slab, from += partial_)
#pragma GCC unroll 16
            for (int r = 0; r < kL; ++r)
              if (r < rows) tile[r] += V::Registers::load(from + r * filters_);
#pragma GCC unroll 16
          for (int r = 0; r < kL; ++r) check += tile[r] * 0.0f;
          transpose_steps<1>(tile);
          BFloat16* to = dw_ + (t.filters.begin + k) * view_.weight_k;
          if (neighbours) {
#pragma GCC unroll 16
            for (int l = 0; l < kL; ++l)
              if (l < filters) V::store_partial(to + l * view_.weight_k + at[0], tile[l], rows);
          } else {
            alignas(64) float lanes[kL];
#pragma GCC unroll 16
            for (int l = 0; l < kL; ++l) {
              if (l >= filters) continue;
              V::Registers::store(lanes, tile[l]);
              for (int64_t r = 0; r < rows; ++r)
                to[l * view_.weight_k + at[r]] = from_wide<BFloat16>(lanes[r]);
            }
          }
        }
      }
      bool finite = true;
      for (int l = 0; l < kL; ++l) finite = finite && check[l] == 0;
      if (!finite) finite_.store(false);
    });
  }

  const ConvView view_, pairs_;
  const BFloat16* dz_;
  const BFloat16* x_;
  int64_t first_;
  BFloat16* dw_;
  int64_t taps_;
  bool channels_inner_;
  int64_t columns_, rows_, samples_;  // of a chunk
  int64_t blocks_j_, blocks_i_, chunks_;
  int64_t filters_, filter_blocks_, channels_, channel_blocks_;
  int64_t slabs_, slab_chunks_, partial_;
  std::atomic<bool> finite_{true};
};

}  // namespace

bool pair_wgrad_applies(const ConvView& view) {
  const bool fills = view.groups > 1 ? std::min(view.C, view.K) >= kFewestOfGroup
                                     : view.K >= kFewestFilters ||
                                           static_cast<int64_t>(view.taps.size()) <= kFewTaps;
  return has_pair_products() && fills &&
         ChannelBand(paired(view), 1, std::min(ceil_div(view.J, int64_t{2}), kChunkPixels / 2), 1,
                     sizeof(float))
                 .size() <= kBandElements;
}

bool pair_wgrad(const ConvView& view, const BFloat16* dz, const BFloat16* x, BFloat16* dw,
                const Parallel& pool) {
  std::atomic<bool> finite{true};
  const ConvView group = winograd::group_of(view, 0);
  const double products =
      static_cast<double>(view.N * view.pixels()) * static_cast<double>(view.K * view.terms()) / 2;
  winograd::for_groups(view.groups, products, pool, [&](int64_t g, const Parallel& inner) {
    if (!PairWgrad(group, dz + g * view.K * view.dst.c, x, g * view.C * view.src.c,
                   dw + g * view.weight_group)
             .run(inner))
      finite = false;
  });
  return finite;
}

}  // namespace torchconv::cpu
