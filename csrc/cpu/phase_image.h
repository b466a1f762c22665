// What the phases of a stride's dgrad share where pixels are neighbours in memory.
//
// In bfloat16 the image that they write: a phase owns every other pixel of a plane, which its
// product could only write one by one. So the phases write a channels_last image in scratch, and
// that is transposed to dx. In either, and in float and double, the weights: a phase picks every
// other tap of a filter, and could only read them one by one. So the taps are taken apart once, for
// all phases.
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

// The weights of one group as [tap][k][c], of bfloat16 with an even number of channels.
// Instantiated for float, double and bfloat16.
template <typename T>
class PhaseWeights {
 public:
  PhaseWeights(const ConvProblem& p, const T* w, const Parallel& pool);

  // dgrad's view of the problem, with these weights.
  ConvView phase(ConvView view) const;
  const T* data() const { return weights_.get(); }

 private:
  int64_t channels_, tap_;  // of a filter and of a tap, with those that make them even
  Buffer<T> weights_;
};

}  // namespace torchconv::cpu
