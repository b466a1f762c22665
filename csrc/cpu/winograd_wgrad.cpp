// The weight gradient in Winograd's domain: drives the transforms, the products and the inverse.
//
// Blocks of tiles are transformed into planes [value][panel][tile][kPanel]; then each value is a
// matrix product over the tiles of a block, K x C, and one inverse transform gives the taps. Small
// K x C: slabs of many blocks, each with its own accumulators of all K x C and planes that stay in
// a core's cache, so that threads meet once, to add up the slabs' taps. Large K x C: the threads
// transform a large block together, then each computes all products of small tiles of K x C and
// inverts these while they are in cache. Taps are summed with compensation wherever there is more
// than one sum, so that the error does not grow with the number of pixels. Blocks and slabs follow
// from the problem alone and every sum is in order, so the bits do not depend on the number of
// threads. The scheme is that of Lavin and Gray ("Fast Algorithms for Convolutional Neural
// Networks", 2016, section 4.3).
#include "cpu/winograd_wgrad.h"

#include <algorithm>
#include <atomic>
#include <optional>

#include "core/buffer.h"
#include "cpu/microkernels/outer_product.h"
#include "cpu/parallel_range.h"
#include "cpu/shared_scratch.h"
#include "cpu/winograd_groups.h"
#include "cpu/winograd_wgrad_inverse.h"
#include "cpu/winograd_wgrad_operands.h"
#include "cpu/winograd_wgrad_phases.h"
#include "cpu/winograd_wgrad_transforms.h"

namespace torchconv::cpu {
namespace winograd_gradient {
namespace {

// The streams of a transform, one for each value, fall into different cache sets.
constexpr int64_t kPlanePad = 16;

// Columns of the band that a segment's tiles are transformed in: it stays in a 32 KB first-level
// cache.
constexpr int64_t kSegmentColumns = 58;
// Tiles that are added up in registers: few, for the accuracy of float32.
constexpr int64_t kProductTiles = 64;
// Accumulators of all K x C at most so large are a slab's own: a last-level cache holds them.
constexpr int64_t kSlabBytes = 5 << 19;
// Tiles in a block of a slab: few enough that the planes of 64 channels stay in a second-level
// cache of a megabyte, many against the traffic of the accumulators.
constexpr int64_t kBlockTiles = 42;
// Tiles in a slab, against the work to invert its accumulators, and the most slabs.
constexpr int64_t kSlabTiles = 96;
constexpr int64_t kMostSlabs = 16;
// Tiles added up in the transformed domain before they go into the compensated sum.
constexpr int64_t kFlushTiles = 1024;
// Planes that all threads share, for a last-level cache, but of no fewer tiles.
constexpr int64_t kSharedPlaneBytes = 14 << 20;
constexpr int64_t kLeastSharedTiles = 28;

// Fewer channels than these are the products' rows: they would leave most of a vector empty.
constexpr int64_t kFewChannels = 16;

// A scheme's numbers along an axis, and its transforms.
template <typename A>
struct SchemeOf {
  int64_t taps, tile, stride, input, values, sums;
  decltype(&transform_source<ThreeTaps, A>) source;
  decltype(&transform_gradient<ThreeTaps, A>) gradient;
  decltype(&add_taps<ThreeTaps, A>) add;

