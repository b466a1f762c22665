// The weights of 3x3 grouped convolution, transformed by Winograd's F(4,3) along the rows and
// F(2,3) along the columns, for the blocks of group_band.h.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "cpu/conv_view.h"
#include "cpu/group_band.h"
#include "cpu/group_weights.h"

namespace torchconv::cpu {

// Elements of a vector of filters that meet so many channels.
int64_t group_winograd_vector_size(int64_t channels);

// G g G^T of the weights of vectors of filters, [point of a row][channel][point of a column] each.
class GroupWinogradWeights {
 public:
  // band: kept. channels: those that a filter meets, at least the view's: the others are zeros.
  // exchanges: lane l has channel l ^ c, not c.
  GroupWinogradWeights(const ConvView& view, const GroupBand& band, const float* w,
                       int64_t channels, bool exchanges);

  int64_t vector_size() const { return group_winograd_vector_size(channels_); }
  int64_t size() const { return weights_.vectors() * vector_size(); }
  int64_t scratch() const;
  // Of vector i of all.
  void run(int64_t i, float* scratch, float* u) const;
  void run_all(float* u, const Parallel& pool) const;

 private:
  const ConvView& view_;
  const GroupWeights<float, false> weights_;
  const int64_t channels_;
  const bool exchanges_;
};

}  // namespace torchconv::cpu
