// Of 4 to 16 channels in a group, F(4x4,3x3) has too few products for its transforms, and with
// vectors along channels too few that share a permuted operand. Along the rows only, four outputs
// take 6 products instead of 12 for each channel and row of taps, the transforms are a quarter of
// F(4x4,3x3)'s, and the rows of taps share operands as the columns do in group_gather.cpp (Lavin
// and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, whose F(m, r) nests with any
// sum). Nothing of a tile leaves the first-level cache but its outputs.
//
// A task is a band of rows of a block of groups (group_band.h). In channels_last outputs are
// written where they belong; else some rows of all filters of a vector are transposed.
#include "cpu/group_winograd.h"

#include <atomic>
#include <memory>

#include "core/buffer.h"
#include "cpu/group_store.h"
#include "cpu/group_weights.h"
#include "cpu/group_winograd_tiles.h"
#include "cpu/parallel_range.h"
#include "cpu/winograd_output.h"

namespace torchconv::cpu {
namespace group_winograd {
namespace {

using V = Vec<float>;
using Register = V::Type;
constexpr int64_t kL = V::kLanes;
using Weights = GroupWeights<float, false>;

// Three runs of three taps, one below the other.
bool is_square(const ConvView& view) {
  const std::vector<GroupRun> runs = group_runs(view);
  if (runs.size() != kTaps) return false;
  for (int r = 0; r < kTaps; ++r)
    if (runs[r].count != kTaps || runs[r].w != runs[0].w || runs[r].h != runs[0].h + r)
      return false;
  return true;
}

// G g of the weights [vector of filters][run][channel][tap] to [vector of filters][point][channel]
// [run], all in vectors.
void transform_weights(const ConvView& view, const GroupBand& band, const float* w, float* u,
                       const Parallel& pool) {
  const Weights weights(view, band);
  const int64_t size = weights.vector_size(), point = size / kTaps;
  Buffer<float> packed(weights.size());
  weights.pack(w, packed.get(), pool);
  const WorkSplit split(band.blocks * band.dst_vectors, static_cast<double>(kPoints * point));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = packed.get() + i * size;
      float* to = u + i * kPoints * point;
      for (int64_t first = 0; first < view.C; first += kL) {
        const int64_t channels = band.groups > 1 ? view.C : std::min(kL, view.C - first);
        for (int64_t r = 0; r < kTaps; ++r)
          for (int64_t c = 0; c < channels; ++c, from += kTaps * kL) {
            const Register taps[kTaps] = {V::load(from), V::load(from + kL),
                                          V::load(from + 2 * kL)};
            Register points[kPoints];
            winograd::transform_weight(taps, points);
            for (int p = 0; p < kPoints; ++p)
              V::store(to + p * point + (c * kTaps + r) * kL, points[p]);
          }
        to += channels * kTaps * kL;
        if (band.groups > 1) break;
      }
    }
  });
}

// Where the outputs of a tile go.
struct TileOutput {
  const float* bias;
  float* dst;
  int64_t row, column, rows, columns, used;
  bool clamp;
  float high;
};

// A tile from its products [point][kRows][lanes]. Returns a vector with a NaN where an output,
// before its bias, is not finite.
template <bool kFull>
Register transform_products(const float* m, const TileOutput& out) {
  constexpr int kCount = kOutputs - (kFull ? 0 : 1);
  Register special{};
  const Register bias = V::load(out.bias), high = V::broadcast(out.high);
  float* dst = out.dst;
  for (int64_t r = 0; r < out.rows; ++r, m += kL, dst += out.row) {
    Register points[kPoints], y[kOutputs];
#pragma GCC unroll 6
    for (int p = 0; p < kPoints - (kFull ? 0 : 1); ++p) points[p] = V::load(m + p * kRows * kL);
    winograd::transform_output<kFull>(points, y);
#pragma GCC unroll 4
    for (int s = 0; s < kCount; ++s) {
      special += y[s] * 0.0f;
      y[s] += bias;
      if (out.clamp) {
        y[s] = y[s] < Register{} ? Register{} : y[s];
        y[s] = y[s] > high ? high : y[s];
      }
    }
    if (out.used == kL && out.columns == kCount) {
#pragma GCC unroll 4
      for (int s = 0; s < kCount; ++s) V::store(dst + s * out.column, y[s]);
    } else {
#pragma GCC unroll 4
      for (int s = 0; s < kCount; ++s)
        if (s < out.columns) V::store_partial(dst + s * out.column, y[s], out.used);
    }
  }
  return special;
}