  bool of_phases() const { return taps == FourTaps::kTaps; }
  // Columns of x that a segment's tiles meet.
  int64_t source_columns(int64_t tiles) const { return (tiles - 1) * tile * stride + input; }
  bool channel_rows(const ConvView& view) const { return of_phases() || view.C < kFewChannels; }
};

template <typename S, typename A>
SchemeOf<A> scheme_of() {
  return {S::kTaps,
          S::kTile,
          S::kStride,
          S::kInput,
          S::kValues,
          S::kSums,
          transform_source<S, A>,
          transform_gradient<S, A>,
          add_taps<S, A>};
}
constexpr int64_t kMostValues = ThreeTapsStride2::kValues * ThreeTapsStride2::kValues;
constexpr int64_t kMostSums = ThreeTapsStride2::kSums * ThreeTapsStride2::kSums;

template <typename A>
class Wgrad {
 public:
  Wgrad(const SchemeOf<A>& scheme, const TapStore<A>& writer, const ConvView& view, const A* dz,
        const A* x, const Parallel& pool)
      : scheme_(scheme),
        writer_(writer),
        view_(view),
        pool_(pool),
        values_count_(scheme.values * scheme.values),
        sums_count_(scheme.sums * scheme.sums),
        tap_elements_(scheme.taps * scheme.taps * kTileSize),
        C_(scheme.of_phases() ? 4 * view.C : view.C),
        channel_rows_(scheme.channel_rows(view)),
        c_panels_(ceil_div(C_, kWidth)),
        k_panels_(ceil_div(view.K, kWidth)),
        spread_h_(scheme.of_phases() ? 1 : view.taps[scheme.taps].h - view.taps[0].h),
        spread_w_(scheme.of_phases() ? 1 : view.taps[1].w - view.taps[0].w),
        tiling_(view, scheme.tile, scheme.stride > 1 ? 1 : spread_h_,
                scheme.stride > 1 ? 1 : spread_w_,
                std::max<int64_t>(1, kSegmentColumns / (scheme.tile * scheme.stride))),
        bands_(scheme.values, scheme.source_columns(tiling_.segment_tiles)) {
    const int64_t tile_bytes = values_count_ * (c_panels_ + k_panels_) * kWidth * kElement;
    const int64_t accumulators = sums_count_ * products() * kTileSize * kElement;
    slabs_ = accumulators > kSlabBytes ? 1 : std::min(tiling_.tiles / kSlabTiles, kMostSlabs);
    const int64_t block =
        slabs_ > 1 ? kBlockTiles : std::max(kSharedPlaneBytes / tile_bytes, kLeastSharedTiles);
    tiling_.cut_blocks(block, scheme.tile);
    panel_ = tiling_.block_tiles * kWidth;
    source(x);
    gradient(dz);
    order_values();
  }

  bool run() {
    if (slabs_ > 1)
      run_slabs();
    else
      run_shared();
    return finite_.load();
  }

 private:
  static constexpr int64_t kL = kLanes<A>, kWidth = kPanel<A>, kTileSize = kTileElements<A>;
  static constexpr int64_t kElement = sizeof(A);
  static constexpr int64_t kLocalPlane = kTileSize + kPlanePad;

  int64_t products() const { return c_panels_ * k_panels_; }
  int64_t c_in(int64_t cp) const { return std::min(kWidth, C_ - cp * kWidth); }
  int64_t k_in(int64_t kp) const { return std::min(kWidth, view_.K - kp * kWidth); }
  int64_t x_plane() const { return c_panels_ * panel_ + kPlanePad; }
  int64_t dz_plane() const { return k_panels_ * panel_ + kPlanePad; }

  // Elements of x beyond the last output's window belong to no product.
  void source(const A* x) {
    const ConvTap &first = view_.taps.front(), &last = view_.taps.back();
    x_ = {x,
          view_.src,
          view_.src.c * kL,
          C_,
          first.h,
          first.w,
          view_.step_h,
          view_.step_w,
          spread_h_,
          spread_w_,
          std::min(view_.H, (view_.I - 1) * view_.step_h + last.h + 1),
          std::min(view_.W, (view_.J - 1) * view_.step_w + last.w + 1),
          nullptr,
          x_plane(),
          panel_};
    if (scheme_.of_phases()) {
      const int64_t rows = view_.I + scheme_.taps - 1, columns = view_.J + scheme_.taps - 1;
      x_copy_.emplace(space_to_depth(view_, x, rows, columns, pool_));
      x_.top = x_.left = 0;
      x_.step_h = x_.step_w = 1;
      x_.rows = rows;
      x_.columns = columns;
      use_blocked(*x_copy_, columns, x_);
    } else if (spread_w_ > 1 && view_.src.column == 1) {
      x_copy_.emplace(block_channels(x, view_.src, view_.N, view_.C, view_.H, view_.W, pool_));
      use_blocked(*x_copy_, view_.W, x_);
    }
  }

  void gradient(const A* dz) {
    dz_ = {dz,        view_.dst, view_.dst.c * kL, view_.K, 0,       0,          1,     1,
           spread_h_, spread_w_, view_.I,          view_.J, nullptr, dz_plane(), panel_};
    if (spread_w_ > 1 && view_.dst.column == 1) {
      dz_copy_.emplace(block_channels(dz, view_.dst, view_.N, view_.K, view_.I, view_.J, pool_));
      use_blocked(*dz_copy_, view_.J, dz_);
    }
  }

