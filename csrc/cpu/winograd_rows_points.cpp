// Blocking and order of winograd_rows_points.h.
//
// A task is a block of rows and columns of a sample, whose transformed source stays in the
// second-level cache:
//
//   V [source row][channel][group, point][tile]   transformed source
//   U [panel][point][term][filter]                transformed weights: of one tap for each point
//   M [tile][point][filter]                       products of one panel
//
// The terms of a point are the first ones of all, since groups of more taps, which have more
// points, come first.
#include "cpu/winograd_rows_points.h"

#include "cpu/channel_band.h"
#include "cpu/microkernels/direct_tile.h"
#include "cpu/parallel_range.h"
#include "cpu/special_samples.h"
#include "cpu/winograd_rows_terms.h"
#include "cpu/winograd_rows_tile.h"

namespace torchconv::cpu::winograd::rows {
namespace {

// Tiles of a row in a task: whole register tiles of the products, in two vectors of 8 or one of 16.
constexpr int64_t kBlockTiles = 16 / kMaxRows * kMaxRows;
// What a task's transformed source may take of the second-level cache.
constexpr int64_t kBlockBytes = 512 << 10;
constexpr int64_t kBlocksWanted = 12;
// Weights of a vector of filters that leave the first-level cache room for points.
constexpr int64_t kNearBytes = 16 << 10;

class PointProducts {
  using V = Vec<float>;
  using Register = V::Type;
  static constexpr int kL = V::kLanes;
  static constexpr int64_t kWidth = kPanel<float>;

 public:
  PointProducts(const ConvView& view, const float* src, const float* w, const float* bias,
                const Epilogue<float>& epilogue)
      : view_(view),
        src_(src),
        epilogue_(epilogue),
        terms_(view),
        tiles_(ceil_div(view.J, kOutputs)),
        block_tiles_(even_piece(tiles_, kBlockTiles)),
        plane_(round_up(block_tiles_, kL)),
        filters_(round_up(view.K, kL)),
        bias_(bias_points(bias, view.K)),
        special_(view.N),
        outputs_(outputs_of(view, epilogue)),
        direct_(stores_directly(view, epilogue)) {
    for (int64_t t = 0; t < tiles_; t += block_tiles_) {
      ConvView block = view;
      block.J = std::min(view.J - t * kOutputs, block_tiles_ * kOutputs);
      for (ConvTap& tap : block.taps) tap.w += t * kOutputs * view.step_w;
      sources_.emplace_back(block, plane_);
    }
    source_row_ = view.C * sources_[0].channel();
    offsets_ = terms_.offsets<int32_t>(source_row_, sources_[0].channel(), plane_);
    for (int p = 0; p < kMostPoints; ++p) {
      for (int taps = 1; taps <= kMostTaps; ++taps)
        if (points_of(taps) > p) terms_of_[p] += terms_.of_taps(taps);
      all_terms_ += terms_of_[p];
    }
    u_ = Buffer<float>(filters_ * all_terms_);
    pack(w);
    const int64_t affordable = kBlockBytes / (source_row_ * static_cast<int64_t>(sizeof(float)));
    block_rows_ = ceil_div(view.I, ceil_div(kBlocksWanted, view.N * blocks_j()));
    block_rows_ = std::max(block_rows_, 2 * terms_.halo());
    block_rows_ = std::min(block_rows_, (affordable - terms_.halo() - 1) / view.step_h + 1);
    block_rows_ = even_piece(view.I, block_rows_);
  }

