// Blocking and order of strided Winograd, along one axis:
//
//   fprop  y[i] = w[0] x[2i] + w[1] x[2i + 1] + w[2] x[2i + 2]
//   dgrad  dx[2i] = w[2] dz[i - 1] + w[0] dz[i],  dx[2i + 1] = w[1] dz[i]
//
// (padding aside): the outer taps are a convolution of stride 1 of every other pixel, which F(4,2)
// does with 5 products instead of 8, and the middle tap needs 4; two axes need 9 x 9 for the 12 x
// 12 of the direct algorithm. dgrad is the transpose of fprop and has the same products. (Polyphase
// decomposition before Winograd: for instance Huang et al., "DWM: A Decomposable Winograd Method
// for Convolution Acceleration", 2020.) The rest is as in winograd.cpp: with many tiles a task owns
// a block of them whose V and M stay in the second-level cache, with few tiles and many filters a
// task owns panels of filters; an output is summed in the same order either way.
#include "cpu/winograd_strided.h"

#include "core/buffer.h"
#include "cpu/conv_view.h"
#include "cpu/microkernels/winograd_gemm.h"
#include "cpu/parallel_range.h"
#include "cpu/shared_scratch.h"
#include "cpu/special_samples.h"
#include "cpu/winograd_strided_fold.h"
#include "cpu/winograd_strided_output.h"
#include "cpu/winograd_strided_source.h"
#include "cpu/winograd_strided_tiles.h"
#include "cpu/winograd_strided_weights.h"