  static void use_blocked(const BlockedImage<A>& image, int64_t columns, Operand<A>& operand) {
    operand.data = image.data.get();
    operand.stride = {image.n, 0, columns * kL, kL};
    operand.vector = image.vector;
  }

  // Values by the sum that they belong to.
  void order_values() {
    const int64_t side = scheme_.values, last = scheme_.sums - 1;
    int64_t count = 0;
    for (int64_t sum = 0; sum < sums_count_; ++sum) {
      first_value_[sum] = count;
      for (int64_t r = 0; r < side; ++r)
        for (int64_t s = 0; s < side; ++s)
          if (std::min(r, last) * scheme_.sums + std::min(s, last) == sum)
            values_[count++] = r * side + s;
    }
    first_value_[sums_count_] = count;
  }

  // ---- Transforms. Items are (segment, vector) in memory order.

  int64_t block_items(const Block& block) const {
    return block.segments * (ceil_div(C_, kL) + ceil_div(view_.K, kL));
  }

  void transform(const Block& block, int64_t begin, int64_t end, A* x_planes, A* dz_planes, A* band,
                 bool shared = false) const {
    Operand<A> x = x_, dz = dz_;
    x.streams = dz.streams = shared && streams_shared(end - begin < block_items(block));
    x.planes = x_planes;
    dz.planes = dz_planes;
    const int64_t x_vectors = ceil_div(C_, kL), vectors = x_vectors + ceil_div(view_.K, kL);
    const bool pixels_contiguous = x.stride.column <= kL;
    const int64_t last = static_cast<int64_t>(tiling_.segments.size()) - 1;
    for (int64_t item = begin; item < end; ++item) {
      // A channel's rows, or a pixel's channels.
      const int64_t i = block.first + (pixels_contiguous ? item % block.segments : item / vectors);
      const int64_t v = pixels_contiguous ? item / block.segments : item % vectors;
      const Segment& now = tiling_.segments[i];
      const Segment& next = tiling_.segments[std::min(i + 1, last)];
      if (v < x_vectors)
        scheme_.source(x, now, next, v, bands_, band);
      else
        scheme_.gradient(dz, now, next, v - x_vectors, bands_, band);
    }
    if (x.streams) stream_fence();
  }

  // ---- Products.

  // Two panels [depth][kWidth] of a value, over the tiles of a block.
  struct Panels {
    const A *dz, *x;
    int64_t depth;
  };
  Panels panels(const A* x, const A* dz, const Block& block, int64_t value, int64_t kp,
                int64_t cp) const {
    const bool last_row = value / scheme_.values == scheme_.values - 1;
    const bool last_column = value % scheme_.values == scheme_.values - 1;
    const int64_t begin = block.begin(last_column);
    return {dz + value * dz_plane() + kp * panel_ + begin * kWidth,
            x + value * x_plane() + cp * panel_ + begin * kWidth,
            std::max<int64_t>(0, block.end(last_row, last_column) - begin)};
  }

  // `next` is fetched into cache.
  void multiply(const Panels& p, const Panels& next, int64_t kp, int64_t cp, A* product,
                bool accumulate) const {
    const int64_t rows = channel_rows_ ? c_in(cp) : k_in(kp);
    const int64_t vectors = ceil_div(channel_rows_ ? k_in(kp) : c_in(cp), kL);
    const A *a = channel_rows_ ? p.x : p.dz, *b = channel_rows_ ? p.dz : p.x;
    const int64_t runs = std::max<int64_t>(1, ceil_div(p.depth, kProductTiles));
    for_row_tiles(rows, [&](int64_t row, int64_t n) {
      const OuterProductMicrokernel<A> tile = outer_product_microkernel<A>(n, vectors);
      const A* fetch = (row == 0) != channel_rows_ ? next.x : next.dz;
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t t = run * p.depth / runs, depth = (run + 1) * p.depth / runs - t;
        tile({a + t * kWidth + row, b + t * kWidth, product + row * kWidth, depth,
              accumulate || run > 0, fetch + t * kWidth});
      }
    });
  }

