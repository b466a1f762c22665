// Blocking and order of Winograd's convolution. The transforms are in winograd_{input,weights,
// output}, what lies where in winograd_tiles.h.
//
// With many tiles a task owns a block of them whose V and M stay in the second-level cache, and
// walks over all of U, which is transformed once before. With few tiles and many filters it is the
// other way round: V of all tiles is made once, and a task owns panels of filters, whose U it
// transforms a block of channels at a time just before multiplying, so that most of U never exists.
// Either way an output is summed in the same order: per block of channels in registers, the blocks
// in M, so the choice, which looks at the whole batch, does not change a bit. Where one block holds
// all channels the products of a column of points do not leave the registers (winograd_column.h).
#include "cpu/winograd.h"

#include <set>

#include "core/buffer.h"
#include "cpu/microkernels/winograd_column.h"
#include "cpu/microkernels/winograd_gemm.h"
#include "cpu/parallel_range.h"
#include "cpu/shared_scratch.h"
#include "cpu/special_samples.h"
#include "cpu/wide_array.h"
#include "cpu/winograd_groups.h"
#include "cpu/winograd_input.h"
#include "cpu/winograd_output.h"
#include "cpu/winograd_tiles.h"
#include "cpu/winograd_weights.h"

namespace torchconv::cpu {
namespace winograd {
namespace {

// V and M of a task's tiles, in a second-level cache of 1 MB that U passes through.
constexpr int64_t kCachedBytes = 640 * 1024;
constexpr int64_t kFewestTiles = 16, kMostTiles = 64, kManyBlocks = 8;
// Filters whose products are in M at the same time.
constexpr int64_t kFiltersAtOnce = 64;
// With at most so many tiles and at least so many weights in a tap, tasks own filters. Kept
// weights, which may have to come from memory, pay sooner.
constexpr int64_t kFewTiles = 128, kFewTilesOfKept = 64, kManyWeights = 256 * 256;
// From fewer weights on where the tiles' V, which threads would share, is half of U at most and
// there are panels for several of them.
constexpr int64_t kPanelsOfSeveral = 4;
// U up to this size, or for at most so many blocks of tiles, is transformed by every thread for
// itself: to read what another core has written takes several times as long.
constexpr int64_t kOwnU = 640 << 10, kBlocksOfOwnU = 2;
// Of more weights than this nothing is kept where U is much larger, four times as much with nine
// taps: U would have to come from memory, and so would the weights, for their checksum.
constexpr int64_t kTransformedWeights = 256 * 256;

bool much_larger(const ConvView& view) {
  return kProducts > 2 * static_cast<int64_t>(view.taps.size());
}
bool keeps_weights(const ConvView& view) {
  return !much_larger(view) || view.C * view.K <= kTransformedWeights;
}

// With few tiles even a U that is kept would come from memory: then, and where none is kept, packed
// weights are gathered ones (winograd_weights.h), which each task transforms. narrow: the images'
// type is.
template <typename A>
bool packs_gathered(const Plan<A>& plan, bool narrow) {
  const ConvView& view = plan.view;
  return !keeps_weights(view) || (!narrow && much_larger(view) && view.C * view.K >= kManyWeights &&
                                  plan.tiles() <= kFewTilesOfKept);
}

template <typename A>
bool tasks_own_filters(const Plan<A>& plan, bool kept) {
  const bool many = plan.view.C * plan.view.K >= kManyWeights;
  if (kept) return many && plan.tiles() <= kFewTilesOfKept;
  const bool wide = plan.panels >= kPanelsOfSeveral && 2 * plan.tiles() <= plan.view.K;
  return (many || wide) && plan.tiles() <= kFewTiles;
}

// From this size on U is written past the caches, or where it is shared by threads. The first block
// of tiles then reads it from memory, but a store need not read what it overwrites.
constexpr int64_t kStreamedU = 12 << 20;

// One thread may have transformed all of U for several. With so many tiles it matters little if
// there is but one.
constexpr int64_t kTilesOfSeveral = 512;

template <typename A>
void transform_all_weights(const Plan<A>& plan, const Filters<A>& w, A* u, const Parallel& pool) {
  const WeightLayout<A> layout(plan);
  const bool large = plan.panels * layout.panel * static_cast<int64_t>(sizeof(A)) >= kStreamedU;
  const int64_t pieces = plan.panels * plan.blocks;
  const WorkSplit split(
      pieces, 3.0 * kProducts * kPanel<A> * static_cast<double>(plan.block_vectors * kLanes<A>));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    const bool shared = streams_shared(end - begin < pieces || plan.tiles() >= kTilesOfSeveral);
    const bool streams = (large || shared) && WideVec<A>::streamable(u);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t panel = piece / plan.blocks, block = piece % plan.blocks;
      transform_weights(plan, w, panel, block, u + panel * layout.panel + block * layout.block,
                        streams);
    }
  });
}

