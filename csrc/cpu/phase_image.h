// What the phases of a stride's dgrad share in bfloat16, where pixels are neighbours in memory.
//
// The image that they write: a phase owns every other pixel of a plane, which its product could
// only write one by one. So the phases write a channels_last image in scratch, and that is
// transposed to dx. And the weights: a phase picks every other tap of a filter, and could only read
// them one by one. So the taps are taken apart once, for all phases.
#pragma once

#include <vector>

#include "core/buffer.h"
#include "core/conv_problem.h"
#include "core/parallel.h"
#include "cpu/conv_view.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

class PhaseImage {
 public:
  // covered: the phases write every pixel.
  PhaseImage(const ConvProblem& p, bool covered, const Parallel& pool);

  // dgrad's views of the problem, with this image for dst.
  std::vector<ConvView> phases(std::vector<ConvView> views) const;
  BFloat16* data() const { return image_.get(); }
  void store(BFloat16* dx, const Parallel& pool) const;

 private:
  const ConvProblem& p_;
  int64_t pixel_;           // elements of a pixel, whole vectors
  Buffer<BFloat16> image_;  // [n][pixel][pixel_]
};

// The weights of one group as [tap][k][c], with an even number of channels.
class PhaseWeights {
 public:
  PhaseWeights(const ConvProblem& p, const BFloat16* w, const Parallel& pool);

  // dgrad's view of the problem, with these weights.
  ConvView phase(ConvView view) const;
  const BFloat16* data() const { return weights_.get(); }

 private:
  int64_t channels_, tap_;  // of a filter and of a tap, with those that make them even
  Buffer<BFloat16> weights_;
};

}  // namespace torchconv::cpu
