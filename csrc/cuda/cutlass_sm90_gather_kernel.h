// The gather of cutlass_sm90_limits.h in tiles of 128 output positions by 256, 128 or 64 filters;
// float32 is rounded to TF32 as it is loaded. The tile does not change the order of an output's
// additions.
#pragma once

#include "cuda/cutlass_sm90_kernel.h"
#include "cuda/cutlass_sm90_passes.h"

namespace torchconv::cuda::sm90 {

// clamp(sum + bias of the filter, low, high), where NaN stays NaN.
template <class Element, class Tile>
struct BiasAndClamp {
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  template <class Output, template <class> class Function>
  using Compute = cutlass::epilogue::fusion::Sm90Compute<Function, Output, float, kRound>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Element, float>;
  using Sum = cutlass::epilogue::fusion::Sm90EVT<Compute<float, cutlass::plus>,
                                                 cutlass::epilogue::fusion::Sm90AccFetch, Bias>;
  using Type =
      cutlass::epilogue::fusion::Sm90EVT<Compute<Element, cutlass::epilogue::thread::Clamp>, Sum>;
};

template <class Element, class TileN, int kStages, int kWarpgroups, int kBlocks>
void gather_in_tiles(const Gather& g, const GatherTensors& tensors, const GatherPart& part,
                     const Queue& queue) {
  using TileK = cute::Shape<cute::Int<128 / static_cast<int>(sizeof(Element))>>;
  using Tile = cute::Shape<cute::_128, TileN, TileK>;
  using Cluster = cute::Shape<cute::Int<kGatherCluster>, cute::_1, cute::_1>;
  using K = Kernel<
      Configuration<Operator::kFprop, Element, Element, cutlass::layout::TensorNHWC, Tile, Cluster,
                    kStages, kWarpgroups, kBlocks, typename BiasAndClamp<Element, Tile>::Type>>;
  typename K::Epilogue::Arguments epilogue{};
  epilogue.thread = {{{}, {static_cast<const Element*>(tensors.bias), Element(0), {}}, {}},
                     {tensors.low, tensors.high}};
  epilogue.ptr_D = static_cast<Element*>(tensors.output);
  epilogue.dD = {{g.out_q, g.out_p, g.out_n}, {}, {}};
  launch_kernel<K>(
      problem_shape<Operator::kFprop>(g),
      {static_cast<const Element*>(tensors.image), static_cast<const Element*>(tensors.filters)},
      epilogue, part, static_cast<int>(part.rows * ceil_div(g.K, part.filters)), 1, queue);
}

template <class Element>
void gather_of(const Gather& g, const GatherTensors& tensors, const Queue& queue) {
  const GatherParts parts = gather_parts(g, sizeof(Element), queue.multiprocessors);
  for (int i = 0; i < parts.count; ++i) {
    const GatherPart& part = parts.part[i];
    switch (part.filters) {
      case 256:
        gather_in_tiles<Element, cute::_256, 4, 2, 1>(g, tensors, part, queue);
        break;
      case 128:
        gather_in_tiles<Element, cute::_128, 6, 2, 1>(g, tensors, part, queue);
        break;
      default:
        // What float32 stores leaves room for fewer stages.
        gather_in_tiles<Element, cute::_64, sizeof(Element) == 4 ? 3 : 4, 1, 2>(g, tensors, part,
                                                                                queue);
    }
  }
}

}  // namespace torchconv::cuda::sm90
