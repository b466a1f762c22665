// fprop: which way a problem goes, by conv_ways.h, and the calls that repeat one.
#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/channel_repeat.h"
#include "cpu/channels_last_copy.h"
#include "cpu/conv2d.h"
#include "cpu/conv_choice.h"
#include "cpu/conv_gather.h"
#include "cpu/conv_integer.h"
#include "cpu/conv_patches.h"
#include "cpu/conv_view.h"
#include "cpu/conv_ways.h"
#include "cpu/direct_gemm.h"
#include "cpu/parallel_range.h"
#include "cpu/sample_patches.h"
#include "cpu/samples_apart.h"
#include "cpu/wide_array.h"

namespace torchconv::cpu {
namespace {

// What images with repeated channels may take. Few of them at a time cost more in waiting threads
// than a copy in the caches gains.
constexpr int64_t kRepeatedBytes = 8 << 20;
// The same of images in another layout and their outputs: of all threads, and of one.
constexpr int64_t kTurnedBytes = 8 << 20, kTurnedBytesOfTask = 2 << 20;
// Of all samples, from which each thread repays weights that are packed before.
constexpr int64_t kPixelsApart = 96;

// fprop of a merged problem: which way it goes.
template <typename T>
class Fprop : public ConvPlan {
 public:
  Fprop(const ConvProblem& p, const WeightsOwner& owner);
  // For calls that repeat it. owned: with an owner of the weights.
  void plan_tasks(bool owned);
  // See conv2d_writes_parts.
  bool writes_parts() const {
    return way_ == Way::kGather && (form_.algorithm == ConvAlgorithm::kDirectProduct ||
                                    form_.algorithm == ConvAlgorithm::kTapRuns ||
                                    form_.algorithm == ConvAlgorithm::kWinograd);
  }
  void run(const void* x, const void* w, const WeightsOwner& owner, const void* bias,
           const void* residual, void* y, void* preactivation, const Parallel& pool) const override;

 private:
  enum class Way : uint8_t {
    kNothing,
    kPatches,
    kSamples,
    kChannelsLast,
    kRepeated,
    kStrided,
    kGather
  };

  Way choose(bool frozen);

  const ConvProblem p_;
  const ConvView view_;
  std::optional<ConvProblem> turned_;             // of kChannelsLast
  PackedForm form_{};                             // and the algorithm of kStrided and kGather
  std::shared_ptr<const DirectGemmPlan> direct_;  // or null
  const Way way_;
};

// The fprop of contiguous images by way of channels_last ones.
template <typename T>
class TurnedFprop {
 public:
  // q: what computes p, see fprop_by_channels_last.
  TurnedFprop(const ConvProblem& p, const ConvProblem& q, const Epilogue<T>& epilogue)
      : p_(p),
        q_(q),
        view_(fprop_view(q)),
        algorithm_(gather_algorithm(view_, kDType<T>, winograd_allowed())),
        epilogue_(epilogue) {}

  void run(const T* x, const T* w, const WeightsOwner& owner, const T* bias,
           const Parallel& pool) const {
    const bool turns = q_.weight_layout != p_.weight_layout;
    const Buffer<T> turned =
        turns ? channels_last_copy(w, p_.K, p_.C, p_.R * p_.S, pool) : Buffer<T>(0);
    const T* const weights = turns ? turned.get() : w;
    const PackedForm form = packed_form<T>(q_, view_, algorithm_);
    const PackedBuffer kept =
        kept_weights(q_, view_, form, weights, turns ? WeightsOwner{} : owner, pool);
    if (!samples_apart(form.bytes > 0)) {
      const int64_t images = images_of(kTurnedBytes);
      for (int64_t n = 0; n < p_.N; n += images)
        gather({n, std::min(n + images, p_.N)}, x, weights, kept.get(), bias, pool);
      return;
    }
    const int64_t packs = kept != nullptr ? 0 : form.bytes / static_cast<int64_t>(sizeof(Wide<T>));
    const Buffer<Wide<T>> own(packs);
    if (packs > 0) pack_weights(q_, view_, form, weights, own.get(), pool);
    const void* const packed = packs > 0 ? own.get() : kept.get();
    const double operations = static_cast<double>(view_.pixels() * view_.K * view_.terms());
    parallel_for_with_scratch(pool, 0, p_.N, work_grain(operations), [&](int64_t b, int64_t e) {
      const int64_t images = images_of(kTurnedBytesOfTask);
      for (int64_t n = b; n < e; n += images)
        gather({n, std::min(n + images, e)}, x, weights, packed, bias, kAlone);
    });
  }

