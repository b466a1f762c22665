// fprop and dgrad with few channels in a group, by the tiles of microkernels/group_tile.h over the
// bands of group_band.h. A task is a band of rows of a block of groups. Sums are cut at kDepth
// terms. In channels_last a row is written where it belongs; else some rows of all filters of a
// vector are transposed.
#include "cpu/group_gather.h"

#include <limits>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/group_band.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

template <typename T>
GroupBand group_band(const ConvView& view) {
  return GroupBand(view, sizeof(Wide<T>), kPermutesLanes<Wide<T>>);
}

// Weights [block][vector of filters][term][lanes]; the terms of a channel vector are
// [run][channel][tap].
template <typename T>
class GroupWeights {
 public:
  using V = WideVec<T>;
  static constexpr int64_t kL = V::kLanes;

  GroupWeights(const ConvView& view, const GroupBand& band) : view_(view), band_(band) {
    int64_t at = 0;
    const std::vector<GroupRun> runs = group_runs(view);
    for (int64_t v = 0; v < band.src_vectors; ++v) {
      const int64_t first = v * kL,
                    channels = band.groups > 1 ? view.C : std::min(kL, view.C - first);
      for (const GroupRun& run : runs)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t s = 0; s < run.count; ++s)
            terms_.push_back({(first + c) * view.weight_c + run.weights[s], at++});
    }
    std::sort(terms_.begin(), terms_.end(),
              [](const Term& a, const Term& b) { return a.offset < b.offset; });
  }

  int64_t vector_size() const { return static_cast<int64_t>(terms_.size()) * kL; }
  int64_t size() const { return band_.blocks * band_.dst_vectors * vector_size(); }

  void pack(const T* w, Wide<T>* packed, const Parallel& pool) const {
    const WorkSplit split(band_.blocks * band_.dst_vectors, static_cast<double>(vector_size()));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin; i < end; ++i)
        pack_vector(w, i / band_.dst_vectors, i % band_.dst_vectors, packed + i * vector_size());
    });
  }

 private:
  struct Term {
    int64_t offset, at;
  };

  void pack_vector(const T* w, int64_t block, int64_t vector, Wide<T>* packed) const {
    const T* filters[kL] = {};
    const int64_t count = band_.groups_in(view_, block) * view_.K;
    for (int64_t l = 0; l < kL && vector * kL + l < count; ++l) {
      const int64_t k = vector * kL + l;
      filters[l] = w + (block * band_.groups + k / view_.K) * view_.weight_group +
                   k % view_.K * view_.weight_k;
    }
    const auto size = static_cast<int64_t>(terms_.size());
    for (int64_t t = 0; t < size;) {
      int64_t n = 1;
      while (n < kL && t + n < size && terms_[t + n].offset == terms_[t].offset + n) ++n;
      typename V::Type tile[kL];
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l)
        tile[l] = filters[l] != nullptr ? V::load_partial(filters[l] + terms_[t].offset, n)
                                        : typename V::Type{};
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l)
        if (l < n) V::Registers::store(packed + terms_[t + l].at * kL, tile[l]);
      t += n;
    }
  }

  const ConvView& view_;
  const GroupBand& band_;
  std::vector<Term> terms_;  // in the order of memory
};

template <typename T>
class GroupGather {
 public:
  using A = Wide<T>;
  using V = WideVec<T>;
  static constexpr int64_t kL = V::kLanes;

  GroupGather(const ConvView& view, const GroupBand& band, const T* src, const A* weights,
              const T* bias, const Epilogue<T>& epilogue)
      : view_(view),
        band_(band),
        src_(src),
        weights_(weights),
        epilogue_(epilogue),
        vectors_(band.blocks * band.dst_vectors),
        bias_(vectors_ * kL) {
    band.fill_lanes<A>(view, lanes_);
    for (int64_t block = 0; block < band.blocks; ++block)
      for (int64_t l = 0; l < band.dst_vectors * kL; ++l)
        bias_[block * band.dst_vectors * kL + l] =
            bias != nullptr && l < band.groups_in(view, block) * view.K
                ? to_wide(bias[block * band.groups * view.K + l])
                : A{0};
    plan_calls();
    const Activation activation = epilogue.activation;
    clamps_ = activation == Activation::kReLU || activation == Activation::kReLU6;
    high_ = activation == Activation::kReLU6 ? A{6} : std::numeric_limits<A>::infinity();
    simple_ = epilogue.preactivation == nullptr && (clamps_ || activation == Activation::kNone);
    in_place_ = std::is_same_v<T, A> && simple_ && view.dst.c == 1;
    // Rows that are transposed together.
    constexpr int64_t kRowsBytes = 16 << 10;
    out_rows_ = view.dst.c == 1
                    ? 1
                    : std::clamp<int64_t>(kRowsBytes / (kVectorBytes * view.J), 1, band.band);
  }

