// The source side of Winograd's convolution: V = B^T d B for the tiles of a block.
#pragma once

#include <cstdint>

#include "cpu/source_prefetch.h"
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd {

// Scratch for transform_source.
template <typename A>
int64_t source_scratch(const Plan<A>& plan, int64_t slots);

// Transforms the tiles of a strip of segments, for all channels, into v. streams: past the caches.
// Instantiated for float, double, BFloat16 and Float16.
template <typename T>
void transform_source(const Plan<Wide<T>>& plan, const Segment* segments, int64_t count,
                      const T* src, const SourceLayout<Wide<T>>& layout, Wide<T>* scratch,
                      Wide<T>* v, bool streams = false);

// What it is going to read for the first time, where the strip above has been transformed.
template <typename T>
void prefetch_source(const Plan<Wide<T>>& plan, const Segment* segments, int64_t count,
                     const T* src, SourcePrefetch& ahead);

}  // namespace torchconv::cpu::winograd