// Products that are transformed down the columns before they leave the registers.
template <typename A>
constexpr bool kHasColumns = kWinogradColumns && std::is_same_v<A, float>;

// The transforms from and to the images of one call, whatever their type: the driver is compiled
// for the type that it computes in.
template <typename A>
class Images {
 public:
  virtual void transform_source(const Plan<A>& plan, Range strip, const Segment* segments,
                                const SourceLayout<A>& layout, A* scratch, A* v,
                                bool streams) const = 0;
  virtual void prefetch_source(const Plan<A>& plan, Range strip, const Segment* segments,
                               SourcePrefetch& ahead) const = 0;
  virtual bool transform_products(const Plan<A>& plan, const Segment& segment, int64_t panel,
                                  const A* m, const A* bias, A* scratch) const = 0;
  virtual bool transform_columns(const Plan<A>& plan, const Segment& segment, int64_t filter,
                                 const A* m, const A* bias, A* scratch) const = 0;
  virtual void prefetch_destination(const Plan<A>& plan, const Segment& segment, Range filters,
                                    SourcePrefetch& ahead) const = 0;

 protected:
  ~Images() = default;
};

template <typename T>
class ImagesOf final : public Images<Wide<T>> {
 public:
  using A = Wide<T>;
  ImagesOf(const T* src, const Epilogue<T>& epilogue) : src_(src), epilogue_(epilogue) {}

  void transform_source(const Plan<A>& plan, Range strip, const Segment* segments,
                        const SourceLayout<A>& layout, A* scratch, A* v,
                        bool streams) const override {
    winograd::transform_source(plan, segments + strip.begin, strip.size(), src_, layout, scratch, v,
                               streams);
  }
  void prefetch_source(const Plan<A>& plan, Range strip, const Segment* segments,
                       SourcePrefetch& ahead) const override {
    winograd::prefetch_source(plan, segments + strip.begin, strip.size(), src_, ahead);
  }
  bool transform_products(const Plan<A>& plan, const Segment& segment, int64_t panel, const A* m,
                          const A* bias, A* scratch) const override {
    return winograd::transform_products(plan, segment, panel, m, bias, epilogue_, scratch);
  }
  bool transform_columns([[maybe_unused]] const Plan<A>& plan,
                         [[maybe_unused]] const Segment& segment, [[maybe_unused]] int64_t filter,
                         [[maybe_unused]] const A* m, [[maybe_unused]] const A* bias,
                         [[maybe_unused]] A* scratch) const override {
    if constexpr (kHasColumns<A>)
      return transform_column_products(plan, segment, filter, m, bias, epilogue_, scratch);
    else
      return true;
  }
  void prefetch_destination(const Plan<A>& plan, const Segment& segment, Range filters,
                            SourcePrefetch& ahead) const override {
    winograd::prefetch_destination(plan, segment, filters, epilogue_.y, ahead);
    if (epilogue_.residual != nullptr)
      winograd::prefetch_destination(plan, segment, filters, epilogue_.residual, ahead);
  }

 private:
  const T* src_;
  const Epilogue<T>& epilogue_;
};

template <typename A>
class Driver {
 public:
  // kept: what winograd_pack_weights has made of the weights, or null. narrow: the images' type is.
  template <typename T>
  Driver(const ConvView& view, const Images<A>& images, bool narrow, const A* w, const A* kept,
         const T* bias)
      : plan_(view),
        images_(images),
        w_{w, packs_gathered(plan_, narrow) ? kept : nullptr},
        u_(w_.gathered != nullptr ? nullptr : kept),
        special_(view.N),
        weights_(plan_),
        bias_(plan_.panels * kFilters) {
    for (int64_t k = 0; k < plan_.panels * kFilters; ++k)
      bias_[k] = bias != nullptr && k < view.K ? to_wide(bias[k]) : A{0};
  }

  std::vector<int64_t> run(const Parallel& pool) {
    if (!by_columns() && tasks_own_filters(plan_, u_ != nullptr))
      by_filters(pool);
    else
      by_tiles(pool);
    return special_.list();
  }

