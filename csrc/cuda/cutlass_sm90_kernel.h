// The kernel around CUTLASS's collectives for a convolution on Hopper.
//
// A convolution is a matrix product whose operands the tensor memory accelerator gathers: its
// im2col mode walks an image's pixels under one tap, and fills what is outside the image with
// zeros. fprop: (NPQ x CRS) times (CRS x K), dgrad the same over dz; wgrad: (K x NPQ) times
// (NPQ x CRS). Bound: the tensor cores, where a layer has channels enough.
//
// A block computes tile after tile of the product: one to three warpgroups multiply (wgmma),
// convert and store, one more warp loads, and runs ahead into the next tile while the last one is
// stored; yet another loads what is added. Blocks of one cluster have neighbouring tiles: those in
// M share what they load of B, those in N what they load of A. Clusters of N follow each other, so
// that blocks which run together find A in the cache. The order of an output's additions is that of
// the sum, whatever the tile. wgrad's sums are long and divided into parts, as WgradShares says:
// each has a result of its own.
#pragma once

#include "cuda/cutlass_sm90_limits.h"
#include "cuda/early_launch.h"

// clang-format off
#include "cutlass/cutlass.h"
#include "cutlass/cuda_host_adapter.hpp"
#include "cuda/cutlass_sm90_tensor_map.h"  // before what makes tensor maps
#include "cute/tensor.hpp"  // the headers of CUTLASS's convolutions need these before them
#include "cutlass/kernel_hardware_info.hpp"
#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/pipeline/sm90_pipeline.hpp"
// clang-format on

namespace torchconv::cuda::sm90 {

using Operator = cutlass::conv::Operator;
template <Operator kOperator>
using ProblemShape = cutlass::conv::ConvProblemShape<kOperator, 2>;

// What CUTLASS calls a gather.
template <Operator kOperator>
ProblemShape<kOperator> problem_shape(const Gather& g) {
  const auto narrow = [](int64_t v) { return static_cast<int>(v); };
  return {cutlass::conv::Mode::kCrossCorrelation,
          {narrow(g.N), narrow(g.h.image), narrow(g.w.image), narrow(g.C)},
          {narrow(g.K), narrow(g.h.taps), narrow(g.w.taps), narrow(g.C)},
          {narrow(g.h.pad), narrow(g.w.pad)},
          {narrow(pad_after(g.h)), narrow(pad_after(g.w))},
          {narrow(g.h.stride), narrow(g.w.stride)},
          {narrow(g.h.dilation), narrow(g.w.dilation)},
          1};
}

// The builder makes epilogues for tiles of one warpgroup or two; this is the same for Tile, whose
// rows each warpgroup has 64 of. A thread takes its sums of an epilogue tile at once.
template <class Epilogue, class Tile, int kWarpgroups>
struct EpilogueOf;
template <int kStagesC, int kStagesD, int kSums, bool kReuse, bool kDelay, class BuiltTile,
          class BuiltEpilogueTile, class... Others, class Tile, int kWarpgroups>
struct EpilogueOf<
    cutlass::epilogue::collective::CollectiveEpilogue<
        cutlass::epilogue::Sm90TmaWarpSpecialized<kStagesC, kStagesD, kSums, kReuse, kDelay>,
        BuiltTile, BuiltEpilogueTile, Others...>,
    Tile, kWarpgroups> {
  using EpilogueTile =
      decltype(cute::replace<0>(BuiltEpilogueTile{}, cute::Int<64 * kWarpgroups>{}));
  static constexpr int kSumsOfThread =
      static_cast<int>(cute::size(EpilogueTile{})) / (128 * kWarpgroups);
  using Type = cutlass::epilogue::collective::CollectiveEpilogue<
      cutlass::epilogue::Sm90TmaWarpSpecialized<kStagesC, kStagesD, kSumsOfThread, kReuse, kDelay>,
      Tile, EpilogueTile, Others...>;
};

// Loads and products, and the way of the sums to memory, for tiles of Tile with operands of Element
// and results of Output in the layout of OutputTag, what Fusion, a visitor tree, makes of the sums
// and, where Source is not void, another tensor that lies as the results do.
template <Operator kOperator, class Element, class Output, class OutputTag, class Tile_,
          class Cluster, int kStages, int kWarpgroups, int kBlocks_, class Fusion, class Source>
struct Configuration {
  static constexpr int kBlocks = kBlocks_;               // on a multiprocessor
  static constexpr bool kCooperative = kWarpgroups > 1;  // they share the tile's rows
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kAlignment = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kOutputAlignment = 16 / static_cast<int>(sizeof(Output));
  using Tag = cutlass::layout::TensorNHWC;
  using BuiltTile = decltype(cute::replace<0>(Tile_{}, cute::Int<kCooperative ? 128 : 64>{}));
  // Rows of 128 bytes for the stores.
  using EpilogueTile =
      std::conditional_t<kCooperative && sizeof(Output) == 2, cute::Shape<cute::_128, cute::_64>,
                         cutlass::epilogue::collective::EpilogueTileAuto>;
  using EpilogueBuilder = cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, BuiltTile, Cluster, EpilogueTile, float,
      float, Source, OutputTag, kOutputAlignment, Output, OutputTag, kOutputAlignment,
      std::conditional_t<kCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                         cutlass::epilogue::TmaWarpSpecialized>,
      Fusion>;
  using Epilogue =
      typename EpilogueOf<typename EpilogueBuilder::CollectiveOp, Tile_, kWarpgroups>::Type;
  // The builder makes mainloops for one warpgroup; the collective itself takes any number.
  using Builder = cutlass::conv::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kOperator, Element, Tag, kAlignment,
      Element, Tag, kAlignment, float, Tile_, Cluster,
      cutlass::conv::collective::StageCount<kStages>,
      cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>;
  using TiledMma = decltype(cute::make_tiled_mma(
      typename Builder::TiledMma::Atom{},
      cute::Layout<cute::Shape<cute::Int<kWarpgroups>, cute::_1, cute::_1>>{}));
  using Mainloop = cutlass::conv::collective::CollectiveConv<
      typename Builder::DispatchPolicy, Tile_, Element, Element, TiledMma,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<
          typename Builder::GmemTiledCopyA, typename Builder::SmemLayoutA>,
      cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<
          typename Builder::GmemTiledCopyB, typename Builder::SmemLayoutB>>;
};

template <class Configuration>
struct Kernel {
  using Mainloop = typename Configuration::Mainloop;
  using Epilogue = typename Configuration::Epilogue;
  using Problem = typename Mainloop::ProblemShape;
  using Tile = typename Mainloop::TileShape;
  using TiledMma = typename Mainloop::TiledMma;
  using Cluster = typename Mainloop::DispatchPolicy::ClusterShape;
  static constexpr bool kParts = Problem::ConvOp == Operator::kWgrad;
  static constexpr int kBlocks = Configuration::kBlocks;
  static constexpr int kMultipliers = CUTE_STATIC_V(cute::size(TiledMma{}));
  static constexpr int kClusterM = CUTE_STATIC_V(cute::size<0>(Cluster{}));
  static constexpr int kClusterN = CUTE_STATIC_V(cute::size<1>(Cluster{}));
  static constexpr int kClusterSize = kClusterM * kClusterN;
  static_assert(kMultipliers == Configuration::kThreads);

