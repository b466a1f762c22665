// The gather of cutlass_sm90_limits.h in tiles of output positions by filters, kGatherTiles there;
// float32 is rounded to TF32 as it is loaded. The tile does not change the order of an output's
// additions.
#pragma once

#include "cuda/cutlass_sm90_kernel.h"
#include "cuda/cutlass_sm90_passes.h"

namespace torchconv::cuda::sm90 {

// clamp(sum + bias of the filter + residual, low, high), where NaN stays NaN.
template <class Element, class Tile, bool kResidual>
struct BiasAndClamp {
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  template <class Output, template <class> class Function>
  using Compute = cutlass::epilogue::fusion::Sm90Compute<Function, Output, float, kRound>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Element, float>;
  template <class First, class Second>
  using Sum = cutlass::epilogue::fusion::Sm90EVT<Compute<float, cutlass::plus>, First, Second>;
  using Biased = Sum<cutlass::epilogue::fusion::Sm90AccFetch, Bias>;
  using Added =
      std::conditional_t<kResidual, Sum<Biased, cutlass::epilogue::fusion::Sm90SrcFetch<Element>>,
                         Biased>;
  using Type =
      cutlass::epilogue::fusion::Sm90EVT<Compute<Element, cutlass::epilogue::thread::Clamp>, Added>;
};

template <class Element, int kTile, int kStages, int kWarpgroups, int kBlocks,
          bool kResidual = false>
void gather_in_tiles(const Gather& g, const GatherTensors& tensors, const GatherPart& part,
                     const Queue& queue) {
  constexpr GatherTile kSizes = kGatherTiles[kTile];
  using TileK = cute::Shape<cute::Int<128 / static_cast<int>(sizeof(Element))>>;
  using Tile = cute::Shape<cute::Int<static_cast<int>(kSizes.positions)>,
                           cute::Int<static_cast<int>(kSizes.filters)>, TileK>;
  using Cluster = cute::Shape<cute::Int<static_cast<int>(kSizes.cluster_m)>,
                              cute::Int<static_cast<int>(kSizes.cluster_n)>, cute::_1>;
  using K = Kernel<Configuration<Operator::kFprop, Element, Element, cutlass::layout::TensorNHWC,
                                 Tile, Cluster, kStages, kWarpgroups, kBlocks,
                                 typename BiasAndClamp<Element, Tile, kResidual>::Type,
                                 std::conditional_t<kResidual, Element, void>>>;
  typename K::Epilogue::Arguments epilogue{};
  if constexpr (kResidual) {
    epilogue.thread = {
        {{{}, {static_cast<const Element*>(tensors.bias), Element(0), {}}, {}}, {}, {}},
        {tensors.low, tensors.high}};
    epilogue.ptr_C = static_cast<const Element*>(tensors.residual);
    epilogue.dC = {{g.out_q, g.out_p, g.out_n}, {}, {}};
  } else {
    epilogue.thread = {{{}, {static_cast<const Element*>(tensors.bias), Element(0), {}}, {}},
                       {tensors.low, tensors.high}};
  }
  epilogue.ptr_D = static_cast<Element*>(tensors.output);
  epilogue.dD = {{g.out_q, g.out_p, g.out_n}, {}, {}};
  launch_kernel<K>(
      problem_shape<Operator::kFprop>(g),
      {static_cast<const Element*>(tensors.image), static_cast<const Element*>(tensors.filters)},
      epilogue, part, static_cast<int>(kSizes.units(part.runs, g.K)), 1,
      gains_by_early_start(g.C, g.K, g.h.taps * g.w.taps), queue);
}

template <class Element>
void gather_of(const Gather& g, const GatherTensors& tensors, const Queue& queue) {
  if (tensors.residual != nullptr) {
    const int64_t positions = g.N * g.h.outputs * g.w.outputs;
    const GatherPart all{kResidualTile, 0, ceil_div(positions, kGatherTiles[kResidualTile].run())};
    // What is loaded of the residual leaves room for fewer stages.
    return gather_in_tiles<Element, kResidualTile, 5, 2, 1, true>(g, tensors, all, queue);
  }
  const GatherParts parts = gather_parts(g, sizeof(Element), queue.multiprocessors);
  for (int i = 0; i < parts.count; ++i) {
    const GatherPart& part = parts.part[i];
    switch (part.tile) {
      case 0:
        gather_in_tiles<Element, 0, 4, 2, 1>(g, tensors, part, queue);
        break;
      case 1:
        gather_in_tiles<Element, 1, 6, 2, 1>(g, tensors, part, queue);
        break;
      case 2:
        // What float32 stores leaves room for fewer stages.
        gather_in_tiles<Element, 2, sizeof(Element) == 4 ? 3 : 4, 1, 2>(g, tensors, part, queue);
        break;
      case 3:
        gather_in_tiles<Element, 3, 6, 2, 1>(g, tensors, part, queue);
        break;
      default:
        gather_in_tiles<Element, 4, 4, 3, 1>(g, tensors, part, queue);
    }
  }
}

}  // namespace torchconv::cuda::sm90
