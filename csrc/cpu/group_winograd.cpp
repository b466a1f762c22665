// With few channels in a group the tiles of F(4x4,3x3) have too few products for their transforms.
// F(2,3) along the columns has nothing but sums, which do not compete with products, and with
// F(4,3) along the rows a third of the multiplications is left (microkernels/group_winograd.h;
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015).
//
// A task is a band of rows of a block of groups (group_band.h), and goes down the band tile by
// tile. In channels_last it reads the image and writes where outputs belong; else channels of the
// source, and then the filters of outputs, are transposed, and the products meanwhile fetch the
// planes that come next.
#include "cpu/group_winograd.h"

#include <optional>

#include "core/buffer.h"
#include "cpu/group_store.h"
#include "cpu/group_weights.h"
#include "cpu/microkernels/group_winograd.h"
#include "cpu/parallel_range.h"
#include "cpu/source_prefetch.h"
#include "cpu/special_samples.h"
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu {
namespace group_winograd {
namespace {

using V = Vec<float>;
using Register = V::Type;
constexpr int64_t kL = V::kLanes;
constexpr int kTaps = kGroupWinogradTaps, kOutputs = kGroupWinogradOutputs,
              kPoints = kGroupWinogradPoints, kDown = kGroupWinogradDown;

// Elements.
constexpr int64_t kFarWeights = 64 << 10;
constexpr int64_t kNearImages = kStreamedBytes / static_cast<int64_t>(sizeof(float));

// Three runs of three taps, one below the other.
bool is_square(const ConvView& view) {
  const std::vector<GroupRun> runs = group_runs(view);
  if (runs.size() != kTaps) return false;
  for (int r = 0; r < kTaps; ++r)
    if (runs[r].count != kTaps || runs[r].w != runs[0].w || runs[r].h != runs[0].h + r)
      return false;
  return true;
}

// The view with columns for whole tiles, whose band has zeros for what these add.
ConvView whole_tiles(const ConvView& view) {
  const winograd::TileAxis columns(view.J, 1, kOutputs);
  const int64_t last = columns.count - 1;
  ConvView whole = view;
  whole.J = columns.begin(last) + kOutputs - (columns.is_full(last) ? 0 : 1);
  return whole;
}

GroupBand gather_band(const ConvView& view) {
  return group_winograd_band(view, kGroupWinogradRows);
}

// Whether lanes are exchanged, which stays within their group. With zeros for what it lacks of a
// vector that is a fourth more products at most.
bool exchanges(const ConvView& view) {
  if (view.C > kL / 4 * 3) return view.K <= kL;
  return view.C == view.K && (view.C == kL / 2 || view.C == kL / 4);
}
// Channels that a filter meets.
int64_t channels_of(const ConvView& view) {
  return exchanges(view) ? round_up(view.C, kL / 4) : view.C;
}

// Elements of a vector of filters.
int64_t weights_of(const ConvView& view) { return kPoints * channels_of(view) * kDown * kL; }

// From channel c in vectors [c] to channel l ^ c of lane l, a bit of the lane at a time.
void exchange_channels(float* taps, int64_t channels, int64_t size) {
  LaneIndex<float> lane[kL];
  for (int l = 0; l < kL; ++l) lane[l] = l;
  const auto lanes = Vec<LaneIndex<float>>::load(lane);
  for (int bit = 1; bit < channels; bit *= 2) {
    const auto other = (lanes & bit) != 0;
    for (int64_t c = 0; c < channels; ++c) {
      if ((c & bit) != 0) continue;
      float *const a = taps + c * size, *const b = taps + (c + bit) * size;
      for (int64_t i = 0; i < size; i += kL) {
        const Register x = V::load(a + i), y = V::load(b + i);
        V::store(a + i, other ? y : x);
        V::store(b + i, other ? x : y);
      }
    }
  }
}

// G g G^T of the weights [row of taps][channel][tap] of a vector of filters, to [point of a row]
// [lane ^ channel or channel][point of a column], all in vectors.
class WeightTransform {
 public:
  WeightTransform(const ConvView& view, const GroupBand& band, const float* w)
      : view_(view), weights_({&view}, band, w), channels_(channels_of(view)) {}

  int64_t scratch() const { return weights_.vector_size() + channels_ * kChannel; }
  // Of vector i of all.
  void run(int64_t i, float* scratch, float* u) const {
    weights_.pack_vector(i, scratch, nullptr);
    const float* from = scratch;
    float* const taps = scratch + weights_.vector_size();
    for (int64_t r = 0; r < kTaps; ++r)
      for (int64_t c = 0; c < view_.C; ++c, from += kTapRow)
        std::copy_n(from, kTapRow, taps + c * kChannel + r * kTapRow);
    fill_zero(taps + view_.C * kChannel, (channels_ - view_.C) * kChannel);
    if (exchanges(view_)) exchange_channels(taps, channels_, kChannel);
    for (int64_t c = 0; c < channels_; ++c) {
      Register g[kTaps][kPoints];
      for (int r = 0; r < kTaps; ++r) {
        const float* const row = taps + c * kChannel + r * kTapRow;
        const Register tap[kTaps] = {V::load(row), V::load(row + kL), V::load(row + 2 * kL)};
        winograd::transform_weight(tap, g[r]);
      }
      for (int p = 0; p < kPoints; ++p) {
        const Register ends = (g[0][p] + g[2][p]) * 0.5f, middle = g[1][p] * 0.5f;
        float* const to = u + (p * channels_ + c) * kDown * kL;
        V::store(to, g[0][p]);
        V::store(to + kL, ends + middle);
        V::store(to + 2 * kL, ends - middle);
        V::store(to + 3 * kL, g[2][p]);
      }
    }
  }

 private:
  static constexpr int64_t kTapRow = kTaps * kL, kChannel = kTaps * kTapRow;
  const ConvView& view_;
  const GroupWeights<float, false> weights_;
  const int64_t channels_;
};

void transform_weights(const ConvView& view, const float* w, float* u, const Parallel& pool) {
  const GroupBand band = gather_band(view);
  const WeightTransform transform(view, band, w);
  const int64_t size = weights_of(view);
  const WorkSplit split(band.blocks * band.dst_vectors, static_cast<double>(size));
  Buffer<float> scratch(split.slots * transform.scratch());
  split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
    for (int64_t i = begin; i < end; ++i)
      transform.run(i, scratch.get() + slot * transform.scratch(), u + i * size);
  });
}

class GroupWinograd {
 public:
  GroupWinograd(const ConvView& view, const float* src, const float* w, const float* bias,
                const Epilogue<float>& epilogue)
      : view_(view),
        band_(gather_band(view)),
        columns_(view.J, 1, kOutputs),
        lanes_(band_.source_lanes<float>(view)),
        store_(view.dst, view.J, epilogue),
        src_(src),
        w_(w),
        bias_(band_.blocks * band_.dst_vectors * kL),
        special_(view.N) {
    for (int64_t i = 0; i < band_.blocks * band_.dst_vectors; ++i) {
      const int64_t block = i / band_.dst_vectors, vector = i % band_.dst_vectors;
      const int64_t first = block * band_.groups * view_.K + vector * band_.vector_filters;
      const int64_t filters = band_.filters_in(view_, block, vector);
      for (int64_t l = 0; l < kL; ++l)
        bias_[i * kL + l] = bias != nullptr && l < filters ? bias[first + l] : 0.0f;
    }
    // Weights of all blocks that do not stay in the second-level cache beside images that are near.
    const bool far = band_.blocks * band_.dst_vectors * weights_of(view) >= kFarWeights &&
                     view.N * (view.src.n + view.dst.n) <= kNearImages;
    by_block_ = view.src.c != 1 || far;
    in_place_ = store_.simple && view.dst.c == 1;
    streams_ = store_.streams(band_.whole_vectors(view), band_.band, view.dst_offset, view.N);
  }

  // packed: or null. Weights that are not packed are transformed by whoever multiplies with them,
  // where each thread has blocks of its own.
  std::vector<int64_t> run(const float* packed, const Parallel& pool) const {
    const bool transforms = packed == nullptr && (by_block_ || view_.N * band_.bands == 1);
    const bool shares = packed == nullptr && !transforms;
    std::optional<WeightTransform> transform;
    if (transforms) transform.emplace(view_, band_, w_);
    Buffer<float> own(shares ? group_winograd_weights_size(view_) : 0);
    if (shares) {
      transform_weights(view_, w_, own.get(), pool);
      packed = own.get();
    }
    const int64_t weights = band_.dst_vectors * weights_of(view_);
    const int64_t tasks = view_.N * band_.bands * band_.blocks;
    const int64_t source = round_up(band_.size, 16);
    const int64_t images = source + window_size() + group_winograd_scratch(band_.band) +
                           out_size() + store_.planes_size(band_.band);
    const int64_t slot_size = images + (transforms ? weights + transform->scratch() : 0);
    const WorkSplit split(tasks,
                          static_cast<double>(band_.band * view_.J * band_.dst_vectors * kL) *
                              static_cast<double>(view_.terms() / 3 + 8));
    Buffer<float> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* const band = scratch.get() + slot * slot_size;
      float* const u = band + images;
      SourcePrefetch ahead;
      int64_t transformed = -1;  // block
      for (int64_t task = begin; task < end; ++task) {
        Task t = task_at(task, band, source);
        t.u = transforms ? u : packed + t.block * weights;
        if (transforms && t.block != transformed) {
          for (int64_t v = 0; v < band_.dst_vectors; ++v)
            transform->run(t.block * band_.dst_vectors + v, u + weights, u + v * weights_of(view_));
          transformed = t.block;
        }
        // The products leave the memory idle.
        ahead.clear();
        if (view_.dst.c != 1 && !streams_) expect_outputs(t, ahead);
        if (task + 1 < end) expect_source(t, task_at(task + 1, band, 0), packed, ahead);
        if (!run_band(t, ahead)) special_.add(t.n);
      }
      if (streams_) stream_fence();
    });
    return special_.list();
  }

 private:
  struct Task {
    int64_t n, block, i0, rows;
    float *band, *window, *points, *out;
    const float* u;
  };

  int64_t window_size() const { return (band_.band + kTaps - 1) * kPoints * kL; }
  int64_t out_size() const { return band_.band * view_.J * kL; }

  Task task_at(int64_t task, float* scratch, int64_t source) const {
    const GroupTask at(band_, view_, task, by_block_);
    const int64_t i0 = at.band * band_.band;
    return {at.n,
            at.block,
            i0,
            std::min(band_.band, view_.I - i0),
            scratch,
            scratch + source,
            scratch + source + window_size(),
            scratch + source + window_size() + group_winograd_scratch(band_.band),
            nullptr};
  }

  // What the next task reads and the transforms do not ask for: planes, and weights, which another
  // core may have transformed.
  void expect_source(const Task& t, const Task& next, const float* packed,
                     SourcePrefetch& ahead) const {
    constexpr auto kSize = static_cast<int64_t>(sizeof(float));
    const int64_t weights = band_.dst_vectors * weights_of(view_);
    const int64_t taps = band_.groups * view_.weight_group;
    if (next.block != t.block && packed != nullptr)
      ahead.add(packed + next.block * weights, 1, 0, weights * kSize);
    else if (next.block != t.block)
      ahead.add(w_ + next.block * taps, 1, 0, taps * kSize);
    if (view_.src.c != 1)
      band_.expect(view_, src_ + next.n * view_.src.n, next.block, next.i0, ahead);
  }
  // The planes that a task writes.
  void expect_outputs(const Task& t, SourcePrefetch& ahead) const {
    const int64_t filter = t.block * band_.groups * view_.K;
    const int64_t filters = band_.groups_in(view_, t.block) * view_.K;
    prefetch_planes(store_.epilogue.y + view_.dst_offset + t.n * view_.dst.n +
                        filter * view_.dst.c + t.i0 * view_.dst.row,
                    view_.dst, filters, t.rows, view_.J, ahead);
  }

  // False where an output is not finite.
  bool run_band(const Task& t, SourcePrefetch& ahead) const {
    const float* const src =
        src_ + t.n * view_.src.n + t.block * band_.groups * view_.C * view_.src.c;
    if (view_.src.c != 1) band_.fill<float>(view_, src_ + t.n * view_.src.n, t.block, t.i0, t.band);
    GroupWinogradTile tile{};
    tile.fetch = &ahead;
    tile.lines = ceil_div(ahead.lines(), band_.dst_vectors * columns_.points() *
                                             ceil_div(t.rows, int64_t{kGroupWinogradRows}));
    tile.rows = t.rows;
    tile.scratch = t.points;
    tile.channels = channels_of(view_);
    tile.stream = streams_ && in_place_;
    tile.clamp = store_.simple && store_.clamps;
    tile.high = store_.high;
    bool finite = true;
    for (int64_t v = 0; v < band_.dst_vectors; ++v) {
      const int64_t used = band_.filters_in(view_, t.block, v);
      if (used == 0) break;
      const int64_t index = t.block * band_.dst_vectors + v;
      const int64_t filter = t.block * band_.groups * view_.K + v * band_.vector_filters;
      const int64_t dst =
          view_.dst_offset + t.n * view_.dst.n + t.i0 * view_.dst.row + filter * view_.dst.c;
      tile.lanes = exchanges(view_) ? nullptr : lanes_.data() + v * kL;
      tile.weights = t.u + v * weights_of(view_);
      tile.bias = bias_.get() + index * kL;
      tile.dst_row = in_place_ ? view_.dst.row : view_.J * kL;
      tile.dst_column = in_place_ ? view_.dst.column : kL;
      tile.used = in_place_ ? used : kL;
      for (int64_t c = 0; c < columns_.count; ++c) {
        const int64_t j = columns_.begin(c);
        tile.full = columns_.is_full(c);
        tile.columns = columns_.outputs_of(c);
        tile.dst = in_place_ ? store_.epilogue.y + dst + j * view_.dst.column : t.out + j * kL;
        tile.src = source_of(t, src, j, tile.full);
        finite &= group_winograd_tile(tile);
      }
      if (in_place_) continue;
      if (view_.dst.c != 1)
        store_.store_planes(t.out, used, t.rows, dst, t.out + out_size(), streams_);
      else
        for (int64_t r = 0; r < t.rows; ++r)
          store_.store_pixels(t.out + r * view_.J * kL, used, dst + r * view_.dst.row);
    }
    return finite;
  }

  // From a pixel to the one that the next task reads in its place: the next block's is a neighbour.
  int64_t ahead_of(const Task& t) const {
    if (!by_block_ && t.block + 1 < band_.blocks) return kL;
    if (!by_block_) return t.rows * view_.src.row - t.block * kL;
    if (t.i0 + t.rows < view_.I) return t.rows * view_.src.row;
    return (t.n + 1 < view_.N ? view_.src.n : kL - t.n * view_.src.n) - t.i0 * view_.src.row;
  }

  // The source of the tile at column j.
  GroupPixels source_of(const Task& t, const float* src, int64_t j, bool full) const {
    const int64_t rows = t.rows + kTaps - 1;
    if (view_.src.c != 1) return {t.band + j * kL, band_.width * kL, kL, 0, rows, 0};
    const int64_t channels = band_.groups_in(view_, t.block) * view_.C;
    return group_pixels({view_.src, channels, view_.H, view_.W, t.i0 + band_.first_h, rows,
                         j + band_.first_w, kPoints - (full ? 0 : 1), ahead_of(t)},
                        src, t.window);
  }

  const ConvView& view_;
  const GroupBand band_;
  const winograd::TileAxis columns_;
  const std::vector<LaneIndex<float>> lanes_;
  const GroupStore<float> store_;
  const float* src_;
  const float* w_;
  Buffer<float> bias_;  // [block][vector][lanes]
  SpecialSamples special_;
  bool by_block_;            // the order of tasks, see GroupTask
  bool in_place_, streams_;  // the tile itself can finish
};

}  // namespace
}  // namespace group_winograd