class GroupWinograd {
 public:
  GroupWinograd(const ConvView& view, const float* src, const float* u, const float* bias,
                const Epilogue<float>& epilogue)
      : view_(view),
        band_(whole_tiles(view), sizeof(float), kPermutesLanes<float>),
        columns_(view.J, 1, kOutputs),
        lanes_(band_.source_lanes<float>(view)),
        store_(view.dst, view.J, epilogue),
        src_(src),
        u_(u),
        bias_(band_.blocks * band_.dst_vectors * kL),
        special_(new std::atomic<bool>[static_cast<size_t>(view.N)]()) {
    for (int64_t i = 0; i < band_.blocks * band_.dst_vectors; ++i) {
      const int64_t block = i / band_.dst_vectors, vector = i % band_.dst_vectors;
      const int64_t first = block * band_.groups * view_.K + vector * band_.vector_filters;
      const int64_t filters = band_.filters_in(view_, block, vector);
      for (int64_t l = 0; l < kL; ++l)
        bias_[i * kL + l] = bias != nullptr && l < filters ? bias[first + l] : 0.0f;
    }
    for (int64_t v = 0; v < band_.src_vectors; ++v)
      runs_.push_back({v * kTile, band_.groups > 1 ? view.C : std::min(kL, view.C - v * kL)});
    in_place_ = store_.simple && view.dst.c == 1;
  }

  std::vector<int64_t> run(const Parallel& pool) const {
    const int64_t tasks = view_.N * band_.bands * band_.blocks;
    const int64_t source = round_up(band_.size, 16), tiles = band_.src_vectors * kTile;
    const int64_t slot_size =
        source + tiles + kProducts + band_.dst_vectors * out_size() + store_.planes_size(kRows);
    const WorkSplit split(tasks,
                          static_cast<double>(band_.band * view_.J * band_.dst_vectors * kL) *
                              static_cast<double>(view_.terms() / 2 + 8));
    Buffer<float> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* const band = scratch.get() + slot * slot_size;
      Task t{};
      t.band = band;
      t.tile = band + source;
      t.products = t.tile + tiles;
      t.out = t.products + kProducts;
      fill_zero(t.tile, tiles);  // what no row fills is multiplied too
      for (int64_t task = begin; task < end; ++task) {
        t.n = task / (band_.blocks * band_.bands);
        t.block = task % band_.blocks;
        const int64_t i0 = task / band_.blocks % band_.bands * band_.band;
        band_.fill<float>(view_, src_ + t.n * view_.src.n, t.block, i0, band);
        const int64_t rows = std::min(band_.band, view_.I - i0);
        bool finite = true;
        for (int64_t i = 0; i < rows; i += t.rows) {
          t.kernel = group_sum_tile(rows - i);
          t.rows = std::min<int64_t>(kSumTiles[t.kernel], rows - i);
          finite &= run_rows(t, i, i0 + i);
        }
        if (!finite) special_[static_cast<size_t>(t.n)].store(true, std::memory_order_relaxed);
      }
    });
    std::vector<int64_t> special;
    for (int64_t n = 0; n < view_.N; ++n)
      if (special_[static_cast<size_t>(n)]) special.push_back(n);
    return special;
  }

 private:
  static constexpr int64_t kProducts = kPoints * kRows * kL;

  struct Task {
    float *band, *tile, *products, *out;
    int64_t n, block;
    int64_t rows, kernel;  // kernel: of kSumTiles
  };

  int64_t out_size() const { return kRows * view_.J * kL; }

  // Rows from `row` on of the band, row i of the image. False where an output is not finite.
  bool run_rows(const Task& t, int64_t row, int64_t i) const {
    const bool planes = view_.dst.c != 1;
    const int64_t sums = view_.C * kTaps * kL, width = band_.width * kL;
    auto special = Register{};
    const float zero[kL] = {};
    GroupSum<float> g{};
    g.runs = runs_.data();
    g.count_runs = static_cast<int64_t>(runs_.size());
    g.step = 1;
    g.start = zero;
    g.out_step = g.used = kL;
    g.count = kSumTiles[t.kernel];
    const auto multiply = group_sum_kernel<float>(kTaps, 1, band_.groups == 1, t.kernel);
    const int64_t channel = t.block * band_.groups * view_.K;
    const int64_t first =
        view_.dst_offset + t.n * view_.dst.n + i * view_.dst.row + channel * view_.dst.c;
    for (int64_t tile = 0; tile < columns_.count; ++tile) {
      const bool full = columns_.is_full(tile);
      const int64_t j = columns_.begin(tile), points = kPoints - (full ? 0 : 1);
      for (int64_t v = 0; v < band_.src_vectors; ++v)
        (full ? transform_source<true>
              : transform_source<false>)(t.band + v * band_.plane + row * width + j * kL, width,
                                         t.rows + kTaps - 1, t.tile + v * kTile);
      for (int64_t v = 0; v < band_.dst_vectors; ++v) {
        const int64_t used = band_.filters_in(view_, t.block, v);
        if (used == 0) break;
        const int64_t index = t.block * band_.dst_vectors + v;
        TileOutput out{bias_.get() + index * kL,
                       t.out + v * out_size() + j * kL,
                       view_.J * kL,
                       kL,
                       t.rows,
                       columns_.outputs_of(tile),
                       kL,
                       store_.simple && store_.clamps,
                       store_.high};
        if (in_place_) {
          out.dst = store_.epilogue.y + first + v * band_.vector_filters + j * view_.dst.column;
          out.row = view_.dst.row;
          out.column = view_.dst.column;
          out.used = used;
        }
        g.lanes = band_.groups > 1 ? lanes_.data() + v * kL : nullptr;
        g.weights = u_ + index * kPoints * sums;
        for (int64_t p = 0; p < points; ++p, g.weights += sums) {
          g.src = t.tile + p * kPlane;
          g.out = t.products + p * kRows * kL;
          for (int64_t r = p; r < t.rows; r += points)
            for (int64_t s = 0; s < out.columns; ++s)
              __builtin_prefetch(out.dst + r * out.row + s * out.column, 1, 3);
          multiply(g);
        }
        special += (full ? transform_products<true> : transform_products<false>)(t.products, out);
      }
    }
    for (int64_t v = 0; v < band_.dst_vectors && !in_place_; ++v) {
      const int64_t used = band_.filters_in(view_, t.block, v);
      const int64_t dst = first + v * band_.vector_filters * view_.dst.c;
      float* const out = t.out + v * out_size();
      if (planes)
        store_.store_planes(out, used, t.rows, dst, t.out + band_.dst_vectors * out_size());
      else
        for (int64_t r = 0; r < t.rows; ++r)
          store_.store_pixels(out + r * view_.J * kL, used, dst + r * view_.dst.row);
    }
    return !winograd::has_nan(special);
  }

  const ConvView& view_;
  const GroupBand band_;
  const winograd::TileAxis columns_;
  const std::vector<LaneIndex<float>> lanes_;
  const GroupStore<float> store_;
  const float* src_;
  const float* u_;
  std::vector<TapRun> runs_;                      // the vectors of channels of a point
  Buffer<float> bias_;                            // [block][vector][lanes]
  std::unique_ptr<std::atomic<bool>[]> special_;  // of each sample
  bool in_place_;                                 // the transform itself can finish
};

}  // namespace
}  // namespace group_winograd

