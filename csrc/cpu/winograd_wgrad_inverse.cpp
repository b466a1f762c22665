// The inverse transform of the weight gradient, its compensated sums, and the stores of dw in
// either layout of the weights.
#include "cpu/winograd_wgrad_inverse.h"

#include "cpu/conv_pack.h"
#include "cpu/winograd_wgrad_phases.h"
#include "cpu/winograd_wgrad_transforms.h"

namespace torchconv::cpu::winograd_gradient {
namespace {

// One vector of channels' taps.
template <typename S, typename A>
TORCHCONV_INLINE void inverse_vector(const A* m, int64_t plane,
                                     Vector<A> (&taps)[S::kTaps * S::kTaps]) {
  constexpr int kTaps = S::kTaps, kSums = S::kSums;
  Vector<A> rows[kTaps][kSums];
#pragma GCC unroll 6
  for (int s = 0; s < kSums; ++s) {
    Vector<A> in[kSums], out[kTaps];
#pragma GCC unroll 6
    for (int r = 0; r < kSums; ++r) in[r] = Vec<A>::load(m + (r * kSums + s) * plane);
    S::inverse(in, out);
#pragma GCC unroll 5
    for (int r = 0; r < kTaps; ++r) rows[r][s] = out[r];
  }
#pragma GCC unroll 5
  for (int r = 0; r < kTaps; ++r) {
    Vector<A> out[kTaps];
    S::inverse(rows[r], out);
#pragma GCC unroll 5
    for (int s = 0; s < kTaps; ++s) taps[r * kTaps + s] = out[s];
  }
}

// sum += x, with what rounding loses in `lost` (Knuth's two-sum).
template <typename V>
TORCHCONV_INLINE void add_compensated(V x, V& sum, V& lost) {
  const V total = sum + x, part = total - sum;
  lost += (sum - (total - part)) + (x - part);
  sum = total;
}

// Gradients from this size on leave a core's caches before anyone reads them.
constexpr int64_t kStreamedWeights = 4 << 20;

// A store of n lanes, or of a whole vector past the caches.
template <typename A>
TORCHCONV_INLINE void store_lanes(A* p, Vector<A> v, int64_t n, bool streams) {
  if (streams)
    stream_bytes(p, v);
  else
    Vec<A>::store_partial(p, v, n);
}

// Stores the kCount neighbouring taps of a vector of channels. They are put in order in memory, and
// what was put there a step earlier is copied: reading back at once would wait for the stores.
template <int kCount, typename A>
class FilterStore {
  using V = Vec<A>;
  static constexpr int64_t kL = V::kLanes;

 public:
  FilterStore(bool flip, bool streams) : flip_(flip), streams_(streams) {}

  void put(const Vector<A> (&taps)[kCount], A* dw, int64_t n) {
    A* slot = slots_[current_];
    if (flip_)
      order<true>(taps, slot);
    else
      order<false>(taps, slot);
    flush();
    slot_ = slot;
    dw_ = dw;
    size_ = n * kCount;
    current_ ^= 1;
  }

  void flush() {
    for (int64_t i = 0; i < size_; i += kL)
      store_lanes(dw_ + i, V::load(slot_ + i), std::min(kL, size_ - i), streams_);
    size_ = 0;
  }

 private:
  // Each row's whole vectors, the last one first: the next row, or its own first vectors after
  // that, overwrite what is too much.
  template <bool kFlip>
  static TORCHCONV_INLINE void order(const Vector<A> (&taps)[kCount], A* slot) {
    constexpr int kLast = (kCount - 2) / kL * kL;
#pragma GCC unroll 6
    for (int t = kLast; t >= 0; t -= kL) {
      Vector<A> tile[kL];
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i)
        tile[i] = t + i < kCount ? taps[kFlip ? kCount - 1 - t - i : t + i] : Vector<A>{};
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l) V::store(slot + l * kCount + t, tile[l]);
    }
    if constexpr (kCount % kL == 1)
      for (int l = 0; l < kL; ++l) slot[l * kCount + kCount - 1] = taps[kFlip ? 0 : kCount - 1][l];
  }

