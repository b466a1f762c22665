// From the sums of products to the taps of dw.
//
// A product tile is kPanel rows by kPanel columns of every sum of a scheme, each sum's tile in a
// plane of its own: filters by channels, or for a first layer, whose few channels would leave most
// of a vector empty, channels by filters. Its taps are held as [row][vector of columns][tap][lane]
// until all tiles of dz are summed.
#pragma once

#include <vector>

#include "cpu/conv_view.h"
#include "cpu/microkernels/gemm.h"
#include "cpu/winograd_wgrad_transforms.h"

namespace torchconv::cpu::winograd_gradient {

template <typename A>
inline constexpr int64_t kTileElements = kPanel<A> * kPanel<A>;

template <typename A>
struct ProductTile {
  const A* sums;
  int64_t plane;  // stride
  int64_t first_row, first_column;
  int64_t rows, columns;
};

// Writes the taps of dw.
template <typename A>
class TapStore {
 public:
  // dw of a tile, which is complete. False where an element is not finite.
  virtual bool invert(const ProductTile<A>& tile) const = 0;
  // The same, from the sum of `parts` tiles of taps, `stride` apart.
  virtual bool reduce(const ProductTile<A>& tile, const A* taps, int64_t parts,
                      int64_t stride) const = 0;

 protected:
  ~TapStore() = default;
};

template <typename Scheme, typename A>
class TapWriter final : public TapStore<A> {
 public:
  static constexpr int kCount = Scheme::kTaps * Scheme::kTaps;

  // channel_rows: the rows of a product tile are channels, of space_to_depth for FourTaps.
  TapWriter(const ConvView& view, A* dw, bool channel_rows);

  bool invert(const ProductTile<A>& tile) const override;
  bool reduce(const ProductTile<A>& tile, const A* taps, int64_t parts,
              int64_t stride) const override;

 private:
  void scatter(const Vector<A> (&taps)[kCount], int64_t channel, int64_t k, int64_t n) const;
  template <typename Taps>
  bool write(const ProductTile<A>& tile, Taps&& taps_of) const;

  const ConvView& view_;
  A* dw_;
  bool streams_;
  std::vector<int64_t> offsets_;  // with channel rows: [row][tap], -1 where there is none
};

// Adds a tile's taps to `taps` with compensation: `lost` holds what rounding has cost so far.
// first: both are overwritten. last: lost is added to taps, and streams: these stores.
template <typename Scheme, typename A>
void add_taps(const ProductTile<A>& tile, bool first, bool last, A* taps, A* lost,
              bool streams = false);

}  // namespace torchconv::cpu::winograd_gradient
