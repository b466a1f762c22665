// The weight side of Winograd's convolution: U = G g G^T for a panel of filters.
#pragma once

#include <cstdint>

#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd {

// The weights, or their taps as gather_weights has laid them out: in the order of reading.
struct WeightSource {
  const float* w;
  const float* taps;

  WeightSource(const float* weights, const float* gathered = nullptr)
      : w(weights), taps(gathered) {}
};

// Transforms the filters of one panel and the channels of one block into u, [point][channel]
// [kFilters]. The last vector of filters and the last step of the product's channels are filled up
// with zeros; nothing is written beyond. streams: past the caches.
void transform_weights(const Plan& plan, WeightSource source, int64_t panel, int64_t block,
                       float* u, bool streams = false);

// Gathers the filters of one panel from w into taps, [panel][channel][tap][kFilters].
void gather_weights(const Plan& plan, const float* w, int64_t panel, float* taps);
inline int64_t gathered_panel(const Plan& plan) {
  return plan.vectors * kVector * plan.taps().count * kFilters;
}

// Fetches what transform_weights is going to read into the second-level cache, some lines at a time
// between products: it lies in many short runs, which the hardware does not foresee.
class WeightPrefetch {
 public:
  WeightPrefetch(const Plan& plan, WeightSource source, int64_t panel, int64_t block);
  int64_t lines() const { return outer_ * taps_ * run_lines_; }
  void advance(int64_t lines);

 private:
  const Plan& plan_;
  const float* w_;
  int64_t outer_, stride_;    // runs side by side: filters or channels
  int64_t taps_, run_lines_;  // a run is of one tap or of all
  int64_t at_ = 0, tap_ = 0, line_ = 0;
};

// g[channel][tap][kFilters] of `channels` channels, at most a vector, from the weights at w. The
// last vector of filters is filled up with zeros, and nothing is written beyond.
void gather_taps(const ConvView& view, const TapOffsets& taps, const float* w, int64_t filters,
                 int64_t channels, float* g);

// u[point] = G g G^T for one vector of filters of one channel, from g[tap][kFilters] and to planes
// `point` elements apart.
template <int kTaps, bool kStreams = false>
void transform_filter(const float* g, float* u, int64_t point);

// Fetches the i-th part in kVector of the weights of a vector of channels of a panel, at w. They
// lie in many short runs, which the hardware does not foresee.
void prefetch_weights(const ConvView& view, const TapOffsets& taps, const float* w, int64_t i);

}  // namespace torchconv::cpu::winograd
