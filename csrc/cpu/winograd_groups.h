// Convolution of wide groups, by Winograd or by pairs: each is a problem of its own.
#pragma once

#include "cpu/conv_view.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu::winograd {

// One group of a view, whose source and weights begin with it.
inline ConvView group_of(const ConvView& view, int64_t g) {
  ConvView group = view;
  group.groups = 1;
  group.dst_offset += g * view.K * view.dst.c;
  return group;
}

// f(group, pool) for all groups: many are dealt to the threads, few share them. products: of one.
template <typename F>
void for_groups(int64_t groups, double products, const Parallel& pool, F&& f) {
  constexpr int64_t kManyGroups = 4;
  if (groups < kManyGroups) {
    for (int64_t g = 0; g < groups; ++g) f(g, pool);
    return;
  }
  const Parallel alone{[](int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) {
    body(begin, end, context);
  }};
  parallel_for_with_scratch(pool, 0, groups, work_grain(products), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) f(g, alone);
  });
}

}  // namespace torchconv::cpu::winograd