 private:
  int64_t image() const { return p_.C * p_.H * p_.W; }
  int64_t out() const { return p_.K * p_.P * p_.Q; }
  int64_t images_of(int64_t bytes) const {
    return std::clamp<int64_t>(bytes / ((image() + out()) * static_cast<int64_t>(sizeof(T))), 1,
                               p_.N);
  }
  // Whether a thread turns the images that it then reads, which else come from other caches: there
  // are enough for each, and pixels that repay weights packed before.
  bool samples_apart(bool packs) const {
    return is_even_for_threads(p_.N) && (!packs || p_.N * view_.pixels() >= kPixelsApart);
  }

  void gather(Range samples, const T* x, const T* w, const void* packed, const T* bias,
              const Parallel& pool) const {
    const int64_t pixels = p_.P * p_.Q, size = samples.size() * out();
    ConvView view = view_;
    view.N = samples.size();
    const Epilogue<T> to = epilogue_.at(samples.begin * out());
    const Buffer<T> last_x =
        channels_last_copy(x + samples.begin * image(), view.N, p_.C, p_.H * p_.W, pool);
    const Buffer<T> last_z(size);
    // Where nothing is added behind the product, that ends with the activation.
    const bool ends = to.activates_only();
    conv_gather(view, algorithm_, last_x.get(), w, packed, bias,
                Epilogue<T>{last_z.get(), nullptr, ends ? to.activation : Activation::kNone}, pool);
    if (ends) return transpose_images(last_z.get(), view.N, pixels, p_.K, to.y, pool);
    const Buffer<T> z(size);
    transpose_images(last_z.get(), view.N, pixels, p_.K, z.get(), pool);
    store_array(to, z.get(), size, pool);
  }

