// dgrad of bfloat16 planes as the fold of a matrix product (col2im.h), with the columns of a
// channel at a time, in float.
#pragma once

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "core/types.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// The problem is one of dgrad_by_columns in bfloat16 and NCHW, on a processor that
// has_pair_products; view: of its dgrad. What the view does not reach is left alone.
void dgrad_column_pairs(const ConvProblem& p, const ConvView& view, const BFloat16* dz,
                        const BFloat16* w, BFloat16* dx, const Parallel& pool);

}  // namespace torchconv::cpu
