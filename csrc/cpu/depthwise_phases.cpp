// A task is a band of one channel of dx. The phases are one view with the taps of all, which is
// what the band of dz is made for (conv_band.h); each phase sums its own taps into a plane of
// scratch, but for one that has a single tap, and the phases of a row of dx are then interleaved.
#include "cpu/depthwise_phases.h"

#include <algorithm>

#include "core/buffer.h"
#include "cpu/conv_band.h"
#include "cpu/microkernels/taps.h"
#include "cpu/parallel_range.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

// The phases as one view; without taps where none reaches the image.
ConvView joined(const ConvProblem& p, const std::vector<ConvView>& phases) {
  ConvView all = phases[0];
  all.I = ceil_div(p.H, p.stride_h);
  all.J = ceil_div(p.W, p.stride_w);
  for (size_t i = 1; i < phases.size(); ++i)
    all.taps.insert(all.taps.end(), phases[i].taps.begin(), phases[i].taps.end());
  return all;
}

// A phase of dx's columns as rows of a plane and what they are multiplied by, a vector; or null.
template <typename A>
struct PhaseRows {
  const A* rows;
  const A* scale;
};

// to[row*to_row + kStep*i + phase] = phases[phase].rows[row*width + i], scaled, zero where there is
// no phase, for n elements of each row. Whole vectors are read.
template <typename T, int kStep>
void interleave_rows(const PhaseRows<Wide<T>>* phases, int64_t width, int64_t rows, int64_t n,
                     T* to, int64_t to_row) {
  using V = WideVec<T>;
  using Type = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  for (int64_t row = 0; row < rows; ++row, to += to_row)
    for (int64_t i = 0; i < n; i += kStep * kL) {
      Type v[kStep];
      unroll<kStep>([&](auto phase) TORCHCONV_INLINE_LAMBDA {
        const auto& from = phases[phase];
        v[phase] = from.rows != nullptr ? V::Registers::load(from.rows + row * width + i / kStep) *
                                              V::Registers::load(from.scale)
                                        : Type{};
      });
      unroll<kStep>([&](auto part) TORCHCONV_INLINE_LAMBDA {
        const int64_t at = i + part * kL;
        if (n <= at) return;
        const Type lanes = collect_lanes<InterleavedLanes<kStep, part, V::kLanes>, V::kLanes>(v);
        if (n - at >= kL)
          V::store(to + at, lanes);
        else
          V::store_partial(to + at, lanes, n - at);
      });
    }
}

template <typename T>
class DepthwisePhases {
 public:
  using A = Wide<T>;
  static constexpr int64_t kL = kLanes<A>;

  DepthwisePhases(const ConvProblem& p, const std::vector<ConvView>& phases, const T* dz,
                  const T* w, T* dx)
      : p_(p),
        all_(joined(p, phases)),
        band_(all_, true, sizeof(A), kL),
        dz_(dz),
        w_(w),
        dx_(dx),
        rows_(std::min(p.stride_h, p.H)),
        plane_(round_up(band_.band * band_.width, kL) + kL),
        at_(static_cast<size_t>(rows_ * p.stride_w), -1) {
    const auto taps = static_cast<int64_t>(all_.taps.size());
    int64_t first = 0;
    for (size_t i = 0; i < phases.size(); ++i) {
      const int64_t row = phases[i].dst_offset / p.W, column = phases[i].dst_offset % p.W;
      at_[static_cast<size_t>(row * p.stride_w + column)] = static_cast<int64_t>(i);
      const auto count = static_cast<int64_t>(phases[i].taps.size());
      sums_.push_back({first * all_.C, count * all_.C, phases[i].J});
      for (int64_t c = 0; c < all_.C; ++c)
        for (int64_t t = first; t < first + count; ++t) {
          offsets_.push_back(band_.offsets[static_cast<size_t>(c * taps + t)]);
          weights_.push_back(c * all_.weight_c + all_.taps[static_cast<size_t>(t)].weight);
        }
      first += count;
    }
  }