namespace torchconv::cpu {
namespace winograd_strided {

TileBlock::TileBlock(const Plan& plan, int64_t first, int64_t count)
    : shape_(plan.shape()), tiles_(count) {
  const int64_t across = plan.columns.count, down = plan.rows.count;
  int64_t tall_wide = 0, short_wide = 0, short_narrow = 0;
  for (int64_t tile = first; tile < first + count;) {
    Segment s{};
    s.n = tile / across / down;
    s.i = tile / across % down;
    s.j = tile % across;
    s.count = std::min(across - s.j, first + count - tile);
    s.wide = std::min(std::max(plan.columns.tall - s.j, int64_t{0}), s.count);
    const bool tall = plan.rows.is_tall(s.i);
    int64_t& wide = tall ? tall_wide : short_wide;
    int64_t& narrow = tall ? tall_narrow_ : short_narrow;
    s.wide_slot = wide;
    s.narrow_slot = narrow;
    wide += s.wide;
    narrow += s.count - s.wide;
    segments_.push_back(s);
    tile += s.count;
  }
  tall_ = tall_narrow_ + tall_wide;
  wide_ = tall_wide + short_wide;
  for (Segment& s : segments_) {
    const bool tall = plan.rows.is_tall(s.i);
    s.wide_slot += tall ? tall_narrow_ : tall_;
    if (!tall) s.narrow_slot += tall_ + short_wide;
  }
}

namespace {

// V and M of a task's tiles, in a second-level cache of 1 MB that U passes through.
constexpr int64_t kCachedElements = 640 * 1024 / sizeof(float);
constexpr int64_t kFewestTiles = 6, kMostTiles = 32, kManyBlocks = 8;
// Filters whose products are in M at the same time.
constexpr int64_t kFiltersAtOnce = 64;
// With at most so many tiles and at least so many weights in a tap, tasks own filters.
constexpr int64_t kFewTiles = 64, kManyWeights = 256 * 256;
// U up to this size is transformed by every thread for itself where there are at most so many
// blocks of tiles: to read what another core has written takes several times as long.
constexpr int64_t kOwnU = (4 << 20) / sizeof(float), kBlocksOfOwnU = 2;

// The taps along an axis of a kernel that folds, for each phase of a unit; `step` apart in memory.
// dgrad: the window of a unit ends at the last dz that touches it.
void fold_taps(bool fprop, bool flip, int64_t size, int64_t pad, int64_t step,
               int64_t (&taps)[2][quad::kTaps]) {
  for (int phase = 0; phase < 2; ++phase)
    for (int u = 0; u < quad::kTaps; ++u) {
      const int64_t last = 2 * (quad::kTaps - 1) - (pad % 2 == 0 ? 0 : 1);
      const int64_t r = fprop ? 2 * u + phase : last + phase - 2 * u;
      taps[phase][u] = r < 0 || r >= size ? -1 : (flip ? size - 1 - r : r) * step;
    }
}

AxisPlan axis_plan(bool fprop, bool small, int64_t pad, int64_t size) {
  if (fprop) return small ? AxisPlan(Axis::kDown, -pad, size) : AxisPlan(Axis::kFold, 0, size);
  // The first element of a unit is even, with its padding, or odd.
  const bool even = pad % 2 == 0;
  if (!small)
    return AxisPlan(Axis::kUnfold, floor_div(pad + 1, int64_t{2}) - (quad::kTaps - 1), size);
  return even ? AxisPlan(Axis::kUpFirst, pad / 2 - 1, size)
              : AxisPlan(Axis::kUpSecond, (pad - 1) / 2, size);
}

Plan make_plan(const ConvProblem& p, StridedPass pass) {
  const bool fprop = pass == StridedPass::kFprop, small = p.R == kTaps;
  const auto strides = [&](int64_t C, int64_t H, int64_t W) {
    return p.layout == Layout::kNCHW ? ConvStrides{C * H * W, H * W, W, 1}
                                     : ConvStrides{C * H * W, 1, W * C, C};
  };
  const ConvStrides x = strides(p.C, p.H, p.W), z = strides(p.K, p.P, p.Q);
  const bool by_channel = p.weight_layout == Layout::kNHWC;
  const int64_t tap = by_channel ? p.C : 1;
  const int64_t weight_k = p.C * p.R * p.S, weight_c = by_channel ? 1 : p.R * p.S;
  const int64_t C = small ? p.C : 4 * p.C;
  ConvView view{};
  view.N = p.N;
  view.groups = 1;
  view.C = fprop ? C : p.K;
  view.K = fprop ? p.K : C;
  view.H = fprop ? p.H : p.P;
  view.W = fprop ? p.W : p.Q;
  view.I = fprop ? p.P : p.H;
  view.J = fprop ? p.Q : p.W;
  view.step_h = view.step_w = 1;
  view.src = fprop ? x : z;
  view.dst = fprop ? z : x;
  view.weight_k = fprop ? weight_k : weight_c;
  view.weight_c = fprop ? weight_c : weight_k;
  Plan plan{view,
            axis_plan(fprop, small, p.pad_top, view.I),
            axis_plan(fprop, small, p.pad_left, view.J),
            {},
            {},
            0,
            0,
            0,
            0};
  if (small) {
    // fprop's outer taps are 0 and 2; dgrad meets them in the other order, and so does flip.
    for (int r = 0; r < kTaps; ++r)
      for (int s = 0; s < kTaps; ++s) {
        const auto at = [&](int i) { return i == 2 ? 1 : (i == 0) == (fprop != p.flip) ? 0 : 2; };
        plan.tap_weight[r * kTaps + s] = (at(r) * kTaps + at(s)) * tap;
      }
  } else {
    Plan::Fold& fold = plan.fold;
    fold.channels = p.C;
    fold.H = p.H;
    fold.W = p.W;
    fold.pad_top = p.pad_top;
    fold.pad_left = p.pad_left;
    fold.weight_channel = weight_c;
    fold.weight_other = weight_k;
    fold_taps(fprop, p.flip, p.R, p.pad_top, p.S * tap, fold.row_taps);
    fold_taps(fprop, p.flip, p.S, p.pad_left, tap, fold.column_taps);
  }
  plan.vectors = ceil_div(view.C, kVector);
  plan.block_vectors = ceil_div(plan.vectors, ceil_div(view.C, kChannelBlock));
  plan.blocks = ceil_div(plan.vectors, plan.block_vectors);
  plan.panels = ceil_div(view.K, kFilters);
  return plan;
}

void transform_panel(const Plan& plan, const float* w, int64_t panel, int64_t block, float* u,
                     bool streams) {
  if (folds(plan.rows.form))
    transform_folded_weights(plan, w, panel, block, u);
  else
    transform_weights(plan, w, panel, block, u, streams);
}

void transform_all_weights(const Plan& plan, const float* w, float* u, const Parallel& pool) {
  const WeightLayout layout(plan);
  const int64_t pieces = plan.panels * plan.blocks;
  const WorkSplit split(
      pieces, 3.0 * kPlanes * kFilters * static_cast<double>(plan.block_vectors * kVector));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    const bool streams = streams_shared(end - begin < pieces) && WideVec<float>::streamable(u);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t panel = piece / plan.blocks, block = piece % plan.blocks;
      transform_panel(plan, w, panel, block, u + panel * layout.panel + block * layout.block,
                      streams);
    }
  });
}

