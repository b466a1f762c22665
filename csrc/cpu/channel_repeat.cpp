// See channel_repeat.h: a vector of the copy is a permutation of one that begins with its first
// channel, the same for every pixel.
#include "cpu/channel_repeat.h"

#include <algorithm>
#include <type_traits>

#include "core/buffer.h"
#include "core/range.h"
#include "core/types.h"
#include "cpu/parallel_range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

// Pixels that a thread takes at once.
constexpr int64_t kPixels = 64;

}  // namespace

ConvProblem repeated_problem(const ConvProblem& p) {
  ConvProblem q = p;
  q.C = q.groups = p.K;
  return q;
}

template <typename T>
void repeat_channels(const T* src, int64_t pixels, int64_t channels, int64_t times, T* dst,
                     const Parallel& pool) {
  using Stored = std::conditional_t<sizeof(T) == 2, uint16_t, T>;
  using Index = std::conditional_t<sizeof(T) == 2, uint16_t,
                                   std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  using V = Vec<Stored>;
  using Lanes = Vec<Index>;
  constexpr int64_t kL = V::kLanes;
  const int64_t width = channels * times, vectors = ceil_div(width, kL);
  // The last vector ends with the pixel.
  const auto begin_of = [&](int64_t v) { return std::min(v * kL, width - kL); };
  const Buffer<Index> lanes(vectors * kL);
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t l = 0; l < kL; ++l)
      lanes.get()[v * kL + l] = static_cast<Index>((begin_of(v) + l) / times - begin_of(v) / times);
  const WorkSplit split(ceil_div(pixels, kPixels), static_cast<double>(kPixels * width));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t item = begin * vectors; item < end * vectors; ++item) {
      const int64_t first = item / vectors * kPixels, v = item % vectors;
      const int64_t to = begin_of(v), from = to / times, there = std::min(channels - from, kL);
      const auto order = Lanes::load(lanes.get() + v * kL);
      for (int64_t p = first; p < std::min(first + kPixels, pixels); ++p) {
        const auto* const x = reinterpret_cast<const Stored*>(src + p * channels + from);
        const auto value = there == kL ? V::load(x) : V::load_partial(x, there);
        V::store(reinterpret_cast<Stored*>(dst + p * width + to), permute(value, order));
      }
    }
  });
}

template void repeat_channels(const float*, int64_t, int64_t, int64_t, float*, const Parallel&);
template void repeat_channels(const double*, int64_t, int64_t, int64_t, double*, const Parallel&);
template void repeat_channels(const BFloat16*, int64_t, int64_t, int64_t, BFloat16*,
                              const Parallel&);
template void repeat_channels(const Float16*, int64_t, int64_t, int64_t, Float16*, const Parallel&);

}  // namespace torchconv::cpu