  void run(const Parallel& pool) const {
    const int64_t tasks = view_.N * band_.bands * band_.blocks;
    const int64_t source = round_up(band_.size, 16);
    const int64_t out = (out_rows_ * view_.J + kSumTiles[0]) * kL;
    const int64_t slot_size = source + 2 * out + round_up(kL * plane(), 16);
    const WorkSplit split(tasks,
                          static_cast<double>(band_.band * view_.J * band_.dst_vectors * kL) *
                              static_cast<double>(view_.terms() + 8));
    Buffer<A> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* const band = scratch.get() + slot * slot_size;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task % band_.blocks, n = task / (band_.blocks * band_.bands);
        const int64_t i0 = task / band_.blocks % band_.bands * band_.band;
        const int64_t i1 = std::min(i0 + band_.band, view_.I);
        band_.fill(view_, src_ + n * view_.src.n, block, i0, band);
        for (int64_t v = 0; v < band_.dst_vectors; ++v)
          for (int64_t i = i0; i < i1; i += out_rows_)
            run_rows(band + (i - i0) * view_.step_h * band_.width * kL, block, v, n, i,
                     std::min(out_rows_, i1 - i), band + source);
      }
    });
  }

 private:
  // Runs of equal length that one call of a tile sums up.
  struct Call {
    int64_t taps, first, count, weights;
  };

  void plan_calls() {
    const std::vector<GroupRun> runs = group_runs(view_);
    int64_t weights = 0, terms = 0;
    for (int64_t v = 0; v < band_.src_vectors; ++v)
      for (const GroupRun& run : runs) {
        const int64_t channels = band_.groups > 1 ? view_.C : std::min(kL, view_.C - v * kL);
        const int64_t more = channels * run.count;
        if (calls_.empty() || calls_.back().taps != run.count || terms + more > kDepth) {
          calls_.push_back({run.count, static_cast<int64_t>(runs_.size()), 0, weights});
          terms = 0;
        }
        ++calls_.back().count;
        terms += more;
        weights += more * kL;
        runs_.push_back({v * band_.plane + band_.offset(run.h, run.w), channels});
      }
    weights_vector_ = weights;
  }

  int64_t plane() const { return ceil_div(out_rows_ * view_.J, 32) * 32 + 16; }

  // `rows` rows of the destination from row i on.
  void run_rows(const A* source, int64_t block, int64_t vector, int64_t n, int64_t i, int64_t rows,
                A* out) const {
    const int64_t index = block * band_.dst_vectors + vector;
    const int64_t channel = block * band_.groups * view_.K + vector * kL;
    const int64_t used = std::min(kL, band_.groups_in(view_, block) * view_.K - vector * kL);
    const int64_t dst = view_.dst_offset + n * view_.dst.n + channel * view_.dst.c;
    GroupSum<A> g{};
    g.lanes = band_.groups > 1 ? lanes_ : nullptr;
    g.step = view_.step_w;
    g.low = A{0};
    g.high = high_;
    for (int64_t r = 0; r < rows; ++r) {
      const A* row = source + r * view_.step_h * band_.width * kL;
      A* const to = out + r * view_.J * kL;
      for (int64_t j = 0; j < view_.J;) {
        const int64_t tile = group_sum_tile(view_.J - j);
        const int64_t count = std::min<int64_t>(kSumTiles[tile], view_.J - j);
        g.src = row + j * view_.step_w * kL;
        g.start = bias_.get() + index * kL;
        g.sums = g.out = to + j * kL;
        g.count = kSumTiles[tile];
        g.out_step = g.used = kL;
        g.clamp = false;
        for (const Call& call : calls_) {
          if (&call == &calls_.back()) {
            g.clamp = simple_ && clamps_;
            if constexpr (std::is_same_v<T, A>) {
              if (in_place_) {
                g.out = epilogue_.y + dst + (i + r) * view_.dst.row + j * view_.dst.column;
                g.count = count;
                g.out_step = view_.dst.column;
                g.used = used;
              }
            }
          }
          g.weights = weights_ + index * weights_vector_ + call.weights;
          g.runs = runs_.data() + call.first;
          g.count_runs = call.count;
          group_sum_kernel<A>(call.taps, view_.step_w, band_.groups == 1, tile)(g);
          g.start = nullptr;
        }
        j += count;
      }
      if (view_.dst.c == 1 && !in_place_) store_pixels(to, used, dst + (i + r) * view_.dst.row);
    }
    if (view_.dst.c != 1) store_planes(out, used, rows, dst + i * view_.dst.row, out + out_size());
  }

  int64_t out_size() const { return (out_rows_ * view_.J + kSumTiles[0]) * kL; }

  // A row of pixels in channels_last.
  void store_pixels(A* row, int64_t used, int64_t dst) const {
    for (int64_t j = 0; j < view_.J; ++j, row += kL, dst += view_.dst.column) {
      if (simple_)
        V::store_partial(epilogue_.y + dst, V::Registers::load(row), used);
      else
        epilogue_.store(row, used, dst, 1);
    }
  }

  // Rows of planes, from rows of pixels.
  void store_planes(const A* pixels, int64_t used, int64_t rows, int64_t dst, A* planes) const {
    const bool neighbours = view_.dst.row == view_.J && view_.dst.column == 1;
    const int64_t run = neighbours ? rows * view_.J : view_.J, runs = neighbours ? 1 : rows;
    const bool direct = simple_ && view_.dst.column == 1;
    for (int64_t r = 0; r < runs; ++r, pixels += run * kL, dst += view_.dst.row) {
      for (int64_t p = 0; p < run; p += kL) {
        const int64_t n = std::min(kL, run - p);
        typename V::Type tile[kL];
#pragma GCC unroll 16
        for (int l = 0; l < kL; ++l)
          tile[l] = l < n ? V::Registers::load(pixels + (p + l) * kL) : typename V::Type{};
        transpose_steps<1>(tile);
        if (!direct) {
#pragma GCC unroll 16
          for (int c = 0; c < kL; ++c) V::Registers::store(planes + c * plane() + p, tile[c]);
        } else if (n == kL) {
#pragma GCC unroll 16
          for (int c = 0; c < kL; ++c)
            if (c < used) V::store(epilogue_.y + dst + c * view_.dst.c + p, tile[c]);
        } else {
#pragma GCC unroll 16
          for (int c = 0; c < kL; ++c)
            if (c < used) V::store_partial(epilogue_.y + dst + c * view_.dst.c + p, tile[c], n);
        }
      }
      if (direct) continue;
      for (int64_t c = 0; c < used; ++c) {
        if (simple_)
          Epilogue<T>{epilogue_.y, nullptr, Activation::kNone}.store(
              planes + c * plane(), run, dst + c * view_.dst.c, view_.dst.column);
        else
          epilogue_.store(planes + c * plane(), run, dst + c * view_.dst.c, view_.dst.column);
      }
    }
  }

  const ConvView& view_;
  const GroupBand& band_;
  const T* src_;
  const A* weights_;
  const Epilogue<T>& epilogue_;
  int64_t vectors_;
  Buffer<A> bias_;  // [block][vector][lanes]
  LaneIndex<A> lanes_[kL];
  std::vector<TapRun> runs_;
  std::vector<Call> calls_;
  int64_t weights_vector_;
  int64_t out_rows_;
  bool clamps_, simple_, in_place_;  // simple_: the tile itself can finish
  A high_;
};

}  // namespace