  // device_kernel's launch bounds.
  static constexpr bool kSource = !std::is_void_v<typename Epilogue::ElementC>;
  static constexpr uint32_t MaxThreadsPerBlock = kMultipliers + (kSource ? 64 : 32);
  static constexpr uint32_t MinBlocksPerMultiprocessor = kBlocks;

  struct SharedStorage {
    typename Mainloop::TensorStorage mainloop;
    typename Epilogue::TensorStorage epilogue;
    alignas(16) typename Mainloop::PipelineStorage mainloop_pipeline;
    alignas(16) typename Epilogue::PipelineStorage epilogue_pipeline;
  };
  static_assert(kBlocks * (sizeof(SharedStorage) + 1024) <= 228 * 1024,
                "the blocks must fit a multiprocessor's shared memory");

  // M, N, K and the number of slots; M linear, or with a mode for each dimension.
  static auto linear_shape(const Problem& problem, int slots) {
    return with_slots(Mainloop::get_problem_shape_MNKL(problem), slots);
  }
  static auto nested_shape(const Problem& problem, int slots) {
    return with_slots(cutlass::conv::detail::get_transformed_problem_shape_MNKL(problem), slots);
  }

  // How the tiles are divided among clusters of blocks.
  using Division = std::conditional_t<kParts, WgradShares, GatherPart>;

  struct Params {
    decltype(linear_shape(Problem{}, 1)) shape;
    typename Mainloop::Params mainloop;
    typename Epilogue::Params epilogue;
    Division division;
    int clusters_n;
    int shares;
  };