class Driver {
 public:
  Driver(const Plan& plan, const float* src, const float* w, const float* u, const float* bias,
         const Epilogue<float>& epilogue)
      : plan_(plan),
        src_(src),
        w_(w),
        u_(u),
        epilogue_(epilogue),
        special_(plan.view.N),
        weights_(plan_),
        bias_(plan_.panels * kFilters) {
    for (int64_t k = 0; k < plan_.panels * kFilters; ++k)
      bias_[k] = bias != nullptr && k < plan_.view.K ? bias[k] : 0.0f;
  }

  std::vector<int64_t> run(const Parallel& pool) {
    if (plan_.tiles() <= kFewTiles && plan_.view.C * plan_.view.K >= kManyWeights)
      by_filters(pool);
    else
      by_tiles(pool);
    return special_.list();
  }

 private:
  // V and M of a block share the second-level cache; usual numbers of threads get equal shares.
  int64_t tile_blocks() const {
    const int64_t channels = plan_.vectors * kVector;
    const int64_t chunk = std::min(plan_.panels, panels_at_once()) * kFilters;
    const int64_t side = plan_.shape().products(), products = side * side;
    const int64_t most = std::min(
        std::max(kCachedElements / (products * (channels + chunk)), kFewestTiles), kMostTiles);
    const int64_t blocks = ceil_div(plan_.tiles(), most);
    return std::min(round_up(blocks, blocks < kManyBlocks ? 2 : 4), plan_.tiles());
  }
  int64_t panels_at_once() const { return std::max<int64_t>(1, kFiltersAtOnce / kFilters); }

  void by_tiles(const Parallel& pool) {
    const int64_t tiles = plan_.tiles(), blocks = tile_blocks();
    const int64_t u_size = plan_.panels * weights_.panel;
    const bool own = u_ == nullptr && blocks <= kBlocksOfOwnU && u_size <= kOwnU;
    const bool shared = u_ == nullptr && !own;
    Buffer<float> shared_u(shared ? u_size : 0);
    if (shared) transform_all_weights(plan_, w_, shared_u.get(), pool);
    const int64_t slots = ceil_div(tiles, blocks);
    const SourceLayout layout(plan_, slots);
    const ProductLayout products(plan_.shape(), slots);
    const int64_t chunk = std::min(panels_at_once(), plan_.panels);
    const int64_t scratch_size =
        std::max(source_scratch(plan_, slots), product_scratch(plan_, slots));
    const int64_t grain = work_grain(multiplications(slots, plan_.panels));
    parallel_for_with_scratch(pool, 0, blocks, grain, [&](int64_t begin, int64_t end) {
      Buffer<float> v(layout.size(plan_)), m(chunk * products.panel), scratch(scratch_size);
      Buffer<float> own_u(own ? u_size : 0);
      for (int64_t i = 0; own && i < plan_.panels * plan_.blocks; ++i) {
        const int64_t panel = i / plan_.blocks, c = i % plan_.blocks;
        transform_panel(plan_, w_, panel, c,
                        own_u.get() + panel * weights_.panel + c * weights_.block, false);
      }
      const float* const u = own ? own_u.get() : shared ? shared_u.get() : u_;
      SourcePrefetch ahead;
      for (int64_t b = begin; b < end; ++b) {
        // They differ by one tile at most.
        const int64_t first = tiles * b / blocks, last = tiles * (b + 1) / blocks;
        const TileBlock block(plan_, first, last - first);
        for (const Segment& s : block.segments())
          transform_source(plan_, block, s, src_, layout, scratch.get(), v.get());
        for (int64_t panel = 0; panel < plan_.panels; panel += chunk) {
          const int64_t count = std::min(chunk, plan_.panels - panel);
          expect_outputs(block, {panel * kFilters, (panel + count) * kFilters}, ahead);
          for (int64_t c = 0; c < plan_.blocks; ++c)
            multiply(block, c, panel, count, layout, v.get(),
                     u + panel * weights_.panel + c * weights_.block, products, m.get(), false,
                     ahead);
          for (int64_t i = 0; i < count; ++i)
            finish(block, panel + i, products, m.get() + i * products.panel, scratch.get());
        }
      }
    });
  }