 private:
  static constexpr int64_t kVector = kLanes<A>, kFilters = kPanel<A>, kSlot = kProductSlot<A>;

  // Where block `b` of `blocks` begins: they differ by a unit at most.
  int64_t first_tile(int64_t b, int64_t blocks) const {
    return plan_.tiles() / unit() * b / blocks * unit();
  }
  // The phases of columns share their source, so rows of tiles stay whole where there are several.
  // Else whole register tiles.
  int64_t unit() const {
    const int64_t across = plan_.columns.count;
    if (plan_.columns.dilation > 1 && across <= kMostTiles) return across;
    return by_columns() && plan_.tiles() % kColumnTiles == 0 ? kColumnTiles : 1;
  }
  // V and M of a block share the second-level cache; usual numbers of threads get equal shares.
  int64_t tile_blocks() const {
    constexpr auto kElement = static_cast<int64_t>(sizeof(A));
    const int64_t channels = plan_.vectors * kVector;
    const int64_t chunk = std::min(plan_.panels, panels_at_once()) * kFilters;
    const int64_t products = by_columns() ? kColumnSlot<A> : kProducts * chunk;
    const int64_t most = std::clamp(kCachedBytes / (kElement * (kProducts * channels + products)),
                                    kFewestTiles, kMostTiles);
    const int64_t units = plan_.tiles() / unit();
    const int64_t blocks = ceil_div(units, std::max(most / unit(), int64_t{1}));
    return std::min(round_up(blocks, blocks < kManyBlocks ? 2 : 4), units);
  }
  int64_t panels_at_once() const { return std::max<int64_t>(1, kFiltersAtOnce / kFilters); }

  void by_tiles(const Parallel& pool) {
    const int64_t blocks = tile_blocks();
    const int64_t slots = ceil_div(plan_.tiles() / unit(), blocks) * unit();
    const int64_t grain = work_grain(multiplications(slots, plan_.panels));
    const int64_t u_size = plan_.panels * weights_.panel;
    const bool own = u_ == nullptr &&
                     (blocks <= kBlocksOfOwnU || u_size * static_cast<int64_t>(sizeof(A)) <= kOwnU);
    const bool shared = u_ == nullptr && !own;
    Buffer<A> shared_u(shared ? u_size : 0);
    if (shared) transform_all_weights(plan_, w_, shared_u.get(), pool);
    const SourceLayout<A> layout(plan_, slots);
    const int64_t chunk = std::min(panels_at_once(), plan_.panels);
    const int64_t scratch_size =
        std::max(source_scratch(plan_, slots), product_scratch(plan_, slots));
    parallel_for_with_scratch(pool, 0, blocks, grain, [&](int64_t begin, int64_t end) {
      Buffer<A> v(layout.size(plan_)), scratch(scratch_size);
      Buffer<A> m(by_columns() ? slots * kColumnSlot<A> : chunk * slots * kSlot);
      Buffer<A> own_u(own ? u_size : 0);
      for (int64_t i = 0; own && i < plan_.panels * plan_.blocks; ++i) {
        const int64_t panel = i / plan_.blocks, c = i % plan_.blocks;
        transform_weights(plan_, w_, panel, c,
                          own_u.get() + panel * weights_.panel + c * weights_.block);
      }
      const A* const u = own ? own_u.get() : shared ? shared_u.get() : u_;
      const auto block_at = [&](int64_t b) {
        const int64_t first = first_tile(b, blocks);
        return TileBlock(plan_, first, first_tile(b + 1, blocks) - first);
      };
      SourcePrefetch ahead;
      TileBlock block = block_at(begin);
      for (int64_t b = begin; b < end; ++b) {
        for (const Range& strip : block.strips())
          images_.transform_source(plan_, strip, block.segments().data(), layout, scratch.get(),
                                   v.get(), false);
        TileBlock next = b + 1 < end ? block_at(b + 1) : TileBlock(plan_, 0, 0);
        const auto strips = static_cast<int64_t>(next.strips().size());
        // The products leave the memory idle: meanwhile what their transform writes is fetched, and
        // a part of what the next block reads.
        const auto expect = [&](Range filters) {
          ahead.clear();
          expect_outputs(block, filters, ahead);
          for (int64_t i = strips * filters.begin / plan_.view.K;
               i < strips * filters.end / plan_.view.K; ++i)
            images_.prefetch_source(plan_, next.strips()[i], next.segments().data(), ahead);
        };
        if constexpr (kHasColumns<A>) {
          for (int64_t k = 0; by_columns() && k < plan_.view.K; k += kVector) {
            if (k % kFilters == 0) expect(filters_of({k / kFilters, k / kFilters + 1}));
            multiply_columns(block, k, layout, v.get(), u, m.get(), ahead);
            for (const Segment& s : block.segments())
              note(s,
                   images_.transform_columns(plan_, s, k, m.get(), bias_.get() + k, scratch.get()));
          }
        }
        for (int64_t panel = 0; !by_columns() && panel < plan_.panels; panel += chunk) {
          const Range panels{panel, std::min(panel + chunk, plan_.panels)};
          expect(filters_of(panels));
          const int64_t lines = lines_at_once(ahead, block, panels, plan_.blocks);
          for (int64_t c = 0; c < plan_.blocks; ++c)
            multiply(block, c, panels, layout, v.get(),
                     u + panel * weights_.panel + c * weights_.block, m.get(), slots, false, ahead,
                     lines);
          for (int64_t i = panels.begin; i < panels.end; ++i)
            finish(block, i, m.get() + (i - panel) * slots * kSlot, scratch.get());
        }
        block = std::move(next);
      }
    });
  }