bool group_winograd_applies(const ConvView& view) {
  return view.groups > 1 && view.step_h == 1 && view.step_w == 1 && view.taps.size() == 9 &&
         group_winograd::is_square(view) &&
         GroupBand(group_winograd::whole_tiles(view), sizeof(float), kPermutesLanes<float>).fits;
}

double group_winograd_products(const ConvView& view) {
  using group_winograd::kOutputs, group_winograd::kTaps;
  return static_cast<double>(group_winograd::computed_rows(view.I) *
                             winograd::TileAxis(view.J, 1, kOutputs).points()) /
         static_cast<double>(view.I * view.J * kTaps);
}

int64_t group_winograd_weights_size(const ConvView& view) {
  const GroupBand band(group_winograd::whole_tiles(view), sizeof(float), kPermutesLanes<float>);
  return band.blocks * band.dst_vectors * group_winograd::kPoints * group_winograd::kTaps * view.C *
         kLanes<float>;
}

void group_winograd_pack_weights(const ConvView& view, const float* w, float* packed,
                                 const Parallel& pool) {
  const GroupBand band(group_winograd::whole_tiles(view), sizeof(float), kPermutesLanes<float>);
  group_winograd::transform_weights(view, band, w, packed, pool);
}

std::vector<int64_t> group_winograd_gather(const ConvView& view, const float* src, const float* w,
                                           const float* packed, const float* bias,
                                           const Epilogue<float>& epilogue, const Parallel& pool) {
  Buffer<float> own(packed != nullptr ? 0 : group_winograd_weights_size(view));
  if (packed == nullptr) group_winograd_pack_weights(view, w, own.get(), pool);
  return group_winograd::GroupWinograd(view, src, packed != nullptr ? packed : own.get(), bias,
                                       epilogue)
      .run(pool);
}

}  // namespace torchconv::cpu
