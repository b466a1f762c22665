// wgrad of depthwise convolution with pixels contiguous. A task is some channels and a slab, that
// is a run of the samples' bands of rows, cut by the shape alone. Sums in registers are short; they
// are added up in double precision, slab after slab. Planes that are large enough for sums of their
// own are read in the order of memory; those that are not, as many samples at a time as make one.
#include <algorithm>
#include <cmath>

#include "core/buffer.h"
#include "cpu/conv_pack.h"
#include "cpu/depthwise_planes.h"
#include "cpu/depthwise_taps.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Products that a lane adds up, and the rows of a band that this allows at least.
constexpr int64_t kSteps = 256, kLeastRows = 16;
// Tasks that are wanted, and the most slabs and their sums that the order of memory is worth.
constexpr int64_t kTasks = 32, kSlabs = 32, kSlabSums = 1 << 17;
// Elements of x that a task takes at a time.
constexpr int64_t kTogetherWgrad = 8192;

template <typename T>
class PlanesWgrad {
 public:
  using A = Wide<T>;
  static constexpr bool kConverts = !std::is_same_v<T, A>;

  PlanesWgrad(const ConvView& view, const T* dz, const T* x)
      : v_(view), taps_(view), dz_(dz), x_(x), channels_(view.groups * view.K) {
    int64_t lanes = 1;
    for_plane_rows(taps_, v_, [&](const PlaneRows& shape, int64_t, int64_t) {
      lanes = plane_rows_lanes<A>(shape);
    });
    strips_ = ceil_div(v_.J, lanes);
    const bool whole = taps_.gap_h > 1;
    band_ = whole ? v_.I : std::clamp<int64_t>(kSteps / strips_, std::min(kLeastRows, v_.I), v_.I);
    bands_ = ceil_div(v_.I, band_);
    together_ = bands_ > 1 ? 1 : std::clamp<int64_t>(kSteps / (strips_ * v_.I), 1, v_.N);
    groups_ = ceil_div(v_.N, together_);
    chunk_ = v_.K > 1
                 ? v_.K
                 : std::clamp<int64_t>(kTogetherWgrad / (v_.H * v_.W * together_), 1, channels_);
    chunks_ = ceil_div(channels_, chunk_);
    const int64_t units = groups_ * bands_, sums = channels_ * taps_.rows * taps_.rows;
    const int64_t in_order = together_ > 1 ? 1 : std::min(kSlabs, kSlabSums / sums);
    slab_ = ceil_div(units, std::clamp(std::max(kTasks / chunks_, in_order), int64_t{1}, units));
    slabs_ = ceil_div(units, slab_);
  }