  Range filters_of(Range panels) const {
    return {panels.begin * kFilters, std::min(panels.end * kFilters, plan_.view.K)};
  }
  void expect_outputs(const TileBlock& block, Range filters, SourcePrefetch& ahead) const {
    for (const Segment& s : block.segments())
      images_.prefetch_destination(plan_, s, filters, ahead);
  }
  // Lines for a call of the micro-kernel.
  int64_t lines_at_once(const SourcePrefetch& ahead, const TileBlock& block, Range panels,
                        int64_t channel_blocks) const {
    return ceil_div(ahead.lines(),
                    channel_blocks * kProducts * panels.size() * ceil_div(block.tiles(), kMaxRows));
  }

  double multiplications(int64_t tiles, int64_t panels) const {
    return static_cast<double>(tiles * kProducts * panels * kFilters) *
           static_cast<double>(plan_.vectors * kVector);
  }

  void by_filters(const Parallel& pool) {
    const int64_t tiles = plan_.tiles();
    const TileBlock block(plan_, 0, tiles);
    const SourceLayout<A> layout(plan_, tiles);
    Buffer<A> v(layout.size(plan_));
    const int64_t strips = static_cast<int64_t>(block.strips().size());
    // A strip's transform is counted as a part of its products with one panel.
    const int64_t strip_grain = work_grain(multiplications(ceil_div(tiles, strips), 1) / 4);
    parallel_for_with_scratch(pool, 0, strips, strip_grain, [&](int64_t begin, int64_t end) {
      Buffer<A> scratch(source_scratch(plan_, tiles));
      const bool streams = streams_shared(end - begin < strips);
      for (int64_t s = begin; s < end; ++s) {
        const Range strip = block.strips()[s];
        images_.transform_source(plan_, strip, block.segments().data(), layout, scratch.get(),
                                 v.get(), streams);
      }
    });
    const int64_t grain = work_grain(multiplications(tiles, 1));
    parallel_for_with_scratch(pool, 0, plan_.panels, grain, [&](int64_t begin, int64_t end) {
      const bool near = u_ == nullptr;
      Buffer<A> transformed(near ? weights_.block : 0), m(tiles * kSlot),
          scratch(product_scratch(plan_, tiles));
      SourcePrefetch ahead;
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t c = 0; c < plan_.blocks; ++c) {
          const bool last = c + 1 == plan_.blocks;
          ahead.clear();
          if (last) expect_outputs(block, filters_of({panel, panel + 1}), ahead);
          if (near && !(last && panel + 1 == end))
            prefetch_panel(plan_, w_, panel + (last ? 1 : 0), last ? 0 : c + 1, ahead);
          if (near) transform_weights(plan_, w_, panel, c, transformed.get());
          const A* u = near ? transformed.get() : u_ + panel * weights_.panel + c * weights_.block;
          const Range panels{panel, panel + 1};
          multiply(block, c, panels, layout, v.get(), u, m.get(), tiles, near, ahead,
                   lines_at_once(ahead, block, panels, 1));
        }
        finish(block, panel, m.get(), scratch.get());
      }
    });
  }

  // Adds one block of channels to some panels of M; u and m are the first one's. near: U has just
  // been written, so V is fetched, else the rest of U. `lines` of `ahead` go with every call.
  void multiply(const TileBlock& tiles, int64_t block, Range panels, const SourceLayout<A>& layout,
                const A* v, const A* u, A* m, int64_t slots, bool near, SourcePrefetch& ahead,
                int64_t lines) const {
    WinogradGemm<A> g{};
    g.v_step = layout.vector;
    g.m_step = kSlot;
    g.channels = plan_.channels_in(block);
    g.accumulate = block > 0;
    v += block * layout.block;
    for (int point = 0; point < kProducts; ++point) {
      const Range range = tiles.slots(point / kPoints, point % kPoints);
      for (int64_t panel = 0; panel < panels.size(); ++panel) {
        const int64_t filters =
            std::min(plan_.view.K - (panels.begin + panel) * kFilters, kFilters);
        const int64_t vectors = ceil_div(filters, kVector);
        g.u = u + panel * weights_.panel + point * weights_.point;
        const bool last = panel + 1 == panels.size();
        if (near)
          g.next = v + (point + 1) * layout.point;
        else
          g.next = last ? u + (point + 1) * weights_.point : g.u + weights_.panel;
        for_row_tiles(range.size(), [&](int64_t first, int64_t rows) {
          const int64_t slot = range.begin + first;
          g.v = v + point * layout.point + slot * kVector;
          g.m = m + (panel * slots + slot) * kSlot + point * kFilters;
          winograd_microkernel<A>(rows, vectors)(g);
          if (near) g.next += g.channels * kFilters;
          ahead.ask(lines);
        });
      }
    }
  }

  // Columns are transformed in registers where the channels are one block: a bit may depend on it,
  // so the batch must not.
  bool by_columns() const { return kHasColumns<A> && plan_.side == 3 && plan_.blocks == 1; }

  // The products of a vector of filters, transformed down the columns.
  void multiply_columns(const TileBlock& tiles, int64_t filter, const SourceLayout<A>& layout,
                        const A* v, const A* u, A* m, SourcePrefetch& ahead) const {
    WinogradColumn g{};
    g.v_point = kPoints * layout.point;
    g.u_point = kPoints * weights_.point;
    g.v_step = layout.vector;
    g.y_step = kColumnSlot<A>;
    g.y_row = kColumnRow<A>;
    g.channels = plan_.channels_in(0);
    u += filter / kFilters * weights_.panel + filter % kFilters;
    const int64_t lines = ceil_div(ahead.lines(), kPoints * ceil_div(tiles.tiles(), kColumnTiles));
    for (int s = 0; s < kPoints; ++s) {
      g.u = u + s * weights_.point;
      const A* const next = s + 1 < kPoints ? g.u + weights_.point : u + kVector;
      int64_t call = 0;
      const auto multiply_slots = [&](Range slots, bool tall) {
        for_row_tiles(slots.size(), kColumnTiles, [&](int64_t offset, int64_t count) {
          const int64_t slot = slots.begin + offset;
          g.v = v + s * layout.point + slot * kVector;
          g.y = m + slot * kColumnSlot<A> + s * kVector;
          g.next = next + call++ % kPoints * g.u_point;
          winograd_column_kernel(count, tall)(g);
          ahead.ask(lines);
        });
      };
      const Range tall = tiles.slots(kPoints - 1, s);
      multiply_slots(tall, true);
      multiply_slots({tall.end, tiles.slots(0, s).end}, false);
    }
  }

  void finish(const TileBlock& tiles, int64_t panel, const A* m, A* scratch) const {
    for (const Segment& s : tiles.segments())
      note(s,
           images_.transform_products(plan_, s, panel, m, bias_.get() + panel * kFilters, scratch));
  }
  void note(const Segment& s, bool finite) const {
    if (!finite) special_.add(s.n);
  }

  const Plan<A> plan_;
  const Images<A>& images_;
  const Filters<A> w_;
  const A* const u_;  // or null
  SpecialSamples special_;
  const WeightLayout<A> weights_;
  Buffer<A> bias_;
};

