// The convolution's entry points on the GPU: they make the copies that a plan asks for and run its
// algorithm.
#include "cuda/conv2d.h"

#include "cuda/conv_choice.h"
#include "cuda/conv_layout.h"
#include "cuda/conv_planes.h"
#include "cuda/winograd.h"

namespace torchconv::cuda {
namespace {

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kUInt8:
    case DType::kInt8:
      return 1;
    default:
      return 2;
  }
}

void* scratch_of(DType dtype, int64_t elements, const Queue& queue) {
  return queue.scratch<unsigned char>(elements * element_size(dtype));
}

// An image in another layout, C channels of `pixels`: the same memory where either is one.
bool same_memory(Layout a, Layout b, int64_t C, int64_t pixels) {
  return a == b || C == 1 || pixels == 1;
}

// x in the layout `wanted`: itself, or a copy that `copies` makes.
const void* in_layout(const void* x, DType dtype, Layout layout, Layout wanted, int64_t N,
                      int64_t C, int64_t pixels, Copies& copies, const Queue& queue) {
  if (same_memory(layout, wanted, C, pixels)) return x;
  void* copy = scratch_of(dtype, N * C * pixels, queue);
  const bool to_nhwc = wanted == Layout::kNHWC;
  copies.transpose(x, copy, N, to_nhwc ? C : pixels, to_nhwc ? pixels : C);
  return copy;
}

// Where an algorithm writes an image that is wanted in another layout, and what brings it there.
class OutputImage {
 public:
  OutputImage(void* target, DType dtype, Layout layout, Layout written, int64_t N, int64_t C,
              int64_t pixels, const Queue& queue)
      : target_(target), written_(written), N_(N), C_(C), pixels_(pixels) {
    copies_ = target != nullptr && !same_memory(layout, written, C, pixels);
    data_ = copies_ ? scratch_of(dtype, N * C * pixels, queue) : target;
  }
  void* data() const { return data_; }
  void finish(Copies& copies) const {
    if (!copies_) return;
    const bool from_nhwc = written_ == Layout::kNHWC;
    copies.transpose(data_, target_, N_, from_nhwc ? pixels_ : C_, from_nhwc ? C_ : pixels_);
  }

 private:
  void* target_;
  Layout written_;
  int64_t N_, C_, pixels_;
  bool copies_;
  void* data_;
};

bool repacks(const ConvProblem& p, const ConvProblem& plan) {
  const bool same_layout =
      p.weight_layout == plan.weight_layout || p.C == p.groups || p.R * p.S == 1;
  return !same_layout || p.flip != plan.flip;
}

const void* weights_for(const ConvProblem& p, const ConvProblem& plan, const void* w,
                        Copies& copies, const Queue& queue) {
  if (!repacks(p, plan)) return w;
  const int64_t C = p.C / p.groups;
  void* packed = scratch_of(p.dtype, p.K * C * p.R * p.S, queue);
  copies.pack_weights(w, p.weight_layout, p.flip, packed, p.K, C, p.R, p.S);
  return packed;
}

void run_dgrad(const ConvPlan& plan, const void* dz, const void* w, void* dx, const Queue& queue) {
  const ConvProblem& p = plan.problem;
  switch (plan.algorithm) {
    case ConvAlgorithm::kSimt:
      return simt_dgrad(p, dz, w, dx, queue);
    case ConvAlgorithm::kWinograd:
      return winograd_dgrad(p, dz, w, dx, queue);
    case ConvAlgorithm::kDepthwise:
      return depthwise_dgrad(p, dz, w, dx, queue);
    case ConvAlgorithm::kGrouped:
      return grouped_dgrad(p, dz, w, dx, queue);
    case ConvAlgorithm::kGroupedMma:
      return grouped_mma_dgrad(p, dz, w, dx, queue);
    case ConvAlgorithm::kMma:
      return mma_dgrad(p, dz, w, dx, queue);
    case ConvAlgorithm::kCutlass:
      return cutlass_dgrad(p, dz, w, dx, queue);
  }
}

void run_wgrad(const ConvPlan& plan, const void* dz, const void* x, void* dw, const Queue& queue) {
  const ConvProblem& p = plan.problem;
  switch (plan.algorithm) {
    case ConvAlgorithm::kSimt:
      return simt_wgrad(p, dz, x, dw, queue);
    case ConvAlgorithm::kWinograd:
      return winograd_wgrad(p, dz, x, dw, queue);
    case ConvAlgorithm::kDepthwise:
      return depthwise_wgrad(p, dz, x, dw, queue);
    case ConvAlgorithm::kGrouped:
      return grouped_wgrad(p, dz, x, dw, queue);
    case ConvAlgorithm::kGroupedMma:
      return grouped_mma_wgrad(p, dz, x, dw, queue);
    case ConvAlgorithm::kMma:
      return mma_wgrad(p, dz, x, dw, queue);
    case ConvAlgorithm::kCutlass:
      return cutlass_wgrad(p, dz, x, dw, queue);
  }
}