  ProductTile<A> product_tile(int64_t item, const A* sums, int64_t plane) const {
    const int64_t kp = item / c_panels_, cp = item % c_panels_;
    if (channel_rows_) return {sums, plane, cp * kWidth, kp * kWidth, c_in(cp), k_in(kp)};
    return {sums, plane, kp * kWidth, cp * kWidth, k_in(kp), c_in(cp)};
  }

  void check(bool finite) {
    if (!finite) finite_.store(false, std::memory_order_relaxed);
  }

  // ---- Slabs.

  void run_slabs() {
    const int64_t taps_size = products() * tap_elements_;
    Buffer<A> taps(slabs_ * taps_size);
    parallel_for_with_scratch(pool_, 0, slabs_, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> x(values_count_ * x_plane()), dz(values_count_ * dz_plane()), band(bands_.size);
      Buffer<A> sums(sums_count_ * (products() * kTileSize + kPlanePad)), lost(taps_size);
      const bool streams = streams_shared(end - begin < slabs_);
      for (int64_t slab = begin; slab < end; ++slab)
        accumulate_slab(slab, x.get(), dz.get(), band.get(), sums.get(),
                        taps.get() + slab * taps_size, lost.get(), streams);
      if (streams) stream_fence();
    });
    const WorkSplit split(products(), static_cast<double>(slabs_ * tap_elements_));
    split.run(pool_, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t item = begin; item < end; ++item)
        check(writer_.reduce(product_tile(item, nullptr, 0), taps.get() + item * tap_elements_,
                             slabs_, taps_size));
    });
  }

  void accumulate_slab(int64_t slab, A* x, A* dz, A* band, A* sums, A* taps, A* lost,
                       bool streams) const {
    const int64_t blocks = static_cast<int64_t>(tiling_.blocks.size());
    const int64_t first = blocks * slab / slabs_, last = blocks * (slab + 1) / slabs_;
    const int64_t flush = std::max<int64_t>(1, kFlushTiles / tiling_.block_tiles);
    const int64_t plane = products() * kTileSize + kPlanePad;
    for (int64_t b = first; b < last; ++b) {
      const Block& block = tiling_.blocks[b];
      transform(block, 0, block_items(block), x, dz, band);
      multiply_all(block, x, dz, sums, plane, (b - first) % flush > 0);
      if ((b - first) % flush < flush - 1 && b < last - 1) continue;
      for (int64_t item = 0; item < products(); ++item)
        scheme_.add(product_tile(item, sums + item * kTileSize, plane), b - first < flush,
                    b == last - 1, taps + item * tap_elements_, lost + item * tap_elements_,
                    streams);
    }
  }

  void multiply_all(const Block& block, const A* x, const A* dz, A* sums, int64_t plane,
                    bool add) const {
    Panels now = panels(x, dz, block, values_[0], 0, 0);
    for (int64_t sum = 0; sum < sums_count_; ++sum) {
      for (int64_t item = 0; item < products(); ++item) {
        const int64_t kp = item / c_panels_, cp = item % c_panels_;
        const int64_t begin = first_value_[sum], end = first_value_[sum + 1];
        for (int64_t i = begin; i < end; ++i) {
          const bool more = item + 1 < products();
          const int64_t after = more ? item + 1 : 0;
          const Panels next =
              i + 1 < end
                  ? panels(x, dz, block, values_[i + 1], kp, cp)
                  : panels(x, dz, block, values_[more || sum + 1 == sums_count_ ? begin : end],
                           after / c_panels_, after % c_panels_);
          multiply(now, next, kp, cp, sums + sum * plane + item * kTileSize, add || i > begin);
          now = next;
        }
      }
    }
  }

  // ---- Planes that all threads share.

  void run_shared() {
    const int64_t blocks = static_cast<int64_t>(tiling_.blocks.size());
    const int64_t taps_size = blocks > 1 ? products() * tap_elements_ : 0;
    Buffer<A> x(values_count_ * x_plane()), dz(values_count_ * dz_plane());
    Buffer<A> bands(WorkSplit::kMaxSlots * bands_.size);
    Buffer<A> sums(WorkSplit::kMaxSlots * sums_count_ * kLocalPlane);
    Buffer<A> taps(taps_size), lost(taps_size);
    for (int64_t b = 0; b < blocks; ++b) {
      const Block& block = tiling_.blocks[b];
      const WorkSplit items(block_items(block),
                            static_cast<double>(tiling_.segment_tiles * values_count_ * kL));
      items.run(pool_, [&](int64_t begin, int64_t end, int64_t slot) {
        transform(block, begin, end, x.get(), dz.get(), bands.get() + slot * bands_.size,
                  /*shared=*/true);
      });
      const WorkSplit tiles(
          products(), static_cast<double>(tiling_.block_tiles * kTileSize * values_count_ / kL));
      tiles.run(pool_, [&](int64_t begin, int64_t end, int64_t slot) {
        A* sum = sums.get() + slot * sums_count_ * kLocalPlane;
        for (int64_t item = begin; item < end; ++item) {
          multiply_tile(block, x.get(), dz.get(), item, std::min(item + 1, end - 1), sum);
          const ProductTile<A> tile = product_tile(item, sum, kLocalPlane);
          A* item_taps = taps.get() + item * tap_elements_;
          if (blocks == 1)
            check(writer_.invert(tile));
          else
            scheme_.add(tile, b == 0, b == blocks - 1, item_taps, lost.get() + item * tap_elements_,
                        /*streams=*/false);
          if (blocks > 1 && b == blocks - 1) check(writer_.reduce(tile, item_taps, 1, 0));
        }
      });
    }
  }

  // All sums of one tile of K x C.
  void multiply_tile(const Block& block, const A* x, const A* dz, int64_t item, int64_t next_item,
                     A* sums) const {
    const int64_t kp = item / c_panels_, cp = item % c_panels_;
    Panels now = panels(x, dz, block, values_[0], kp, cp);
    for (int64_t sum = 0; sum < sums_count_; ++sum) {
      for (int64_t i = first_value_[sum]; i < first_value_[sum + 1]; ++i) {
        const Panels next =
            i + 1 < values_count_
                ? panels(x, dz, block, values_[i + 1], kp, cp)
                : panels(x, dz, block, values_[0], next_item / c_panels_, next_item % c_panels_);
        multiply(now, next, kp, cp, sums + sum * kLocalPlane, i > first_value_[sum]);
        now = next;
      }
    }
  }

  const SchemeOf<A> scheme_;
  const TapStore<A>& writer_;
  const ConvView& view_;
  const Parallel& pool_;
  int64_t values_count_, sums_count_, tap_elements_;
  int64_t C_;          // channels of the transformed x
  bool channel_rows_;  // the products' rows are channels, not filters: too few for whole vectors
  int64_t c_panels_, k_panels_;
  int64_t spread_h_, spread_w_;
  Tiling tiling_;
  Bands<A> bands_;
  int64_t slabs_, panel_;
  std::optional<BlockedImage<A>> x_copy_, dz_copy_;
  Operand<A> x_, dz_;
  int64_t values_[kMostValues], first_value_[kMostSums + 1];
  std::atomic<bool> finite_{true};
};