  bool run(T* dw, const Parallel& pool) const {
    const int64_t taps = taps_.rows * taps_.rows, sums = channels_ * taps;
    Buffer<double> totals(slabs_ * sums);
    const int64_t planes = kConverts ? chunk_ * together_ : 0;
    const int64_t src_size = round_up(planes * v_.H * v_.W, 16);
    const int64_t dz_size = round_up(planes * v_.pixels(), 16);
    const WorkSplit split(chunks_ * slabs_,
                          static_cast<double>(slab_ * together_ * chunk_ * band_ * v_.J) *
                              static_cast<double>(taps + 8));
    Buffer<A> scratch(split.slots * (src_size + dz_size));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* copies = scratch.get() + slot * (src_size + dz_size);
      for (int64_t task = begin; task < end; ++task)
        accumulate(task % chunks_ * chunk_, task / chunks_, copies, copies + src_size,
                   totals.get() + task / chunks_ * sums);
    });
    for (int64_t s = 1; s < slabs_; ++s)
      for (int64_t i = 0; i < sums; ++i) totals[i] += totals[s * sums + i];
    bool finite = true;
    const double* from = totals.get();
    for (int64_t k = 0; k < channels_; ++k)
      for (int64_t r = 0; r < taps_.rows; ++r)
        for (int64_t s = 0; s < taps_.rows; ++s) {
          const auto total = static_cast<A>(*from++);
          finite = finite && std::isfinite(total);
          dw[k * taps_.filter + taps_.weight(r, s)] = from_wide<T>(total);
        }
    return finite;
  }

 private:
  // Adds up a slab of a chunk of channels.
  void accumulate(int64_t channel, int64_t slab, A* x_copy, A* dz_copy, double* totals) const {
    const int64_t taps = taps_.rows * taps_.rows;
    PlaneRowsDot<A> dot;
    dot.src_ahead = dot.dz_ahead = 0;
    dot.channels = std::min(chunk_, channels_ - channel);
    dot.totals = totals + channel * taps;
    std::fill(dot.totals, dot.totals + dot.channels * taps, 0.0);
    dot.src_channel = v_.K > 1 ? 0 : v_.src.c;
    dot.dz_channel = v_.dst.c;
    const int64_t last = std::min((slab + 1) * slab_, groups_ * bands_);
    for (int64_t unit = slab * slab_; unit < last; ++unit) {
      const int64_t n = unit / bands_ * together_;
      dot.planes = std::min(together_, v_.N - n);
      dot.first = unit % bands_ * band_;
      dot.last = std::min(dot.first + band_, v_.I);
      const T* x = x_ + n * v_.src.n + channel / v_.K * v_.src.c;
      const T* dz = dz_ + n * v_.dst.n + channel * v_.dst.c;
      if constexpr (kConverts) {
        dot.src = x_copy;
        dot.dz = dz_copy;
        dot.src_plane = (v_.K > 1 ? 1 : dot.channels) * v_.src.c;
        dot.dz_plane = dot.channels * v_.dst.c;
        for (int64_t i = 0; i < dot.planes; ++i) {
          copy_wide(x_copy + i * dot.src_plane, x + i * v_.src.n, dot.src_plane);
          copy_wide(dz_copy + i * dot.dz_plane, dz + i * v_.dst.n, dot.dz_plane);
        }
      } else {
        dot.src = x;
        dot.dz = dz;
        dot.src_plane = v_.src.n;
        dot.dz_plane = v_.dst.n;
        const int64_t elements = v_.N * (v_.src.n + v_.dst.n);
        if (elements >= kStreamedBytes / static_cast<int64_t>(sizeof(A))) {
          dot.src_ahead = fetch_distance<A>(elements, v_.H, v_.W);
          dot.dz_ahead = fetch_distance<A>(elements, v_.I, v_.J);
        }
      }
      for_plane_rows(taps_, v_, [&](const PlaneRows& shape, int64_t row, int64_t rows) {
        PlaneRowsDot<A> part = dot;
        part.src += (row + taps_.first_h) * v_.W + taps_.first_w;
        part.dz += row * v_.J;
        part.dz_pitch = taps_.gap_h * v_.J;
        if (taps_.gap_h > 1) {
          part.first = 0;
          part.last = rows;
        }
        const int64_t block =
            std::max<int64_t>(1, kSteps / (part.planes * (part.last - part.first)));
        for (part.begin = 0; part.begin < strips_; part.begin = part.end) {
          part.end = std::min(part.begin + block, strips_);
          plane_rows_dot(shape, part);
        }
      });
    }
  }

  const ConvView& v_;
  const DepthwiseTaps taps_;
  const T* dz_;
  const T* x_;
  int64_t channels_;
  int64_t strips_;
  int64_t band_, bands_;       // rows of a plane that are added up in registers, if not all
  int64_t together_, groups_;  // samples that are
  int64_t chunk_, chunks_;     // channels that a task takes
  int64_t slab_, slabs_;
};

}  // namespace

template <typename T>
bool depthwise_planes_wgrad(const ConvView& view, const T* dz, const T* x, T* dw,
                            const Parallel& pool) {
  return PlanesWgrad<T>(view, dz, x).run(dw, pool);
}

template bool depthwise_planes_wgrad(const ConvView&, const float*, const float*, float*,
                                     const Parallel&);
template bool depthwise_planes_wgrad(const ConvView&, const double*, const double*, double*,
                                     const Parallel&);
template bool depthwise_planes_wgrad(const ConvView&, const BFloat16*, const BFloat16*, BFloat16*,
                                     const Parallel&);
template bool depthwise_planes_wgrad(const ConvView&, const Float16*, const Float16*, Float16*,
                                     const Parallel&);

}  // namespace torchconv::cpu
