// Of which terms, and by which plan, direct_gemm.h multiplies: pairs of bfloat16 or single ones,
// with weights that are packed before or by each task.
#include "cpu/direct_gemm.h"

#include <memory>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/channel_band.h"
#include "cpu/channel_pairs.h"
#include "cpu/direct_gemm_blocks.h"
#include "cpu/direct_plan.h"
#include "cpu/direct_tasks.h"
#include "cpu/row_pairs.h"

namespace torchconv::cpu {

// Where the terms are no pairs.
class DirectGemmPlan {
 public:
  template <typename T>
  DirectGemmPlan(const ConvView& view, const T*, DirectWeights weights)
      : flat_(flat_pixels(view)),
        plan_(flat_, sizeof(Wide<T>), std::is_same_v<T, Wide<T>>, view.step_w * view.src.column),
        in_parts_(weights == DirectWeights::kInParts && direct_gemm_packs_along<T>(view)),
        packed_(weights != DirectWeights::kUnpacked),
        along_(in_parts_ || (!packed_ && packs_along<T>(view))),
        tasks_(flat_, plan_, {nullptr, sizeof(T), view.C}, kPanel<Wide<T>>, cut<T>(),
               std::is_same_v<T, float> && direct_run_joins(view.K % kPanel<float>)) {}
  DirectGemmPlan(const DirectGemmPlan&) = delete;
  DirectGemmPlan& operator=(const DirectGemmPlan&) = delete;

  // Whether calls have packed weights, and in parts; along: or else each task packs its own.
  bool packed() const { return packed_; }
  bool in_parts() const { return in_parts_; }
  bool along() const { return along_; }
  const DirectTasks& tasks() const { return tasks_; }

 private:
  template <typename T>
  bool packs_along(const ConvView& view) const {
    return direct_gemm_packs_along<T>(view) ||
           (std::is_same_v<T, Wide<T>> && plan_.packs_along(flat_, sizeof(Wide<T>)));
  }

  // See DirectTasks. Few pixels leave too many out of runs, which alone take half a vector in half
  // the time.
  template <typename T>
  int64_t cut() const {
    using A = Wide<T>;
    if (!along_) return kPanel<A>;
    const bool runs = std::is_same_v<T, float> && kRunsTakeHalves && flat_.dst.c == 1 &&
                      flat_.pixels() >= kPixelsForTwo && plan_.tile_rows == kMaxRows &&
                      !plan_.band && !plan_.reads_taps;
    return runs ? kLanes<A> / 2 : kLanes<A>;
  }

  const ConvView flat_;
  const DirectPlan plan_;
  const bool in_parts_, packed_, along_;
  const DirectTasks tasks_;
};

std::shared_ptr<const DirectGemmPlan> plan_direct_gemm(const ConvView& view,
                                                       DirectWeights weights) {
  return std::make_shared<DirectGemmPlan>(view, static_cast<const float*>(nullptr), weights);
}

std::vector<int64_t> direct_gemm_cuts(const DirectGemmPlan& plan) {
  return plan.in_parts() ? plan.tasks().cuts() : std::vector<int64_t>();
}

template <typename T>
void direct_gemm(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                 const T* bias, const Epilogue<T>& epilogue, const Parallel& pool,
                 const DirectGemmPlan* known) {
  using A = Wide<T>;
  Buffer<A> own(0);
  // Those to multiply with, null where each task packs its own.
  const auto weights = [&](bool along) {
    if (packed != nullptr || along) return packed;
    own = Buffer<A>(direct_gemm_weights_size<T>(view));
    direct_gemm_pack_weights(view, w, own.get(), pool);
    return static_cast<const A*>(own.get());
  };
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (takes_row_pairs(view)) {
      const ConvView image = row_image(view), rows = row_view(image), pairs = pair_view(rows);
      const DirectPlan plan(pairs, sizeof(A), false, 0);
      return DirectGemm<T, true>(pairs, rows.C, plan, src, weights(false), w, bias, epilogue,
                                 &image)
          .run(pool);
    }
    if (takes_pairs(view)) {
      const ConvView pairs = pair_view(flat_pixels(view));
      const bool whole = view.src.c == 1 && view.C % 2 == 0 &&
                         reinterpret_cast<uintptr_t>(src) % alignof(float) == 0;
      const DirectPlan plan(pairs, sizeof(A), whole, view.step_w * view.src.column / 2);
      const A* const b =
          weights(direct_gemm_packs_along<T>(view) || plan.packs_along(pairs, sizeof(A)));
      return DirectGemm<T, true>(pairs, view.C, plan, src, b, w, bias, epilogue).run(pool);
    }
  }
  const auto run = [&](const DirectGemmPlan& plan) {
    const A* const b = weights(plan.along());
    DirectGemm<T>(plan.tasks(), src, b, w, bias, epilogue, plan.in_parts()).run(pool);
  };
  if (known != nullptr && known->packed() == (packed != nullptr)) return run(*known);
  run(DirectGemmPlan(view, w,
                     packed != nullptr ? DirectWeights::kPacked : DirectWeights::kUnpacked));
}

template void direct_gemm(const ConvView&, const float*, const float*, const float*, const float*,
                          const Epilogue<float>&, const Parallel&, const DirectGemmPlan*);
template void direct_gemm(const ConvView&, const double*, const double*, const double*,
                          const double*, const Epilogue<double>&, const Parallel&,
                          const DirectGemmPlan*);
template void direct_gemm(const ConvView&, const BFloat16*, const BFloat16*, const float*,
                          const BFloat16*, const Epilogue<BFloat16>&, const Parallel&,
                          const DirectGemmPlan*);
template void direct_gemm(const ConvView&, const Float16*, const Float16*, const float*,
                          const Float16*, const Epilogue<Float16>&, const Parallel&,
                          const DirectGemmPlan*);

}  // namespace torchconv::cpu