// dx and dw, either of which may be null, from dz.
void gradients(const ConvProblem& p, const void* dz, const void* x, const void* w, void* dx,
               void* dw, const Queue& queue) {
  const ConvPlan dgrad = plan_conv(p, Pass::kDgrad, {}, queue);
  const ConvPlan wgrad = plan_conv(p, Pass::kWgrad, {}, queue);
  const bool wants_dx = dx != nullptr, wants_dw = dw != nullptr;
  if (wants_dx && wants_dw) {
    const auto as_it_lies = [&](const ConvPlan& plan) {
      return plan.algorithm == ConvAlgorithm::kMma && plan.problem.layout == p.layout;
    };
    if (as_it_lies(dgrad) && as_it_lies(wgrad) && planes_gradients_take(p, queue))
      return planes_gradients(p, dz, x, w, dx, dw, queue);
  }
  if (dgrad.algorithm == ConvAlgorithm::kDepthwise &&
      wgrad.algorithm == ConvAlgorithm::kDepthwise &&
      depthwise_gradients(p, dz, x, w, dx, dw, queue))
    return;
  Copies before(p.dtype, queue), after(p.dtype, queue);
  const int64_t C = p.C / p.groups, weights = p.K * C * p.R * p.S, outputs = p.P * p.Q;
  // Both passes read the same copy of dz.
  const void* copy = nullptr;
  const auto gradient_for = [&](const ConvProblem& plan) {
    if (same_memory(p.layout, plan.layout, p.K, outputs)) return dz;
    if (copy == nullptr)
      copy = in_layout(dz, p.dtype, p.layout, plan.layout, p.N, p.K, outputs, before, queue);
    return copy;
  };
  const void* image = nullptr;
  const auto find_image = [&] {
    if (image == nullptr)
      image =
          in_layout(x, p.dtype, p.layout, wgrad.problem.layout, p.N, p.C, p.H * p.W, before, queue);
  };
  if (wants_dx) {
    const void* gradient = gradient_for(dgrad.problem);
    // Large copies are made just before they are read, which finds them in the cache.
    if (wants_dw && before.waiting()) find_image();
    const void* filters = weights_for(p, dgrad.problem, w, before, queue);
    before.run();
    const OutputImage to_dx(dx, p.dtype, p.layout, dgrad.problem.layout, p.N, p.C, p.H * p.W,
                            queue);
    run_dgrad(dgrad, gradient, filters, to_dx.data(), queue);
    to_dx.finish(after);
  }
  if (wants_dw) {
    const void* gradient = gradient_for(wgrad.problem);
    find_image();
    before.run();
    const bool unpacks = repacks(p, wgrad.problem);
    void* to_dw = unpacks ? scratch_of(p.dtype, weights, queue) : dw;
    run_wgrad(wgrad, gradient, image, to_dw, queue);
    if (unpacks) after.unpack_weights(to_dw, dw, p.weight_layout, p.flip, p.K, C, p.R, p.S);
  }
  after.run();
}

}  // namespace

void conv2d_fprop(const ConvProblem& p, const void* x, const void* w, const WeightsOwner&,
                  const void* bias, const void* residual, void* y, void* preactivation,
                  const Queue& queue) {
  if (p.N * p.K * p.P * p.Q == 0) return;
  const ConvPlan plan =
      plan_conv(p, Pass::kFprop, {preactivation != nullptr, residual != nullptr}, queue);
  const ConvProblem& q = plan.problem;
  Copies before(p.dtype, queue), after(p.dtype, queue);
  const void* image = in_layout(x, p.dtype, p.layout, q.layout, p.N, p.C, p.H * p.W, before, queue);
  const void* weights = weights_for(p, q, w, before, queue);
  const void* added = residual == nullptr ? nullptr
                                          : in_layout(residual, p.dtype, p.layout, q.layout, p.N,
                                                      p.K, p.P * p.Q, before, queue);
  before.run();
  const OutputImage out(y, p.dtype, p.layout, q.layout, p.N, p.K, p.P * p.Q, queue);
  const OutputImage z(preactivation, p.dtype, p.layout, q.layout, p.N, p.K, p.P * p.Q, queue);
  switch (plan.algorithm) {
    case ConvAlgorithm::kSimt:
      simt_fprop(q, image, weights, bias, added, out.data(), z.data(), queue);
      break;
    case ConvAlgorithm::kWinograd:
      winograd_fprop(q, image, weights, bias, added, out.data(), z.data(), queue);
      break;
    case ConvAlgorithm::kDepthwise:
      depthwise_fprop(q, image, weights, bias, added, out.data(), z.data(), queue);
      break;
    case ConvAlgorithm::kGrouped:
      grouped_fprop(q, image, weights, bias, out.data(), z.data(), queue);
      break;
    case ConvAlgorithm::kGroupedMma:
      grouped_mma_fprop(q, image, weights, bias, added, out.data(), z.data(), queue);
      break;
    case ConvAlgorithm::kMma:
      mma_fprop(q, image, weights, bias, added, out.data(), z.data(), queue);
      break;
    case ConvAlgorithm::kCutlass:
      cutlass_fprop(q, image, weights, bias, added, out.data(), queue);
      break;
  }
  out.finish(after);
  z.finish(after);
  after.run();
}

void conv2d_backward(const ConvProblem& p, const void* dy, const void* saved, const void* x,
                     const void* w, void* dx, void* dw, void* db, const Queue& queue) {
  const void* dz = dy;
  void* own_dz = nullptr;
  if (p.activation != Activation::kNone && (dx != nullptr || dw != nullptr))
    dz = own_dz = scratch_of(p.dtype, p.N * p.K * p.P * p.Q, queue);
  if (own_dz != nullptr || db != nullptr) activation_backward(p, dy, saved, own_dz, db, queue);
  if (dx != nullptr || dw != nullptr) gradients(p, dz, x, w, dx, dw, queue);
}

}  // namespace torchconv::cuda