  const ConvProblem &p_, &q_;
  const ConvView view_;
  const ConvAlgorithm algorithm_;
  const Epilogue<T>& epilogue_;
};

// The fprop of contiguous images by way of their few patches.
template <typename T>
void fprop_samples(const ConvProblem& p, const T* x, const T* w, const T* bias,
                   const Epilogue<T>& epilogue, const Parallel& pool) {
  const int64_t out = p.K * p.P * p.Q;
  for_sample_parts<T>(p, [&](const ConvProblem& part, int64_t n, T* samples) {
    unfold_samples(part, x + n * p.C * p.H * p.W, samples, pool);
    const int64_t size = part.N * out;
    const Buffer<T> rows(size), z(size);
    const ConvView view = fprop_view(sample_problem(part));
    conv_gather(view, gather_algorithm(view, kDType<T>, winograd_allowed()), samples, w, nullptr,
                bias, Epilogue<T>{rows.get(), nullptr, Activation::kNone}, pool);
    transpose_images(rows.get(), part.N, p.P * p.Q, p.K, z.get(), pool);
    store_array(epilogue.at(n * out), z.get(), size, pool);
  });
}

// The fprop of images whose channels have several filters each, some images at a time.
template <typename T>
void fprop_repeated(const ConvProblem& p, const T* x, const T* w, const T* bias,
                    const Epilogue<T>& epilogue, const Parallel& pool) {
  const int64_t pixels = p.H * p.W, out = p.P * p.Q * p.K;
  const int64_t images = std::clamp<int64_t>(
      kRepeatedBytes / (pixels * p.K * static_cast<int64_t>(sizeof(T))), 1, p.N);
  const Buffer<T> copy(images * pixels * p.K);
  ConvProblem q = repeated_problem(p);
  for (int64_t n = 0; n < p.N; n += images) {
    q.N = std::min(images, p.N - n);
    repeat_channels(x + n * pixels * p.C, q.N * pixels, p.C, p.K / p.C, copy.get(), pool);
    const Epilogue<T> to = epilogue.at(n * out);
    Fprop<T>(merged(q), {})
        .run(copy.get(), w, WeightsOwner{}, bias, to.residual, to.y, to.preactivation, pool);
  }
}

template <typename T>
Fprop<T>::Fprop(const ConvProblem& p, const WeightsOwner& owner)
    : p_(p), view_(fprop_view(p)), way_(choose(owner.number != 0 && owner.frozen)) {}

template <typename T>
typename Fprop<T>::Way Fprop<T>::choose(bool frozen) {
  if (is_empty(view_)) return Way::kNothing;
  const bool winograd = winograd_allowed();
  if constexpr (std::is_floating_point_v<T>) {
    if ((turned_ = fprop_by_channels_last(p_, view_))) return Way::kChannelsLast;
    if (goes_by_patches(p_, StridedPass::kFprop)) return Way::kPatches;
    if (fprop_by_samples(p_, view_)) return Way::kSamples;
  }
  if (fprop_repeats_channels(p_, winograd)) return Way::kRepeated;
  const bool strided = strides_by_winograd(p_, StridedPass::kFprop, winograd);
  const ConvAlgorithm algorithm =
      strided ? ConvAlgorithm::kStridedWinograd : gather_algorithm(view_, kDType<T>, winograd);
  if constexpr (std::is_same_v<T, float>) {
    if (frozen && algorithm == ConvAlgorithm::kDirectProduct)
      direct_ = plan_direct_gemm(view_, DirectWeights::kInParts);
  }
  form_ = packed_form<T>(p_, view_, algorithm, frozen, direct_.get());
  return strided ? Way::kStrided : Way::kGather;
}

template <typename T>
void Fprop<T>::plan_tasks(bool owned) {
  if constexpr (std::is_same_v<T, float>) {
    if (way_ == Way::kGather && form_.algorithm == ConvAlgorithm::kDirectProduct &&
        direct_ == nullptr)
      direct_ = plan_direct_gemm(
          view_, owned && form_.bytes > 0 ? DirectWeights::kPacked : DirectWeights::kUnpacked);
  }
}

template <typename T>
void Fprop<T>::run(const void* x, const void* w, const WeightsOwner& owner, const void* bias,
                   const void* residual, void* y, void* preactivation, const Parallel& pool) const {
  if (way_ == Way::kNothing) return;
  const Epilogue<T> epilogue{static_cast<T*>(y), static_cast<T*>(preactivation), p_.activation,
                             static_cast<const T*>(residual)};
  const T* const src = static_cast<const T*>(x);
  const T* const weights = static_cast<const T*>(w);
  const T* const b = static_cast<const T*>(bias);
  if constexpr (std::is_floating_point_v<T>) {
    if (way_ == Way::kPatches)
      return for_patches<T>(p_, fprop_view(patch_problem(p_)), weights, b, owner, pool,
                            [&](const ConvProblem& part, int64_t n, T* patches, auto&& product) {
                              unfold_patches(part, src + n * p_.C * p_.H * p_.W, patches, pool);
                              product(patches, epilogue.at(n * view_.dst.n));
                            });
    if (way_ == Way::kSamples) return fprop_samples(p_, src, weights, b, epilogue, pool);
    if (way_ == Way::kChannelsLast)
      return TurnedFprop<T>(p_, *turned_, epilogue).run(src, weights, owner, b, pool);
  }
  if (way_ == Way::kRepeated) return fprop_repeated(p_, src, weights, b, epilogue, pool);
  const PackedBuffer packed = kept_weights(p_, view_, form_, weights, owner, pool);
  if constexpr (kInFloat<T>) {
    if (way_ == Way::kStrided)
      return conv_gather_strided(p_, StridedPass::kFprop, {view_}, src, weights, packed.get(), b,
                                 epilogue, pool);
  }
  conv_gather(view_, form_.algorithm, src, weights, packed.get(), b, epilogue, pool, direct_.get());
}

}  // namespace

void conv2d_fprop(const ConvProblem& problem, const void* x, const void* w,
                  const WeightsOwner& owner, const void* bias, const void* residual, void* y,
                  void* preactivation, const Parallel& pool) {
  const ConvProblem p = merged(problem);
  const auto run = [&](const ConvPlan& plan) {
    plan.run(x, w, owner, bias, residual, y, preactivation, pool);
  };
  switch (p.dtype) {
    case DType::kFloat32:
      return run(Fprop<float>(p, owner));
    case DType::kFloat64:
      return run(Fprop<double>(p, owner));
    case DType::kBFloat16:
      return run(Fprop<BFloat16>(p, owner));
    case DType::kFloat16:
      return run(Fprop<Float16>(p, owner));
    default:
      return conv_integer(fprop_view(p), p.dtype, x, w, bias, y, pool);
  }
}

std::shared_ptr<const ConvPlan> plan_conv2d_fprop(const ConvProblem& problem,
                                                  const WeightsOwner& owner) {
  const ConvProblem p = merged(problem);
  const auto plan = [&](auto element) -> std::shared_ptr<const ConvPlan> {
    const auto made = std::make_shared<Fprop<decltype(element)>>(p, owner);
    made->plan_tasks(owner.number != 0);
    return made;
  };
  switch (p.dtype) {
    case DType::kFloat32:
      return plan(float{});
    case DType::kFloat64:
      return plan(double{});
    case DType::kBFloat16:
      return plan(BFloat16{});
    case DType::kFloat16:
      return plan(Float16{});
    default:
      return nullptr;
  }
}

bool conv2d_writes_parts(const ConvProblem& problem) {
  const ConvProblem p = merged(problem);
  return p.dtype == DType::kFloat32 && p.layout == Layout::kNHWC && p.groups == 1 &&
         Fprop<float>(p, {}).writes_parts();
}

}  // namespace torchconv::cpu