  double multiplications(int64_t tiles, int64_t panels) const {
    const int64_t side = plan_.shape().products();
    return static_cast<double>(tiles * side * side * panels * kFilters) *
           static_cast<double>(plan_.vectors * kVector);
  }

  // Of weights too large to be kept: they are transformed a block at a time.
  void by_filters(const Parallel& pool) {
    const int64_t tiles = plan_.tiles();
    const TileBlock block(plan_, 0, tiles);
    const SourceLayout layout(plan_, tiles);
    const ProductLayout products(plan_.shape(), tiles);
    Buffer<float> v(layout.size(plan_));
    const int64_t segments = static_cast<int64_t>(block.segments().size());
    const int64_t segment_grain = work_grain(multiplications(ceil_div(tiles, segments), 1) / 4);
    parallel_for_with_scratch(pool, 0, segments, segment_grain, [&](int64_t begin, int64_t end) {
      Buffer<float> scratch(source_scratch(plan_, tiles));
      for (int64_t s = begin; s < end; ++s)
        transform_source(plan_, block, block.segments()[s], src_, layout, scratch.get(), v.get());
    });
    const int64_t grain = work_grain(multiplications(tiles, 1));
    parallel_for_with_scratch(pool, 0, plan_.panels, grain, [&](int64_t begin, int64_t end) {
      Buffer<float> u(weights_.block), m(products.panel), scratch(product_scratch(plan_, tiles));
      SourcePrefetch ahead;
      for (int64_t panel = begin; panel < end; ++panel) {
        expect_outputs(block, {panel * kFilters, (panel + 1) * kFilters}, ahead);
        for (int64_t c = 0; c < plan_.blocks; ++c) {
          transform_panel(plan_, w_, panel, c, u.get(), /*streams=*/false);
          multiply(block, c, panel, 1, layout, v.get(), u.get(), products, m.get(), true, ahead);
        }
        finish(block, panel, products, m.get(), scratch.get());
      }
    });
  }

  // What the epilogue is going to read and write of a block's outputs.
  void expect_outputs(const TileBlock& block, Range filters, SourcePrefetch& ahead) const {
    ahead.clear();
    if (plan_.rows.form == Axis::kUnfold) return;
    filters.end = std::min(filters.end, plan_.view.K);
    for (const Segment& s : block.segments()) {
      if (epilogue_.residual != nullptr)
        prefetch_outputs(plan_, s, filters, epilogue_.residual, ahead);
      prefetch_outputs(plan_, s, filters, epilogue_.y, ahead);
    }
  }

