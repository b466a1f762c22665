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
// Those of a vector, in the order of memory where a filter's weights are neighbours. The places are
// [phase][run][channel][tap] for each channel vector. term_channels: of a term.
std::vector<GroupTerm> group_terms(const std::vector<const ConvView*>& phases,
                                   const GroupBand& band, int64_t term_channels);

// Terms whose weights one load reads: those of `count` neighbours from offset on that are terms;
// at: the place of each, or -1.
struct GroupPiece {
  int64_t offset, count;
  int64_t at[kVectorBytes / sizeof(float)];
};
std::vector<GroupPiece> group_pieces(const std::vector<GroupTerm>& terms, int64_t lanes);

// Packed weights [block][vector of filters][term][lanes], whatever type they come from.
template <typename A>
class GroupPacking {
 public:
  virtual ~GroupPacking() = default;
  int64_t vector_size() const { return vector_size_; }
  int64_t vectors() const { return vectors_; }
  int64_t size() const { return vectors_ * vector_size_; }

  // Vector i of all to `packed`. scratch: scratch_size().
  virtual void pack_vector(int64_t i, A* packed, A* scratch) const = 0;
  int64_t scratch_size() const { return scratch_size_; }

  void pack(A* packed, const Parallel& pool) const {
    const WorkSplit split(vectors_, kPackingOperations * static_cast<double>(vector_size_));
    const Buffer<A> scratch(split.slots * scratch_size_);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      for (int64_t i = begin; i < end; ++i)
        pack_vector(i, packed + i * vector_size_, scratch.get() + slot * scratch_size_);
    });
  }

 protected:
  int64_t vectors_, vector_size_, scratch_size_;
};

template <typename T, bool kPairs>
class GroupWeights final : public GroupPacking<Wide<T>> {
 public:
  using V = WideVec<T>;
  static constexpr int64_t kL = V::kLanes;

  // phases: they differ by their taps. w: may be null where nothing is packed.
  GroupWeights(const std::vector<const ConvView*>& phases, const GroupBand& band, const T* w)
      : view_(*phases[0]),
        band_(band),
        terms_(group_terms(phases, band, kChannels)),
        pieces_(view_.weight_k == 1 ? std::vector<GroupPiece>() : group_pieces(terms_, kL)),
        w_(w) {
    this->vectors_ = band.blocks * band.dst_vectors;
    this->vector_size_ = static_cast<int64_t>(terms_.size()) / kChannels * kL;
    this->scratch_size_ = kPairs ? kChannels * this->vector_size_ : 0;
  }

  void pack_vector(int64_t i, Wide<T>* packed, Wide<T>* scratch) const override {
    Wide<T>* const single = kPairs ? scratch : packed;
    if (view_.weight_k == 1)
      copy_filters(i, single);
    else
      transpose_filters(i, single);
    if constexpr (kPairs)
      for (int64_t t = 0; t < this->vector_size_; t += kL)
        join_pairs(single + 2 * t, single + 2 * t + kL, packed + t);
  }

 private:
  static constexpr int64_t kChannels = kPairs ? 2 : 1;  // of a term

  const T* filter(int64_t block, int64_t vector, int64_t lane) const {
    const int64_t k = vector * band_.vector_filters + lane;
    return w_ + (block * band_.groups + k / view_.K) * view_.weight_group +
           k % view_.K * view_.weight_k;
  }

  // Filters of a group are neighbours.
  void copy_filters(int64_t i, Wide<T>* packed) const {
    const int64_t block = i / band_.dst_vectors, vector = i % band_.dst_vectors;
    const int64_t count = band_.filters_in(view_, block, vector);
    const int64_t run = band_.groups > 1 ? view_.K : kL;
    if (count < kL) fill_zero(packed, this->vector_size_ * kChannels);
    for (int64_t l = 0; l < count;) {
      const int64_t k = vector * band_.vector_filters + l;
      const int64_t n = std::min({run, count - l, view_.K - k % view_.K});
      const T* const from = filter(block, vector, l);
      for (const GroupTerm& term : terms_)
        V::Registers::store_partial(packed + term.at * kL + l,
                                    V::load_partial(from + term.offset, n), n);
      l += n;
    }
  }

  void transpose_filters(int64_t i, Wide<T>* packed) const {
    const int64_t block = i / band_.dst_vectors, vector = i % band_.dst_vectors;
    const T* filters[kL] = {};
    const int64_t count = band_.filters_in(view_, block, vector);
    for (int64_t l = 0; l < count; ++l) filters[l] = filter(block, vector, l);
    for (const GroupPiece& piece : pieces_) {
      typename V::Type tile[kL];
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l)
        tile[l] = filters[l] != nullptr ? V::load_partial(filters[l] + piece.offset, piece.count)
                                        : typename V::Type{};
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l)
        if (piece.at[l] >= 0) V::Registers::store(packed + piece.at[l] * kL, tile[l]);
    }
  }

  const ConvView& view_;
  const GroupBand& band_;
  const std::vector<GroupTerm> terms_;
  const std::vector<GroupPiece> pieces_;
  const T* w_;
};

}  // namespace torchconv::cpu