  // What a block computes at one time.
  struct Unit {
    int m, n;   // tiles
    int slot;   // of the result
    int first;  // tile of K
    int count;  // tiles of K
  };
  // f(unit) for each of a block's units; K has `tiles`.
  template <class F>
  CUTLASS_DEVICE static void for_each_unit(const Params& params, int tiles, F&& f) {
    // The grid is a row of clusters.
    const int rank_m = static_cast<int>(blockIdx.x) % kClusterM;
    const int rank_n = static_cast<int>(blockIdx.y);
    const int step = static_cast<int>(gridDim.x) / kClusterM;
    for (int share = static_cast<int>(blockIdx.x) / kClusterM; share < params.shares;
         share += step) {
      if constexpr (kParts) {
        const WgradPart part = params.division.part(share);
        const int result = static_cast<int>(part.result);
        f(Unit{result / params.clusters_n * kClusterM + rank_m,
               result % params.clusters_n * kClusterN + rank_n, static_cast<int>(part.slot),
               static_cast<int>(part.first), static_cast<int>(part.count)});
      } else {
        const int row = static_cast<int>(params.division.first) + share / params.clusters_n;
        f(Unit{row * kClusterM + rank_m, share % params.clusters_n * kClusterN + rank_n, 0, 0,
               tiles});
      }
    }
  }

  CUTLASS_DEVICE void operator()(const Params& params, char* shared) const {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
    __trap();  // cutlass_takes refuses every device that runs this
#else
    using namespace cute;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = cutlass::canonical_warp_idx_sync();
    const bool loads = warp == kMultipliers / 32, loads_source = warp > kMultipliers / 32;
    if (warp == 0 && elect_one_sync()) {
      Mainloop::prefetch_tma_descriptors(params.mainloop);
      Epilogue::prefetch_tma_descriptors(params.epilogue);
    }

    using Pipeline = typename Mainloop::MainloopPipeline;
    typename Pipeline::Params pipeline_params;
    pipeline_params.role = loads          ? Pipeline::ThreadCategory::Producer
                           : loads_source ? Pipeline::ThreadCategory::NonParticipant
                                          : Pipeline::ThreadCategory::Consumer;
    pipeline_params.is_leader = thread == kMultipliers;
    pipeline_params.num_consumers = kMultipliers;
    pipeline_params.transaction_bytes = params.mainloop.tma_transaction_bytes;
    Pipeline pipeline(storage.mainloop_pipeline, pipeline_params, Cluster{});

    // Of the source's tiles; of no use where there is none.
    using LoadPipeline = typename Epilogue::LoadPipeline;
    typename LoadPipeline::Params load_params;
    if constexpr (kSource) {
      load_params.role = loads_source ? LoadPipeline::ThreadCategory::Producer
                         : loads      ? LoadPipeline::ThreadCategory::NonParticipant
                                      : LoadPipeline::ThreadCategory::Consumer;
      load_params.dst_blockid = block_rank_in_cluster();
      load_params.producer_arv_count = 32;
      load_params.consumer_arv_count = kMultipliers;
      load_params.transaction_bytes = params.epilogue.tma_transaction_bytes;
    }
    LoadPipeline load_pipeline(storage.epilogue_pipeline, load_params,
                               cute::bool_constant<kSource>{});
    // The barriers must be there before a block of the cluster signals on them.
    if constexpr (kClusterSize > 1) {
      cluster_arrive_relaxed();
      cluster_wait();
    } else {
      __syncthreads();
    }
    begin_early();

    Mainloop mainloop;
    const auto inputs = mainloop.load_init(params.shape, params.mainloop);
    const auto& a = get<0>(inputs);  // (tile of M, tile of K, tiles of M, tiles of K)
    const auto& b = get<1>(inputs);
    const int tiles_of_sum = static_cast<int>(size<3>(a));
    const auto tile_of = [&](const Unit& unit) {
      const auto n = idx2crd(unit.n, shape<2>(b));
      if constexpr (kParts)
        return make_coord(unit.m, n, _, unit.slot);
      else
        return make_coord(unit.m, n, _, Int<0>{});
    };

    if (loads) {
      const auto tiles_k = shape<3>(a);  // the iterator refers to it
      auto state = cutlass::make_producer_start_state<Pipeline>();
      for_each_unit(params, tiles_of_sum, [&](const Unit& u) {
        const auto tiles = make_coord_iterator(idx2crd(u.first, tiles_k), tiles_k);
        mainloop.load(params.mainloop, pipeline, state, inputs, tile_of(u), tiles, u.count,
                      thread % 32, block_rank_in_cluster(), storage.mainloop);
        state.advance(u.count);
      });
      mainloop.load_tail(pipeline, state);
      return;
    }

    Epilogue epilogue(params.epilogue, storage.epilogue);
    if constexpr (kSource) {
      if (loads_source) {
        auto state = cutlass::make_producer_start_state<LoadPipeline>();
        for_each_unit(params, tiles_of_sum, [&](const Unit& u) {
          state = epilogue.load(load_pipeline, state, params.shape, Tile{}, tile_of(u), TiledMma{},
                                thread % 32, storage.epilogue);
        });
        epilogue.load_tail(load_pipeline, state);
        return;
      }
    }

    using StorePipeline = typename Epilogue::StorePipeline;
    typename Epilogue::LoadPipelineState load_state;
    typename StorePipeline::Params store_params;
    store_params.always_wait = true;
    StorePipeline store_pipeline(store_params);
    auto store_state = cutlass::make_producer_start_state<StorePipeline>();

    typename Pipeline::PipelineState state;
    for_each_unit(params, tiles_of_sum, [&](const Unit& u) {
      TiledMma tiled_mma;
      auto sums = partition_fragment_C(tiled_mma, take<0, 2>(Tile{}));
      multiply(params, mainloop, pipeline, state, storage, sums, u.count, thread);
      const auto [loaded, stored] =
          epilogue.store(load_pipeline, load_state, store_pipeline, store_state, params.shape,
                         Tile{}, tile_of(u), sums, tiled_mma, thread, storage.epilogue);
      load_state = loaded;
      store_state = stored;
    });
    epilogue.store_tail(load_pipeline, load_state, store_pipeline, store_state);
#endif
  }

