// The weights of grouped convolution in the order of the tiles of microkernels/group_tile.h: lanes
// are the filters of a vector of group_band.h, of one group or of several.
#pragma once

#include <vector>

#include "core/buffer.h"
#include "cpu/group_band.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {

// A term's weight in a filter, and its place among the terms.
struct GroupTerm {
  int64_t offset, at;
};
// Those of a vector, in the order of memory. term_channels: of a term.
std::vector<GroupTerm> group_terms(const ConvView& view, const GroupBand& band,
                                   int64_t term_channels);

// Weights [block][vector of filters][term][lanes]; the terms of a channel vector are
// [run][channel][tap].
template <typename T, bool kPairs>
class GroupWeights {
 public:
  using V = WideVec<T>;
  static constexpr int64_t kL = V::kLanes;

  GroupWeights(const ConvView& view, const GroupBand& band)
      : view_(view), band_(band), terms_(group_terms(view, band, kChannels)) {}

  int64_t vector_size() const { return static_cast<int64_t>(terms_.size()) / kChannels * kL; }
  int64_t size() const { return band_.blocks * band_.dst_vectors * vector_size(); }

  void pack(const T* w, Wide<T>* packed, const Parallel& pool) const {
    const WorkSplit split(band_.blocks * band_.dst_vectors, static_cast<double>(vector_size()));
    const Buffer<Wide<T>> halves(kPairs ? split.slots * kChannels * vector_size() : 0);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      for (int64_t i = begin; i < end; ++i) {
        Wide<T>* const to = packed + i * vector_size();
        Wide<T>* const single = kPairs ? halves.get() + slot * kChannels * vector_size() : to;
        pack_vector(w, i, single);
        if constexpr (kPairs)
          for (int64_t t = 0; t < vector_size(); t += kL)
            join_pairs(single + 2 * t, single + 2 * t + kL, to + t);
      }
    });
  }

  // Vector i of all: its terms, or the halves of pairs one after the other.
  void pack_vector(const T* w, int64_t i, Wide<T>* packed) const {
    const int64_t block = i / band_.dst_vectors, vector = i % band_.dst_vectors;
    const T* filters[kL] = {};
    const int64_t count = band_.filters_in(view_, block, vector);
    for (int64_t l = 0; l < count; ++l) {
      const int64_t k = vector * band_.vector_filters + l;
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

 private:
  static constexpr int64_t kChannels = kPairs ? 2 : 1;  // of a term

  const ConvView& view_;
  const GroupBand& band_;
  const std::vector<GroupTerm> terms_;
};

}  // namespace torchconv::cpu
