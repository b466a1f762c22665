// dgrad of bfloat16 as the fold of a matrix product (col2im.h), with the columns of a
// channel at a time, in float.
#pragma once

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "core/types.h"

namespace torchconv::cpu {

// The problem is one of dgrad_by_columns in bfloat16, on a processor that has_pair_products. Pixels
// of dx that no window holds are left alone.
void dgrad_column_pairs(const ConvProblem& p, const BFloat16* dz, const BFloat16* w, BFloat16* dx,
                        const Parallel& pool);

}  // namespace torchconv::cpu