template <typename S, typename A>
bool run(const ConvView& view, const A* dz, const A* x, A* dw, const Parallel& pool) {
  const SchemeOf<A> scheme = scheme_of<S, A>();
  const TapWriter<S, A> writer(view, dw, scheme.channel_rows(view));
  return Wgrad<A>(scheme, writer, view, dz, x, pool).run();
}

// Channels of a first layer: its four phases fill one vector of 16.
constexpr int64_t kMostStemChannels = 4;

enum class Kind { kNone, kThreeTaps, kFiveTaps, kStride2, kStem };

bool is_grid(const ConvView& view, int64_t side, int64_t spread_h, int64_t spread_w) {
  if (static_cast<int64_t>(view.taps.size()) != side * side) return false;
  for (int64_t t = 0; t < side * side; ++t)
    if (view.taps[t].h != view.taps[0].h + t / side * spread_h ||
        view.taps[t].w != view.taps[0].w + t % side * spread_w)
      return false;
  return true;
}

Kind kind_of(const ConvView& view) {
  const bool stride1 = view.step_h == 1 && view.step_w == 1;
  const bool stride2 = view.step_h == 2 && view.step_w == 2;
  if (stride2 && view.C <= kMostStemChannels && is_grid(view, 7, 1, 1)) return Kind::kStem;
  const auto taps = static_cast<int64_t>(view.taps.size());
  if (taps != 9 && taps != 25) return Kind::kNone;
  // The live taps of a larger kernel are not neighbours.
  if (view.weight_c != 1 && view.weight_c != taps) return Kind::kNone;
  if (stride2 && is_grid(view, 3, 1, 1)) return Kind::kStride2;
  const int64_t side = taps == 9 ? 3 : 5;
  const int64_t spread_h = view.taps[side].h - view.taps[0].h;
  const int64_t spread_w = view.taps[1].w - view.taps[0].w;
  // Phases of fewer rows than a tile leave most of it empty.
  const bool whole = spread_h == 1 || view.I >= 3 * spread_h;
  if (stride1 && whole && (spread_w == 1 || view.J >= 3 * spread_w) &&
      is_grid(view, side, spread_h, spread_w))
    return side == 3 ? Kind::kThreeTaps : Kind::kFiveTaps;
  return Kind::kNone;
}

