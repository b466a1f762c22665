// The weight side of Winograd's convolution: U = G g G^T for a panel of filters.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "cpu/source_prefetch.h"
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd {

// Where filters are: at w, and gathered, or null.
template <typename A>
struct Filters {
  const A* w;
  const A* gathered;
};

// Elements of what gather_weights writes: [panel][vector of channels] of gather_taps' order, with
// zeros for channels and filters that are not there.
template <typename A>
int64_t gathered_size(const Plan<A>& plan);
template <typename A>
void gather_weights(const Plan<A>& plan, const A* w, A* gathered, const Parallel& pool);

// Transforms the filters of one panel and the channels of one block into u, [point][channel]
// [kPanel]. The last vector of filters and the last step of the product's channels are filled up
// with zeros; nothing is written beyond. streams: past the caches.
template <typename A>
void transform_weights(const Plan<A>& plan, const Filters<A>& filters, int64_t panel, int64_t block,
                       A* u, bool streams = false);

// What transform_weights is going to read, in many short runs.
template <typename A>
void prefetch_panel(const Plan<A>& plan, const Filters<A>& filters, int64_t panel, int64_t block,
                    SourcePrefetch& ahead);

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
