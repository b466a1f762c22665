// The weight side of Winograd's convolution: U = G g G^T for a panel of filters.
#pragma once

#include <cstdint>

#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd {

// The weights, or their taps as gather_weights has laid them out: in the order of reading.
template <typename A>
struct WeightSource {
  const A* w;
  const A* taps;

  WeightSource(const A* weights, const A* gathered = nullptr) : w(weights), taps(gathered) {}
};

// Transforms the filters of one panel and the channels of one block into u, [point][channel]
// [kPanel]. The last vector of filters and the last step of the product's channels are filled up
// with zeros; nothing is written beyond. streams: past the caches.
template <typename A>
void transform_weights(const Plan<A>& plan, WeightSource<A> source, int64_t panel, int64_t block,
                       A* u, bool streams = false);

// Gathers the filters of one panel from w into taps, [panel][channel][tap][kPanel].
template <typename A>
void gather_weights(const Plan<A>& plan, const A* w, int64_t panel, A* taps);
template <typename A>
int64_t gathered_panel(const Plan<A>& plan) {
  return plan.vectors * kLanes<A> * plan.taps().count * kPanel<A>;
}

// Fetches what transform_weights is going to read into the second-level cache, some lines at a time
// between products: it lies in many short runs, which the hardware does not foresee.
template <typename A>
class WeightPrefetch {
 public:
  WeightPrefetch(const Plan<A>& plan, WeightSource<A> source, int64_t panel, int64_t block);
  int64_t lines() const { return outer_ * taps_ * run_lines_; }
  void advance(int64_t lines);

 private:
  const Plan<A>& plan_;
  const A* w_;
  int64_t outer_, stride_;    // runs side by side: filters or channels
  int64_t taps_, run_lines_;  // a run is of one tap or of all
  int64_t at_ = 0, tap_ = 0, line_ = 0;
};

// g[channel][tap][kPanel] of `channels` channels, at most a vector, from the weights at w. The
// last vector of filters is filled up with zeros, and nothing is written beyond.
template <typename A>
void gather_taps(const ConvView& view, const TapOffsets& taps, const A* w, int64_t filters,
                 int64_t channels, A* g);

// u[point] = G g G^T for one vector of filters of one channel, from g[tap][kPanel] and to planes
// `point` elements apart.
template <typename A, int kTaps, bool kStreams = false>
void transform_filter(const A* g, A* u, int64_t point);

// Fetches the i-th part in kVector of the weights of a vector of channels of a panel, at w. They
// lie in many short runs, which the hardware does not foresee.
template <typename A>
void prefetch_weights(const ConvView& view, const TapOffsets& taps, const A* w, int64_t i);

}  // namespace torchconv::cpu::winograd
