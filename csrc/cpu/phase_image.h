// dgrad of a stride in bfloat16 where pixels are neighbours in memory: a phase owns every other
// pixel of a plane, which its product could only write one by one. So the phases write a
// channels_last image in scratch, and that is transposed to dx.
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
  explicit PhaseImage(const ConvProblem& p);

  // dgrad's views of the problem, with this image for dst.
  std::vector<ConvView> phases(std::vector<ConvView> views) const;
  BFloat16* data() const { return image_.get(); }
  void store(BFloat16* dx, const Parallel& pool) const;

 private:
  const ConvProblem& p_;
  int64_t pixel_;           // elements of a pixel, whole vectors
  Buffer<BFloat16> image_;  // [n][pixel][pixel_]
};

}  // namespace torchconv::cpu