double group_products(const ConvView& view) {
  return static_cast<double>(view.N * winograd_products(view)) *
         static_cast<double>(view.C * view.K);
}

}  // namespace
}  // namespace winograd

bool winograd_applies(const ConvView& view) {
  const int64_t side = winograd::kernel_side(view);
  if (view.step_h != 1 || view.step_w != 1 || side == 0) return false;
  if (view.src.c != 1 && view.src.column != 1) return false;
  const int64_t h = winograd::first_tap(view, &ConvTap::h);
  const int64_t w = winograd::first_tap(view, &ConvTap::w);
  const int64_t step_h = winograd::tap_step(view, &ConvTap::h);
  const int64_t step_w = winograd::tap_step(view, &ConvTap::w);
  if (step_h == 0 || step_w == 0) return false;
  bool found[winograd::kMostTaps] = {};
  for (const ConvTap& tap : view.taps) {
    const int64_t r = (tap.h - h) / step_h, s = (tap.w - w) / step_w;
    if (r >= side || s >= side || tap.h != h + r * step_h || tap.w != w + s * step_w) return false;
    found[r * side + s] = true;
  }
  return std::all_of(found, found + side * side, [](bool f) { return f; });
}

namespace {

// Elements from the first to the last that a tap reads.
int64_t weights_of(const ConvView& view) {
  int64_t last = 0;
  for (const ConvTap& tap : view.taps) last = std::max(last, tap.weight);
  return (view.K - 1) * view.weight_k + (view.C - 1) * view.weight_c + last + 1;
}

}  // namespace

