// dgrad as a matrix product whose result is the gradient of an im2col matrix, which is then folded.
#pragma once

#include <vector>

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "core/range.h"
#include "core/types.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether the weights of p are those of patch_problem(p) (patches.h) as they lie.
bool col2im_applies(const ConvProblem& p);

// dx from its columns, an image of patch_problem(p). views: of p's dgrad, whose tap.weight also is
// where a tap stands among the columns. What no view reaches is left alone. Instantiated for float
// and double.
template <typename T>
void col2im(const ConvProblem& p, const std::vector<ConvView>& views, const T* columns, T* dx,
            const Parallel& pool);

// The same for planes of bfloat16 one at a time, from float columns.
class ColumnFold {
 public:
  // view: the only one of dgrad in NCHW.
  explicit ColumnFold(const ConvView& view);
  // columns: of one channel and image, [tap][p][q] with taps `step` apart; dx: its plane.
  void plane(const float* columns, int64_t step, BFloat16* dx) const;

 private:
  const ConvView& view_;
  std::vector<Range> inside_;  // for each row the taps whose row of the columns exists
};

}  // namespace torchconv::cpu