bool group_band_applies(const ConvView& view, int64_t element_size) {
  const bool permutes = element_size == 8 ? kPermutesLanes<double> : kPermutesLanes<float>;
  return GroupBand(view, element_size, permutes).fits;
}

template <typename T>
int64_t group_weights_size(const ConvView& view) {
  const GroupBand band = group_band<T>(view);
  return GroupWeights<T>(view, band).size();
}

template <typename T>
void group_pack_weights(const ConvView& view, const T* w, Wide<T>* packed, const Parallel& pool) {
  const GroupBand band = group_band<T>(view);
  GroupWeights<T>(view, band).pack(w, packed, pool);
}

template <typename T>
void group_gather(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                  const T* bias, const Epilogue<T>& epilogue, const Parallel& pool) {
  const GroupBand band = group_band<T>(view);
  Buffer<Wide<T>> own(packed != nullptr ? 0 : group_weights_size<T>(view));
  if (packed == nullptr) {
    group_pack_weights(view, w, own.get(), pool);
    packed = own.get();
  }
  GroupGather<T>(view, band, src, packed, bias, epilogue).run(pool);
}

#define TORCHCONV_GROUP_GATHER(T)                                                           \
  template int64_t group_weights_size<T>(const ConvView&);                                  \
  template void group_pack_weights(const ConvView&, const T*, Wide<T>*, const Parallel&);   \
  template void group_gather(const ConvView&, const T*, const T*, const Wide<T>*, const T*, \
                             const Epilogue<T>&, const Parallel&);
TORCHCONV_GROUP_GATHER(float)
TORCHCONV_GROUP_GATHER(double)
TORCHCONV_GROUP_GATHER(BFloat16)
TORCHCONV_GROUP_GATHER(Float16)
#undef TORCHCONV_GROUP_GATHER

}  // namespace torchconv::cpu
