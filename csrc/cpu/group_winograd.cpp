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

#include "core/buffer.h"
#include "cpu/group_store.h"
#include "cpu/group_winograd_weights.h"
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

class GroupWinograd {
 public:
  GroupWinograd(const ConvView& view, const float* src, const float* w, const float* bias,
                const Epilogue<float>& epilogue)
      : view_(view),
        band_(gather_band(view)),
        columns_(view.J, 1, kOutputs),
        lanes_(band_.source_lanes<float>(view)),
        store_(view.dst, view.J, epilogue),
        weights_(view, band_, w, channels_of(view), exchanges(view)),
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
    const int64_t weights = band_.blocks * band_.dst_vectors * weights_.vector_size();
    // Weights of all blocks that do not stay in the second-level cache beside images that are near.
    const bool far = weights >= kFarWeights && view.N * (view.src.n + view.dst.n) <= kNearImages;
    by_block_ = view.src.c != 1 || far;
    in_place_ = store_.simple && view.dst.c == 1;
    streams_ = store_.streams(band_.whole_vectors(view), band_.band, view.dst_offset, view.N);
  }

  // packed: or null. Weights that are not packed are transformed by whoever multiplies with them,
  // where each thread has blocks of its own.
  std::vector<int64_t> run(const float* packed, const Parallel& pool) const {
    const bool transforms = packed == nullptr && (by_block_ || view_.N * band_.bands == 1);
    const bool shares = packed == nullptr && !transforms;
    Buffer<float> own(shares ? weights_.size() : 0);
    if (shares) {
      weights_.run_all(own.get(), pool);
      packed = own.get();
    }
    const int64_t weights = band_.dst_vectors * weights_.vector_size();
    const int64_t tasks = view_.N * band_.bands * band_.blocks;
    const int64_t source = round_up(band_.size, 16);
    const int64_t images =
        source + kGroupWinogradScratch + out_size() + store_.planes_size(band_.band);
    const int64_t slot_size = images + (transforms ? weights + weights_.scratch() : 0);
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
            weights_.run(t.block * band_.dst_vectors + v, u + weights,
                         u + v * weights_.vector_size());
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
    float *band, *points, *out;
    const float* u;
  };

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
            scratch + source + kGroupWinogradScratch,
            nullptr};
  }

  // What the next task reads and the transforms do not ask for: planes, and weights, which another
  // core may have transformed.
  void expect_source(const Task& t, const Task& next, const float* packed,
                     SourcePrefetch& ahead) const {
    constexpr auto kSize = static_cast<int64_t>(sizeof(float));
    const int64_t weights = band_.dst_vectors * weights_.vector_size();
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
    GroupWinogradBand band{};
    set_source(t, src, band);
    band.fetch = &ahead;
    band.lines = ceil_div(ahead.lines(), band_.dst_vectors * columns_.points() *
                                             ceil_div(t.rows, int64_t{kGroupWinogradRows}));
    band.tiles = &columns_;
    band.rows = t.rows;
    band.scratch = t.points;
    band.channels = channels_of(view_);
    band.stream = streams_ && in_place_;
    band.clamp = store_.simple && store_.clamps;
    band.high = store_.high;
    bool finite = true;
    for (int64_t v = 0; v < band_.dst_vectors; ++v) {
      const int64_t used = band_.filters_in(view_, t.block, v);
      if (used == 0) break;
      const int64_t index = t.block * band_.dst_vectors + v;
      const int64_t filter = t.block * band_.groups * view_.K + v * band_.vector_filters;
      const int64_t dst =
          view_.dst_offset + t.n * view_.dst.n + t.i0 * view_.dst.row + filter * view_.dst.c;
      band.lanes = exchanges(view_) ? nullptr : lanes_.data() + v * kL;
      band.weights = t.u + v * weights_.vector_size();
      band.bias = bias_.get() + index * kL;
      band.dst = in_place_ ? store_.epilogue.y + dst : t.out;
      band.dst_row = in_place_ ? view_.dst.row : view_.J * kL;
      band.dst_column = in_place_ ? view_.dst.column : kL;
      band.used = in_place_ ? used : kL;
      finite &= group_winograd_rows(band);
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

  void set_source(const Task& t, const float* src, GroupWinogradBand& band) const {
    const int64_t rows = t.rows + kTaps - 1;
    if (view_.src.c != 1) {
      band.src = t.band;
      band.src_row = band_.width * kL;
      band.src_column = band.src_used = kL;
      band.src_rows = {0, rows};
      band.src_columns = {0, band_.width};
      return;
    }
    const int64_t h = t.i0 + band_.first_h, w = band_.first_w;
    band.src = src + h * view_.src.row + w * view_.src.column;
    band.src_row = view_.src.row;
    band.src_column = view_.src.column;
    band.src_used = band_.groups_in(view_, t.block) * view_.C;
    band.src_rows = {std::max<int64_t>(-h, 0), std::min(view_.H - h, rows)};
    band.src_columns = {-w, view_.W - w};
    band.ahead = ahead_of(t);
  }

  const ConvView& view_;
  const GroupBand band_;
  const winograd::TileAxis columns_;
  const std::vector<LaneIndex<float>> lanes_;
  const GroupStore<float> store_;
  const GroupWinogradWeights weights_;
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
  return band.blocks * band.dst_vectors *
         group_winograd_vector_size(group_winograd::channels_of(view));
}

void group_winograd_pack_weights(const ConvView& view, const float* w, float* packed,
                                 const Parallel& pool) {
  const GroupBand band = group_winograd::gather_band(view);
  GroupWinogradWeights(view, band, w, group_winograd::channels_of(view),
                       group_winograd::exchanges(view))
      .run_all(packed, pool);
}

std::vector<int64_t> group_winograd_gather(const ConvView& view, const float* src, const float* w,
                                           const float* packed, const float* bias,
                                           const Epilogue<float>& epilogue, const Parallel& pool) {
  return group_winograd::GroupWinograd(view, src, w, bias, epilogue).run(packed, pool);
}

}  // namespace torchconv::cpu