  alignas(64) A slots_[2][(kCount + 1) * kL];
  bool flip_, streams_;
  int current_ = 0;
  const A* slot_ = nullptr;
  A* dw_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace

template <typename Scheme, typename A>
TapWriter<Scheme, A>::TapWriter(const ConvView& view, A* dw, bool channel_rows)
    : view_(view),
      dw_(dw),
      streams_(view.C * view.K * kCount * static_cast<int64_t>(sizeof(A)) >= kStreamedWeights &&
               view.C % kLanes<A> == 0 && WideVec<A>::streamable(dw)) {
  if (!channel_rows) return;
  if constexpr (Scheme::kTaps == 4) {
    offsets_ = phase_tap_offsets(view);
  } else {
    for (int64_t c = 0; c < view.C; ++c)
      for (const ConvTap& tap : view.taps) offsets_.push_back(c * view.weight_c + tap.weight);
  }
}

// Lanes are filters [k, k + n).
template <typename Scheme, typename A>
void TapWriter<Scheme, A>::scatter(const Vector<A> (&taps)[kCount], int64_t channel, int64_t k,
                                   int64_t n) const {
  const int64_t* offsets = &offsets_[channel * kCount];
  for (int t = 0; t < kCount; ++t)
    for (int64_t l = 0; l < n && offsets[t] >= 0; ++l)
      dw_[(k + l) * view_.weight_k + offsets[t]] = taps[t][l];
}

template <typename Scheme, typename A>
template <typename Taps>
bool TapWriter<Scheme, A>::write(const ProductTile<A>& tile, Taps&& taps_of) const {
  constexpr int64_t kL = kLanes<A>;
  auto check = Vector<A>{};  // NaN once any tap is not finite
  FilterStore<kCount, A> filters(view_.taps[0].weight != 0, streams_);
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t column = 0; column < tile.columns; column += kL) {
      Vector<A> taps[kCount];
      taps_of(row, column, taps);
#pragma GCC unroll 25
      for (int t = 0; t < kCount; ++t) check += taps[t] * 0.0f;
      const int64_t n = std::min(kL, tile.columns - column);
      if (!offsets_.empty()) {
        scatter(taps, tile.first_row + row, tile.first_column + column, n);
      } else if constexpr (Scheme::kTaps != 4) {
        const int64_t c = tile.first_column + column;
        A* dw = dw_ + (tile.first_row + row) * view_.weight_k + c * view_.weight_c;
        if (view_.weight_c == 1) {
#pragma GCC unroll 25
          for (int t = 0; t < kCount; ++t)
            store_lanes(dw + view_.taps[t].weight, taps[t], n, streams_);
        } else {
          filters.put(taps, dw, n);
        }
      }
    }
  }
  filters.flush();
  if (streams_) stream_fence();
  bool finite = true;
  for (int l = 0; l < kL; ++l) finite = finite && check[l] == 0;
  return finite;
}

template <typename Scheme, typename A>
bool TapWriter<Scheme, A>::invert(const ProductTile<A>& tile) const {
  return write(tile, [&](int64_t row, int64_t column, Vector<A>(&taps)[kCount]) {
    inverse_vector<Scheme>(tile.sums + row * kPanel<A> + column, tile.plane, taps);
  });
}

template <typename Scheme, typename A>
bool TapWriter<Scheme, A>::reduce(const ProductTile<A>& tile, const A* taps, int64_t parts,
                                  int64_t stride) const {
  using V = Vec<A>;
  constexpr int64_t kL = V::kLanes;
  return write(tile, [&](int64_t row, int64_t column, Vector<A>(&total)[kCount]) {
    const A* at = taps + (row * kPanel<A> + column) * kCount;
#pragma GCC unroll 25
    for (int t = 0; t < kCount; ++t) {
      Vector<A> sum = V::load(at + t * kL), lost{};
      for (int64_t p = 1; p < parts; ++p)
        add_compensated(V::load(at + p * stride + t * kL), sum, lost);
      total[t] = sum + lost;
    }
  });
}

template <typename Scheme, typename A>
void add_taps(const ProductTile<A>& tile, bool first, bool last, A* taps, A* lost, bool streams) {
  using V = Vec<A>;
  constexpr int64_t kL = V::kLanes, kWidth = kPanel<A>;
  constexpr int kCount = Scheme::kTaps * Scheme::kTaps;
  for (int64_t row = 0; row < tile.rows; ++row) {
    for (int64_t column = 0; column < tile.columns; column += kL) {
      Vector<A> values[kCount];
      inverse_vector<Scheme>(tile.sums + row * kWidth + column, tile.plane, values);
      A* sum_at = taps + (row * kWidth + column) * kCount;
      A* lost_at = lost + (row * kWidth + column) * kCount;
#pragma GCC unroll 25
      for (int t = 0; t < kCount; ++t) {
        Vector<A> sum = values[t], rest{};
        if (!first) {
          sum = V::load(sum_at + t * kL);
          rest = V::load(lost_at + t * kL);
          add_compensated(values[t], sum, rest);
        }
        if (last) {
          WideVec<A>::store(sum_at + t * kL, sum + rest, streams);
          continue;
        }
        V::store(sum_at + t * kL, sum);
        V::store(lost_at + t * kL, rest);
      }
    }
  }
}

#define TORCHCONV_INVERSE(Scheme, A)   \
  template class TapWriter<Scheme, A>; \
  template void add_taps<Scheme>(const ProductTile<A>&, bool, bool, A*, A*, bool);
TORCHCONV_INVERSE(ThreeTaps, float)
TORCHCONV_INVERSE(ThreeTaps, double)
TORCHCONV_INVERSE(ThreeTapsStride2, float)
TORCHCONV_INVERSE(ThreeTapsStride2, double)
TORCHCONV_INVERSE(FourTaps, float)
TORCHCONV_INVERSE(FourTaps, double)
TORCHCONV_INVERSE(FiveTaps, float)
TORCHCONV_INVERSE(FiveTaps, double)
#undef TORCHCONV_INVERSE

}  // namespace torchconv::cpu::winograd_gradient