// Tiles along an axis, of all its phases.
int64_t tiles_along(int64_t outputs, int64_t dilation, int64_t tile) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < std::min(dilation, outputs); ++i)
    tiles += TileAxis(ceil_div(outputs - i, dilation), tile).count();
  return tiles;
}

template <typename Scheme>
WinogradWgradCost cost(const char* scheme, const ConvView& view, int64_t dilation_h,
                       int64_t dilation_w, int64_t phases_as_channels) {
  const int64_t tiles = tiles_along(view.I, dilation_h, Scheme::kTile) *
                        tiles_along(view.J, dilation_w, Scheme::kTile);
  return {scheme, tiles, tiles * Scheme::kValues * Scheme::kValues * phases_as_channels};
}

}  // namespace
}  // namespace winograd_gradient

WinogradWgradCost winograd_wgrad_cost(const ConvView& view) {
  using namespace winograd_gradient;  // NOLINT: the vocabulary of this file
  switch (kind_of(view)) {
    case Kind::kThreeTaps:
      return cost<ThreeTaps>("F(3x3,4x4)", view, view.taps[3].h - view.taps[0].h,
                             view.taps[1].w - view.taps[0].w, 1);
    case Kind::kFiveTaps:
      return cost<FiveTaps>("F(5x5,2x2)", view, view.taps[5].h - view.taps[0].h,
                            view.taps[1].w - view.taps[0].w, 1);
    case Kind::kStride2:
      return cost<ThreeTapsStride2>("F(2x2,4x4) of every other pixel, plain products between", view,
                                    1, 1, 1);
    case Kind::kStem:
      return cost<FourTaps>("F(4x4,3x3) of the stride's four phases as channels", view, 1, 1, 4);
    case Kind::kNone:
      break;
  }
  return {"", 0, 0};
}

bool winograd_wgrad_applies(const ConvView& view) {
  return winograd_gradient::kind_of(view) != winograd_gradient::Kind::kNone;
}

template <typename A>
bool winograd_wgrad(const ConvView& view, const A* dz, const A* x, A* dw, const Parallel& pool) {
  using namespace winograd_gradient;  // NOLINT: the vocabulary of this file
  if (view.groups > 1) {
    const double products = static_cast<double>(view.N * winograd_wgrad_cost(view).products) *
                            static_cast<double>(view.C * view.K);
    std::atomic<bool> finite{true};
    winograd::for_groups(view.groups, products, pool, [&](int64_t g, const Parallel& inner) {
      if (!winograd_wgrad(winograd::group_of(view, 0), dz + g * view.K * view.dst.c,
                          x + g * view.C * view.src.c, dw + g * view.weight_group, inner))
        finite = false;
    });
    return finite;
  }
  switch (kind_of(view)) {
    case Kind::kThreeTaps:
      return run<ThreeTaps>(view, dz, x, dw, pool);
    case Kind::kFiveTaps:
      return run<FiveTaps>(view, dz, x, dw, pool);
    case Kind::kStride2:
      return run<ThreeTapsStride2>(view, dz, x, dw, pool);
    case Kind::kStem:
      return run<FourTaps>(view, dz, x, dw, pool);
    case Kind::kNone:
      return false;
  }
  return false;
}
template bool winograd_wgrad(const ConvView&, const float*, const float*, float*, const Parallel&);
template bool winograd_wgrad(const ConvView&, const double*, const double*, double*,
                             const Parallel&);

}  // namespace torchconv::cpu