GroupBand group_winograd_band(const ConvView& view, int64_t unit) {
  return GroupBand(group_winograd::whole_tiles(view), sizeof(float), kPermutesLanes<float>, unit);
}

GroupPixels group_pixels(const GroupWindow& window, const float* src, float* copy) {
  constexpr int64_t kL = kLanes<float>;
  if (window.channels < kL || window.w < 0 || window.w + window.columns > window.W) {
    copy_group_window<float>(window, src, copy);
    return {copy, window.columns * kL, kL, 0, window.rows, 0};
  }
  const int64_t begin = std::clamp<int64_t>(-window.h, 0, window.rows);
  return {src + window.h * window.strides.row + window.w * window.strides.column,
          window.strides.row,
          window.strides.column,
          begin,
          std::clamp<int64_t>(window.H - window.h, begin, window.rows),
          window.ahead};
}

bool group_winograd_applies(const ConvView& view) {
  if (!kGroupWinogradServes || view.groups == 1 || view.step_h != 1 || view.step_w != 1 ||
      !group_winograd::is_square(view))
    return false;
  const GroupBand band = group_winograd_band(view);
  return band.fits && band.src_vectors == 1;
}

double group_winograd_wgrad_products(const ConvView& view) {
  const winograd::TileAxis columns(view.J, 1, kGroupWinogradOutputs);
  return static_cast<double>(columns.points()) / static_cast<double>(view.J * kGroupWinogradTaps);
}

double group_winograd_products(const ConvView& view) {
  const auto channels = static_cast<double>(group_winograd::channels_of(view));
  return group_winograd_wgrad_products(view) * channels / static_cast<double>(view.C) *
         static_cast<double>(ceil_div(view.I, 2) * kGroupWinogradDown) /
         static_cast<double>(view.I * kGroupWinogradTaps);
}

int64_t group_winograd_weights_size(const ConvView& view) {
  const GroupBand band = group_winograd::gather_band(view);
  return band.blocks * band.dst_vectors * group_winograd::weights_of(view);
}

void group_winograd_pack_weights(const ConvView& view, const float* w, float* packed,
                                 const Parallel& pool) {
  group_winograd::transform_weights(view, w, packed, pool);
}

std::vector<int64_t> group_winograd_gather(const ConvView& view, const float* src, const float* w,
                                           const float* packed, const float* bias,
                                           const Epilogue<float>& epilogue, const Parallel& pool) {
  return group_winograd::GroupWinograd(view, src, w, bias, epilogue).run(packed, pool);
}

}  // namespace torchconv::cpu