int64_t winograd_products(const ConvView& view) {
  const winograd::Grid grid(view);
  return grid.rows.points() * grid.columns.points();
}

template <typename T>
int64_t winograd_weights_size(const ConvView& view, bool frozen) {
  const winograd::Plan<Wide<T>> plan(view);
  if (!winograd::keeps_weights(view) && !frozen) return 0;
  if (winograd::packs_gathered(plan, !std::is_same_v<T, Wide<T>>))
    return view.groups * winograd::gathered_size(plan);
  return view.groups * plan.panels * winograd::WeightLayout<Wide<T>>(plan).panel;
}

template <typename T>
void winograd_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                           const Parallel& pool) {
  const winograd::Plan<Wide<T>> plan(view);
  if (view.groups > 1) {
    const ConvView group = winograd::group_of(view, 0);
    const int64_t size = winograd_weights_size<T>(group, true);
    return winograd::for_groups(
        view.groups, winograd::group_products(view), pool, [&](int64_t g, const Parallel& inner) {
          winograd_pack_weights(group, w + g * view.weight_group, packed + g * size, inner);
        });
  }
  const WideArray<T> wide(w, weights_of(view), pool);
  if (winograd::packs_gathered(plan, !std::is_same_v<T, Wide<T>>))
    return winograd::gather_weights<Wide<T>>(plan, wide.get(), packed, pool);
  winograd::transform_all_weights<Wide<T>>(plan, {wide.get(), nullptr}, packed, pool);
}

template <typename T>
std::vector<int64_t> winograd_gather(const ConvView& view, const T* src, const T* w, const T* bias,
                                     const Epilogue<T>& epilogue, const Parallel& pool,
                                     const Wide<T>* packed) {
  if (view.groups > 1) {
    const int64_t size = winograd_weights_size<T>(winograd::group_of(view, 0), true);
    std::vector<std::vector<int64_t>> special(static_cast<size_t>(view.groups));
    winograd::for_groups(
        view.groups, winograd::group_products(view), pool, [&](int64_t g, const Parallel& inner) {
          const ConvView group = winograd::group_of(view, g);
          special[static_cast<size_t>(g)] =
              winograd_gather(group, src + g * view.C * view.src.c, w + g * view.weight_group,
                              bias != nullptr ? bias + g * view.K : nullptr, epilogue, inner,
                              packed != nullptr ? packed + g * size : nullptr);
        });
    std::set<int64_t> all;
    for (const std::vector<int64_t>& samples : special) all.insert(samples.begin(), samples.end());
    return {all.begin(), all.end()};
  }
  const WideArray<T> wide(w, packed != nullptr ? 0 : weights_of(view), pool);
  const winograd::ImagesOf<T> images(src, epilogue);
  constexpr bool kNarrow = !std::is_same_v<T, Wide<T>>;
  return winograd::Driver<Wide<T>>(view, images, kNarrow, wide.get(), packed, bias).run(pool);
}

#define TORCHCONV_INSTANTIATE(T)                                                               \
  template int64_t winograd_weights_size<T>(const ConvView&, bool);                            \
  template void winograd_pack_weights(const ConvView&, const T*, Wide<T>*, const Parallel&);   \
  template std::vector<int64_t> winograd_gather(const ConvView&, const T*, const T*, const T*, \
                                                const Epilogue<T>&, const Parallel&,           \
                                                const Wide<T>*);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
TORCHCONV_INSTANTIATE(BFloat16)
TORCHCONV_INSTANTIATE(Float16)
#undef TORCHCONV_INSTANTIATE

}  // namespace torchconv::cpu