 private:
  template <class Shape>
  static auto with_slots(const Shape& shape, int slots) {
    if constexpr (kParts)
      return cute::replace<3>(shape, slots);
    else
      return shape;
  }

  // sums = the products of the next `count` tiles of K. Tensor cores round each addition towards
  // zero; long sums are therefore added up from parts, with rounding to nearest.
  template <class State, class Pipeline, class Sums>
  CUTLASS_DEVICE static void multiply(const Params& params, Mainloop& mainloop, Pipeline& pipeline,
                                      State& state, SharedStorage& storage, Sums& sums, int count,
                                      int thread) {
    const auto part = [&](Sums& products, int tiles) {
      mainloop.mma(pipeline, state, products, tiles, thread, storage.mainloop, params.mainloop);
      mainloop.mma_tail(pipeline, state, tiles);
      cute::warpgroup_fence_operand(products);  // nothing reads them before the tail
      state.advance(tiles);
    };
    if constexpr (!kParts) {
      part(sums, count);
    } else {
      cute::clear(sums);
      Sums products;
      for (; count > 0; count -= kMostTilesOfSum) {
        part(products, count < kMostTilesOfSum ? count : kMostTilesOfSum);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < cute::size(sums); ++i) sums(i) += products(i);
      }
    }
  }
};

// The shares of a division, with results in `slots` slots.
template <class Kernel>
void launch_kernel(const typename Kernel::Problem& problem,
                   const typename Kernel::Mainloop::Arguments& mainloop,
                   const typename Kernel::Epilogue::Arguments& epilogue,
                   const typename Kernel::Division& division, int shares, int slots, bool early,
                   const Queue& queue) {
  const auto shape = Kernel::linear_shape(problem, slots);
  const int tiles_n = static_cast<int>(
      cute::size(cute::ceil_div(cute::shape<1>(shape), cute::shape<1>(typename Kernel::Tile{}))));
  const typename Kernel::Params params{
      shape,
      Kernel::Mainloop::to_underlying_arguments(problem, mainloop, nullptr),
      Kernel::Epilogue::to_underlying_arguments(Kernel::nested_shape(problem, slots), epilogue,
                                                nullptr),
      division,
      static_cast<int>(ceil_div(tiles_n, Kernel::kClusterN)),
      shares};

  const auto function = &cutlass::device_kernel<Kernel>;
  constexpr int kShared = sizeof(typename Kernel::SharedStorage);
  allow_shared_memory(reinterpret_cast<const void*>(function), kShared);
  cudaLaunchAttribute attributes[2] = {starts_early(), {}};
  cudaLaunchAttribute& cluster = attributes[1];
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = Kernel::kClusterM;
  cluster.val.clusterDim.y = Kernel::kClusterN;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  const int resident = static_cast<int>(
      resident_clusters(queue.multiprocessors, Kernel::kClusterSize) * Kernel::kBlocks);
  config.gridDim = dim3(static_cast<unsigned>(std::min(shares, resident) * Kernel::kClusterM),
                        Kernel::kClusterN);
  config.blockDim = dim3(Kernel::MaxThreadsPerBlock);
  config.dynamicSmemBytes = kShared;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  const int first = early && may_start_early(queue) ? 0 : 1;
  config.attrs = attributes + first;
  config.numAttrs = static_cast<unsigned>((Kernel::kClusterSize > 1 ? 2 : 1) - first);
  check(cudaLaunchKernelEx(&config, function, params), "launch");
}

}  // namespace torchconv::cuda::sm90