  std::vector<int64_t> run(const Parallel& pool) {
    const int64_t blocks_i = ceil_div(view_.I, block_rows_);
    const int64_t tiles = block_rows_ * block_tiles_;
    const WorkSplit split(view_.N * blocks_j() * blocks_i,
                          static_cast<double>(tiles * filters_ * all_terms_));
    const int64_t source = ((block_rows_ - 1) * view_.step_h + terms_.halo() + 1) * source_row_;
    const int64_t row = round_up(sources_[0].scratch_size(), 16);
    const int64_t products = tiles * kMostPoints * kWidth;
    const int64_t outputs = kPixels * kL;
    const int64_t slot_size = source + row + products + outputs;
    Buffer<float> scratch(split.slots * slot_size);
    Buffer<int64_t> tables(split.slots * 2 * tiles);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      Task t;
      t.v = scratch.get() + slot * slot_size;
      t.row = t.v + source;
      t.products = t.row + row;
      t.outputs = t.products + products;
      t.pixels = tables.get() + slot * 2 * tiles;
      t.places = t.pixels + tiles;
      auto prepared = int64_t{-1};
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task % blocks_i * block_rows_, n = task / blocks_i / blocks_j();
        t.block = task / blocks_i % blocks_j();
        t.rows = {i, std::min(i + block_rows_, view_.I)};
        const int64_t tile = t.block * block_tiles_;
        t.tiles = {tile, std::min(tile + block_tiles_, tiles_)};
        if (t.block != prepared) sources_[static_cast<size_t>(t.block)].prepare(t.row);
        prepared = t.block;
        transform_source(t, n);
        if (!multiply(t, n)) special_.add(n);
      }
      if (outputs_.stream) stream_fence();
    });
    return special_.list();
  }

 private:
  struct Task {
    float *v, *row, *products, *outputs;
    int64_t *pixels, *places;  // of each tile in v and in products
    int64_t block;             // of columns
    Range rows, tiles;
  };

  int64_t blocks_j() const { return ceil_div(tiles_, block_tiles_); }

  void pack(const float* w) {
    for (int64_t k = 0; k < view_.K; k += kL) {
      const int64_t panel = k / kWidth * kWidth, width = std::min(filters_ - panel, kWidth);
      float* const u = u_.get() + panel * all_terms_ + (k - panel);
      terms_.for_weights(view_, w, k, [&](int64_t term, int taps, const Register* points) {
        float* to = u + term * width;
        for (int p = 0; p < points_of(taps); ++p) {
          V::store(to, points[weights_of(taps) == 1 ? 0 : p]);
          to += terms_of_[p] * width;
        }
      });
    }
  }

  void transform_source(const Task& t, int64_t n) const {
    const int64_t count = (t.rows.size() - 1) * view_.step_h + terms_.halo() + 1;
    const int64_t first = t.rows.begin * view_.step_h + terms_.rows().front();
    const Source& source = sources_[static_cast<size_t>(t.block)];
    for (int64_t y = 0; y < count; ++y)
      source.transform(src_ + n * view_.src.n, first + y, t.row, t.v + y * source_row_);
  }

  // False where a sum is not finite.
  bool multiply(const Task& t, int64_t n) const {
    int64_t count = 0;
    for (int64_t y = 0; y < t.rows.size(); ++y)
      for (int64_t tile = 0; tile < t.tiles.size(); ++tile, ++count) {
        t.pixels[count] = y * view_.step_h * source_row_ + tile;
        t.places[count] = count * kMostPoints * kWidth;
      }
    auto special = Register{};
    for (int64_t k = 0; k < view_.K; k += kWidth) {
      multiply_panel(t, k, count);
      const int64_t end = std::min(k + kWidth, view_.K);
      for (int64_t y = 0; y < t.rows.size(); ++y)
        for (int64_t first = k; first < end; first += kL) special += store_row(t, n, y, first);
    }
    return !has_nan(special);
  }

  // From filter k on, of all tiles of the task.
  void multiply_panel(const Task& t, int64_t k, int64_t tiles) const {
    const int64_t width = std::min(filters_ - k, kWidth);
    const float* u = u_.get() + k * all_terms_;
    DirectTile<float> tile{};
    tile.pixels = t.pixels;
    tile.terms = offsets_.data();
    tile.panels = 1;
    tile.lanes = kL;
    for (int p = 0; p < kMostPoints; ++p) {
      alignas(64) float start[kWidth] = {};
      for (int64_t l = 0; p < points_of(1) && l < width; l += kL)
        V::store(start + l, V::load(bias_.get() + (k + l) * points_of(1) + p * kL));
      const TermSegment all{0, static_cast<int32_t>(terms_of_[p]), true, true};
      tile.segments = &all;
      tile.a = t.v + p * plane_;
      tile.b = u;
      tile.bias = start;
      tile.c = t.products + p * kWidth;
      // What the next point reads.
      tile.next = u + terms_of_[p] * width;
      tile.next_step = static_cast<int64_t>(kL * sizeof(float));
      for_row_tiles(tiles, [&](int64_t first, int64_t rows) {
        tile.pixels = t.pixels + first;
        tile.c_rows = t.places + first;
        direct_microkernel<float>(rows, width / kL)(tile);
        tile.next = static_cast<const char*>(tile.next) + tile.next_step * terms_of_[p];
        if (first > 0) tile.next = u, tile.next_step = 0;
      });
      u += terms_of_[p] * width;
    }
  }

  // Of a vector of filters: returns a vector with a NaN where a sum is not finite.
  Register store_row(const Task& t, int64_t n, int64_t y, int64_t k) const {
    const bool transposed = view_.dst.c != 1;
    RowOutputs to = outputs_;
    to.filters = std::min<int64_t>(view_.K - k, kL);
    const int64_t row =
        view_.dst_offset + n * view_.dst.n + (t.rows.begin + y) * view_.dst.row + k * view_.dst.c;
    const float* m = t.products + y * t.tiles.size() * kMostPoints * kWidth + k % kWidth;
    auto special = Register{};
    for (int64_t tile = t.tiles.begin; tile < t.tiles.end; tile += kTiles) {
      const int64_t wide = std::min<int64_t>(t.tiles.end - tile, kTiles);
      Register sum[kTiles][kMostPoints];
#pragma GCC unroll 4
      for (int64_t i = 0; i < kTiles; ++i)
#pragma GCC unroll 6
        for (int p = 0; p < kMostPoints; ++p)
          sum[i][p] = i < wide ? V::load(m + (i * kMostPoints + p) * kWidth) : Register{};
      m += kTiles * kMostPoints * kWidth;
      const int64_t dst = row + tile * kOutputs * view_.dst.column;
      to.dst = direct_ ? epilogue_.y + dst : t.outputs;
      to.pixels = std::min(view_.J - tile * kOutputs, wide * kOutputs);
      special += transposed ? store_outputs<true>(to, sum) : store_outputs<false>(to, sum);
      if (!direct_) store_scratch(to, view_, epilogue_, dst);
    }
    return special;
  }

  const ConvView& view_;
  const float* src_;
  const Epilogue<float>& epilogue_;
  Terms terms_;
  int64_t tiles_, block_tiles_, plane_;
  std::vector<Source> sources_;  // of each block of columns
  int64_t source_row_;
  std::vector<int32_t> offsets_;  // of the terms, in V
  int64_t terms_of_[kMostPoints] = {}, all_terms_ = 0;
  int64_t filters_;  // whole vectors of them
  Buffer<float> u_{0}, bias_;
  SpecialSamples special_;
  RowOutputs outputs_;
  bool direct_;  // stores apply the epilogue
  int64_t block_rows_;
};

}  // namespace

bool points_apart(const ConvView& view) {
  return Terms(view).weights() * kVectorBytes > kNearBytes;
}

std::vector<int64_t> gather_points(const ConvView& view, const float* src, const float* w,
                                   const float* bias, const Epilogue<float>& epilogue,
                                   const Parallel& pool) {
  return PointProducts(view, src, w, bias, epilogue).run(pool);
}

}  // namespace torchconv::cpu::winograd::rows
