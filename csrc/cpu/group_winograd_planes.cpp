// A task is the planes of a group of a sample. A thread has the same group of all samples, one
// after the other, whose weights it transforms where they are not packed. The products meanwhile
// fetch the next task's planes where these are far.
#include "cpu/group_winograd_planes.h"

#include <algorithm>

#include "core/buffer.h"
#include "cpu/group_store.h"
#include "cpu/group_winograd.h"
#include "cpu/group_winograd_weights.h"
#include "cpu/microkernels/group_winograd_planes.h"
#include "cpu/parallel_range.h"
#include "cpu/source_prefetch.h"
#include "cpu/special_samples.h"

namespace torchconv::cpu {
namespace group_planes {
namespace {

constexpr int64_t kL = kLanes<float>;
constexpr int64_t kRowOutputs = kGroupPlanesTiles * kGroupWinogradOutputs;

// Elements of images that other layers may have left no room for in the last cache. The processor
// itself asks early enough for planes that are there.
constexpr int64_t kFarImages = kStreamedBytes / 2 / static_cast<int64_t>(sizeof(float));

// How planes are cut, see microkernels/group_winograd_planes.h. unit: what segments' rows are a
// multiple of.
struct Cut {
  int64_t segments, segment_rows;

  explicit Cut(const ConvView& view, int64_t unit = kGroupPlanesRows / 2) : segments(1) {
    while (segments < kGroupPlanesSegments &&
           2 * segments * round_up(view.J, kGroupWinogradOutputs) <= kRowOutputs &&
           view.I > kGroupPlanesRows * segments)
      segments *= 2;
    segment_rows = round_up(ceil_div(view.I, segments), unit);
  }
};

class GroupPlanesGather {
 public:
  GroupPlanesGather(const ConvView& view, const float* src, const float* w, const float* bias,
                    const Epilogue<float>& epilogue)
      : view_(view),
        band_(group_winograd_band(view)),
        large_(view.N * view.dst.n >= kGroupStreamedBytes / static_cast<int64_t>(sizeof(float))),
        far_(view.N * (view.src.n + view.dst.n) >= kFarImages),
        cut_(view, large_ ? kGroupPlanesRows : kGroupPlanesRows / 2),
        weights_(view, band_, w, view.C, false),
        epilogue_(epilogue),
        simple_(epilogue.activates_only() && epilogue.clamps_at_most()),
        src_(src),
        bias_(view.groups * view.K),
        special_(view.N) {
    const ConvStrides& dst = view.dst;
    const bool runs = kGroupPlanesRows * view.J % kL == 0 && cut_.segment_rows * view.J % kL == 0 &&
                      view.I * view.J % kL == 0;
    streams_ = large_ && simple_ && dst.row == view.J && (view.J % kL == 0 || runs) &&
               dst.c % kL == 0 && dst.n % kL == 0 &&
               WideVec<float>::streamable(epilogue.y + view.dst_offset);
    for (int64_t k = 0; k < view.groups * view.K; ++k) bias_[k] = bias != nullptr ? bias[k] : 0.0f;
  }

  // packed: or null.
  std::vector<int64_t> run(const float* packed, const Parallel& pool) const {
    const int64_t vector = weights_.vector_size();
    const int64_t tasks = view_.groups * view_.N;
    const int64_t images = group_planes_scratch(view_.C, view_.K);
    const int64_t slot_size = images + (packed == nullptr ? vector + weights_.scratch() : 0);
    const WorkSplit split(tasks, static_cast<double>(view_.pixels() * view_.K) *
                                     static_cast<double>(view_.terms() / 3 + 8));
    Buffer<float> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* const own = scratch.get() + slot * slot_size;
      SourcePrefetch ahead;
      int64_t transformed = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task % view_.N, group = task / view_.N;
        // Filters of a group lie in one vector.
        const int64_t filter = group % band_.groups * view_.K;
        const int64_t index =
            group / band_.groups * band_.dst_vectors + filter / band_.vector_filters;
        if (packed == nullptr && transformed != index) {
          weights_.run(index, own + images + vector, own + images);
          transformed = index;
        }
        const float* const u = packed == nullptr ? own + images : packed + index * vector;
        ahead.clear();
        if (far_) expect(task, end, ahead);
        if (!run_group(n, group, u + filter % band_.vector_filters, ahead, own)) special_.add(n);
      }
      if (streams_) stream_fence();
    });
    return special_.list();
  }

 private:
  struct Finish {
    const Epilogue<float>& epilogue;
    int64_t offset;
  };

