// Convolutions whose kernels lie side by side, or are 1x1 with a stride, as 1x1 convolutions of an
// image of patches.
#pragma once

#include "core/conv_problem.h"
#include "core/parallel.h"

namespace torchconv::cpu {

// Whether patch_problem has the results of p: such kernels on an NCHW image, in one group.
bool patches_apply(const ConvProblem& p);

// The 1x1 problem: C*R*S channels, P by Q pixels. Its weights are those of p.
ConvProblem patch_problem(const ConvProblem& p);

// From x, [n][c][h][w], the image of patches [n][c][r][s][p][q], and back: what lies in no
// patch is zero. Instantiated for float and double, fold_patches for BFloat16 and Float16 too.
template <typename T>
void unfold_patches(const ConvProblem& p, const T* x, T* patches, const Parallel& pool);
template <typename T>
void fold_patches(const ConvProblem& p, const T* patches, T* x, const Parallel& pool);

}  // namespace torchconv::cpu