  void run(const Parallel& pool) const {
    const int64_t band_size = round_up(band_.size, 16), terms = all_.terms();
    const int64_t slot_size = band_size + p_.stride_w * plane_ + (terms + 2) * kL;
    const WorkSplit split(p_.N * p_.C * band_.bands,
                          static_cast<double>(band_.band * band_.width) *
                              static_cast<double>(terms + 8 * p_.stride_h * p_.stride_w));
    Buffer<A> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* const source = scratch.get() + slot * slot_size;
      A* const sums = source + band_size;
      A* const weights = sums + p_.stride_w * plane_;
      V::store(weights + terms * kL, typename V::Type{});
      V::store(weights + (terms + 1) * kL, V::broadcast(A{1}));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / (p_.C * band_.bands), channel = item / band_.bands % p_.C;
        const int64_t i0 = item % band_.bands * band_.band;
        const T* filter = w_ + channel * all_.weight_group;
        for (int64_t t = 0; t < terms; ++t)
          V::store(weights + t * kL,
                   V::broadcast(to_wide(filter[weights_[static_cast<size_t>(t)]])));
        band_.fill(all_, dz_ + n * all_.src.n, channel, i0, source);
        T* const plane = dx_ + (n * p_.C + channel) * p_.H * p_.W;
        for (int64_t row = 0; row < rows_; ++row) write_rows(row, i0, source, weights, sums, plane);
      }
    });
  }

 private:
  using V = Vec<A>;

  // Of a band, those of one phase of rows.
  void write_rows(int64_t phase, int64_t i0, const A* source, const A* weights, A* sums,
                  T* plane) const {
    const int64_t count = (p_.H - 1 - phase) / p_.stride_h + 1;
    const int64_t rows = std::min(band_.band, count - i0);
    if (rows <= 0) return;
    PhaseRows<A> columns[kMostLaneStep] = {};
    for (int64_t s = 0; s < p_.stride_w; ++s) {
      const int64_t index = at_[static_cast<size_t>(phase * p_.stride_w + s)];
      if (index < 0) continue;
      const PhaseSum& sum = sums_[static_cast<size_t>(index)];
      if (sum.terms == 1) {
        columns[s] = {source + offsets_[static_cast<size_t>(sum.first)], weights + sum.first * kL};
        continue;
      }
      columns[s] = {sums + s * plane_, weights + (all_.terms() + 1) * kL};
      for (int64_t t = 0; t < sum.terms; t += kDepth)
        tap_sum<A>({source, sums + s * plane_, offsets_.data() + sum.first + t,
                    weights + (sum.first + t) * kL, t == 0 ? weights + all_.terms() * kL : nullptr,
                    std::min(kDepth, sum.terms - t), kL, ceil_div(band_.positions(rows, sum.J), kL),
                    kL, kL, 1});
    }
    constexpr decltype(&interleave_rows<T, 1>) kInterleave[kMostLaneStep] = {
        interleave_rows<T, 1>, interleave_rows<T, 2>, interleave_rows<T, 3>, interleave_rows<T, 4>};
    kInterleave[p_.stride_w - 1](columns, band_.width, rows, p_.W,
                                 plane + (phase + i0 * p_.stride_h) * p_.W, p_.stride_h * p_.W);
  }

  // Of a phase, in offsets_ and weights_; J: its columns.
  struct PhaseSum {
    int64_t first, terms, J;
  };

  const ConvProblem& p_;
  ConvView all_;
  ConvBand band_;
  const T* dz_;
  const T* w_;
  T* dx_;
  int64_t rows_;             // phases of rows
  int64_t plane_;            // of a phase's sums
  std::vector<int64_t> at_;  // [phase of rows][phase of columns]: index of the phase, or -1
  std::vector<int64_t> offsets_, weights_;  // [phase][channel][tap], as a phase sums them
  std::vector<PhaseSum> sums_;              // [phase]
};

}  // namespace

bool depthwise_phases_applies(const ConvProblem& p) {
  if (p.layout != Layout::kNCHW || p.groups != p.C || p.C == 1 || p.N == 0 ||
      (p.stride_h == 1 && p.stride_w == 1) || p.stride_w > kMostLaneStep)
    return false;
  bool covers_all;
  const std::vector<ConvView> phases = dgrad_views(p, &covers_all);
  if (phases.empty()) return false;
  const int64_t size = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return BandExtent(joined(p, phases), true, size, kVectorBytes / size).fits;
}

template <typename T>
void depthwise_phases(const ConvProblem& p, const T* dz, const T* w, T* dx, const Parallel& pool) {
  bool covers_all;
  const std::vector<ConvView> phases = dgrad_views(p, &covers_all);
  DepthwisePhases<T>(p, phases, dz, w, dx).run(pool);
}

#define TORCHCONV_DEPTHWISE_PHASES(T) \
  template void depthwise_phases(const ConvProblem&, const T*, const T*, T*, const Parallel&);
TORCHCONV_DEPTHWISE_PHASES(float)
TORCHCONV_DEPTHWISE_PHASES(double)
TORCHCONV_DEPTHWISE_PHASES(BFloat16)
TORCHCONV_DEPTHWISE_PHASES(Float16)
#undef TORCHCONV_DEPTHWISE_PHASES

}  // namespace torchconv::cpu