  const float* src_of(int64_t n, int64_t group) const {
    return src_ + n * view_.src.n + group * view_.C * view_.src.c;
  }
  int64_t dst_of(int64_t n, int64_t group) const {
    return view_.dst_offset + n * view_.dst.n + group * view_.K * view_.dst.c;
  }

  // What the task writes, and the next one reads.
  void expect(int64_t task, int64_t end, SourcePrefetch& ahead) const {
    if (!streams_)
      prefetch_planes(epilogue_.y + dst_of(task % view_.N, task / view_.N), view_.dst, view_.K,
                      view_.I, view_.J, ahead);
    if (++task < end)
      prefetch_planes(src_of(task % view_.N, task / view_.N), view_.src, view_.C, view_.H, view_.W,
                      ahead);
  }

  // False where an output is not finite.
  bool run_group(int64_t n, int64_t group, const float* u, SourcePrefetch& ahead,
                 float* scratch) const {
    const int64_t offset = dst_of(n, group);
    const Finish finish{epilogue_, offset};
    GroupPlanes planes{};
    planes.src = src_of(n, group);
    planes.src_channel = view_.src.c, planes.src_row = view_.src.row;
    planes.H = view_.H, planes.W = view_.W;
    planes.first_h = band_.first_h, planes.first_w = band_.first_w;
    planes.channels = view_.C, planes.filters = view_.K;
    planes.weights = u;
    planes.bias = bias_.get() + group * view_.K;
    planes.dst_filter = view_.dst.c, planes.dst_row = view_.dst.row;
    planes.I = view_.I, planes.J = view_.J;
    planes.segments = cut_.segments, planes.segment_rows = cut_.segment_rows;
    planes.fetch = &ahead;
    planes.lines = ceil_div(ahead.lines(),
                            kGroupWinogradPoints * ceil_div(cut_.segment_rows, kGroupPlanesRows));
    planes.scratch = scratch;
    if (simple_) {
      planes.dst = epilogue_.y + offset;
      planes.stream = streams_;
      planes.clamp = epilogue_.clamps();
      planes.high = epilogue_.most();
    } else {
      planes.context = &finish;
      planes.store = [](float* sums, int64_t count, int64_t at, const void* context) {
        const auto& f = *static_cast<const Finish*>(context);
        f.epilogue.store(sums, count, f.offset + at, 1);
      };
    }
    return group_winograd_planes(planes);
  }

  const ConvView& view_;
  const GroupBand band_;
  const bool large_;  // outputs are worth streaming, if they are whole vectors
  const bool far_;    // images are worth asking for
  const Cut cut_;
  const GroupWinogradWeights weights_;
  const Epilogue<float>& epilogue_;
  const bool simple_;  // sums are clamped and stored
  bool streams_;
  const float* src_;
  Buffer<float> bias_;
  SpecialSamples special_;
};

}  // namespace
}  // namespace group_planes

bool group_planes_applies(const ConvView& view) {
  // Planes that stay in the second-level cache beside the next ones.
  constexpr int64_t kMostPixels = 32 << 10;
  return view.src.column == 1 && view.dst.column == 1 && view.src.c != 1 &&
         view.J <= group_planes::kRowOutputs && view.C * view.H * view.W <= kMostPixels;
}

double group_planes_lanes_used(const ConvView& view) {
  const group_planes::Cut cut(view);
  const auto lanes = static_cast<double>(group_planes::kRowOutputs * cut.segment_rows);
  return static_cast<double>(view.pixels()) / lanes;
}

bool group_planes_at_once(const ConvView& view) {
  return group_planes::Cut(view).segment_rows <= kGroupPlanesRows;
}

int64_t group_planes_vectors(const ConvView& view) {
  return group_planes::Cut(view).segment_rows / 2;
}

int64_t group_planes_weights_size(const ConvView& view) {
  const GroupBand band = group_winograd_band(view);
  return band.blocks * band.dst_vectors * group_winograd_vector_size(view.C);
}

void group_planes_pack_weights(const ConvView& view, const float* w, float* packed,
                               const Parallel& pool) {
  GroupWinogradWeights(view, group_winograd_band(view), w, view.C, false).run_all(packed, pool);
}

std::vector<int64_t> group_planes_gather(const ConvView& view, const float* src, const float* w,
                                         const float* packed, const float* bias,
                                         const Epilogue<float>& epilogue, const Parallel& pool) {
  return group_planes::GroupPlanesGather(view, src, w, bias, epilogue).run(packed, pool);
}

}  // namespace torchconv::cpu