  // Adds one block of channels to M of `panels` panels, whose U is at u. u_is_near: it has just
  // been written, and V is what has to be fetched.
  void multiply(const TileBlock& tiles, int64_t block, int64_t first_panel, int64_t panels,
                const SourceLayout& layout, const float* v, const float* u,
                const ProductLayout& products, float* m, bool u_is_near,
                SourcePrefetch& ahead) const {
    WinogradGemm<float> g{};
    g.channels = plan_.channels_in(block);
    g.accumulate = block > 0;
    v += block * layout.block;
    const int64_t lines = ceil_div(
        ahead.lines(), plan_.blocks * kPlanes * panels * ceil_div(tiles.tiles(), kMaxRows));
    for (int plane = 0; plane < kPlanes; ++plane) {
      const int r = plane / kSide, s = plane % kSide;
      const Kind kind = plan_.shape().kind(r, s);
      const int index = plan_.shape().index(r, s);
      const Range range = tiles.range(r, s);
      const float* source = v + layout.kind[kind] + index * layout.plane[kind];
      g.v_step = layout.vector[kind];
      g.m_step = products.row[kind];
      for (int64_t panel = 0; panel < panels; ++panel) {
        g.u = u + panel * weights_.panel + plane * weights_.plane;
        const bool last = panel + 1 == panels;
        const int64_t filters = plan_.view.K - (first_panel + panel) * kFilters;
        const int64_t vectors = std::min(ceil_div(filters, kVector), int64_t{kMaxVectors});
        if (u_is_near)
          g.next = source + layout.plane[kind];
        else
          g.next = last ? u + (plane + 1) * weights_.plane : g.u + weights_.panel;
        for_row_tiles(range.size(), [&](int64_t first, int64_t rows) {
          g.v = source + (range.begin + first) * kVector;
          g.m = m + panel * products.panel + products.kind[kind] +
                (range.begin + first) * g.m_step + index * kFilters;
          winograd_microkernel<float>(rows, vectors)(g);
          ahead.ask(lines);
          if (u_is_near) g.next += g.channels * kFilters;
        });
      }
    }
  }

  void finish(const TileBlock& tiles, int64_t panel, const ProductLayout& products, const float* m,
              float* scratch) const {
    for (const Segment& s : tiles.segments())
      if (!transform_products(plan_, tiles, s, panel, products, m, bias_.get() + panel * kFilters,
                              epilogue_, scratch))
        special_.add(s.n);
  }

  const Plan& plan_;
  const float* src_;
  const float* w_;
  const float* u_;
  const Epilogue<float>& epilogue_;
  SpecialSamples special_;
  const WeightLayout weights_;
  Buffer<float> bias_;
};

}  // namespace
}  // namespace winograd_strided

bool strided_winograd_applies(const ConvProblem& p) {
  if (p.dtype == DType::kFloat64 || p.groups != 1 || p.stride_h != 2 || p.stride_w != 2 ||
      p.dilation_h != 1 || p.dilation_w != 1 || p.C == 0 || p.P == 0 || p.Q == 0)
    return false;
  if (p.R == 3 && p.S == 3) return true;
  // The phases of all channels are one panel.
  const auto folds = [](int64_t size) { return size == 6 || size == 7; };
  return folds(p.R) && folds(p.S) && 4 * p.C <= winograd_strided::kFilters;
}

int64_t strided_winograd_products(const ConvProblem& p, StridedPass pass) {
  const winograd_strided::Plan plan = winograd_strided::make_plan(p, pass);
  const int64_t phases = winograd_strided::folds(plan.rows.form) ? 4 : 1;
  return phases * plan.rows.products() * plan.columns.products();
}

int64_t strided_winograd_weights_size(const ConvProblem& p) {
  const winograd_strided::Plan plan = winograd_strided::make_plan(p, StridedPass::kFprop);
  return plan.view.C * plan.view.K >= winograd_strided::kManyWeights
             ? 0
             : plan.panels * winograd_strided::WeightLayout(plan).panel;
}

void strided_winograd_pack_weights(const ConvProblem& p, const float* w, float* u,
                                   const Parallel& pool) {
  const winograd_strided::Plan plan = winograd_strided::make_plan(p, StridedPass::kFprop);
  winograd_strided::transform_all_weights(plan, w, u, pool);
}

std::vector<int64_t> strided_winograd(const ConvProblem& p, StridedPass pass, const float* src,
                                      const float* w, const float* bias,
                                      const Epilogue<float>& epilogue, const Parallel& pool,
                                      const float* u) {
  const winograd_strided::Plan plan = winograd_strided::make_plan(p, pass);
  return winograd_strided::Driver(plan, src, w, u, bias, epilogue).run(pool);
}

}  // namespace torchconv::cpu
