// The convolution's entry points on the GPU: they make the copies that a plan asks for and run its
// algorithm.
#include "cuda/conv2d.h"

#include "cuda/conv_choice.h"
#include "cuda/conv_layout.h"

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

// x in the layout `wanted`: itself or a copy.
const void* in_layout(const void* x, DType dtype, Layout layout, Layout wanted, int64_t N,
                      int64_t C, int64_t pixels, const Queue& queue) {
  if (same_memory(layout, wanted, C, pixels)) return x;
  void* copy = scratch_of(dtype, N * C * pixels, queue);
  const bool to_nhwc = wanted == Layout::kNHWC;
  transpose(dtype, x, copy, N, to_nhwc ? C : pixels, to_nhwc ? pixels : C, queue);
  return copy;
}

// Where an algorithm writes an image that is wanted in another layout, and what brings it there.
class OutputImage {
 public:
  OutputImage(void* target, DType dtype, Layout layout, Layout written, int64_t N, int64_t C,
              int64_t pixels, const Queue& queue)
      : target_(target),
        dtype_(dtype),
        written_(written),
        N_(N),
        C_(C),
        pixels_(pixels),
        queue_(queue) {
    copies_ = target != nullptr && !same_memory(layout, written, C, pixels);
    data_ = copies_ ? scratch_of(dtype, N * C * pixels, queue) : target;
  }
  void* data() const { return data_; }
  void finish() const {
    if (!copies_) return;
    const bool from_nhwc = written_ == Layout::kNHWC;
    transpose(dtype_, data_, target_, N_, from_nhwc ? pixels_ : C_, from_nhwc ? C_ : pixels_,
              queue_);
  }

 private:
  void* target_;
  DType dtype_;
  Layout written_;
  int64_t N_, C_, pixels_;
  const Queue& queue_;
  bool copies_;
  void* data_;
};

bool repacks(const ConvProblem& p, const ConvProblem& plan) {
  const bool same_layout =
      p.weight_layout == plan.weight_layout || p.C == p.groups || p.R * p.S == 1;
  return !same_layout || p.flip != plan.flip;
}

const void* weights_for(const ConvProblem& p, const ConvProblem& plan, const void* w,
                        const Queue& queue) {
  if (!repacks(p, plan)) return w;
  const int64_t C = p.C / p.groups;
  void* packed = scratch_of(p.dtype, p.K * C * p.R * p.S, queue);
  pack_weights(p.dtype, w, p.weight_layout, p.flip, packed, p.K, C, p.R, p.S, queue);
  return packed;
}

// dz in the layout of a plan; a copy is made once for both gradients.
class Gradient {
 public:
  Gradient(const ConvProblem& p, const void* dz, const Queue& queue)
      : p_(p), dz_(dz), queue_(queue) {}
  const void* in(Layout layout) {
    if (layout == p_.layout) return dz_;
    if (copy_ == nullptr)
      copy_ = in_layout(dz_, p_.dtype, p_.layout, layout, p_.N, p_.K, p_.P * p_.Q, queue_);
    return copy_;
  }

 private:
  const ConvProblem& p_;
  const void* dz_;
  const Queue& queue_;
  const void* copy_ = nullptr;
};

void dgrad(const ConvProblem& p, Gradient& dz, const void* w, void* dx, const Queue& queue) {
  const ConvPlan plan = plan_conv(p, Pass::kDgrad, {}, queue);
  const ConvProblem& q = plan.problem;
  const void* gradient = dz.in(q.layout);
  const void* weights = weights_for(p, q, w, queue);
  const OutputImage image(dx, p.dtype, p.layout, q.layout, p.N, p.C, p.H * p.W, queue);
  switch (plan.algorithm) {
    case ConvAlgorithm::kSimt:
      simt_dgrad(q, gradient, weights, image.data(), queue);
      break;
    case ConvAlgorithm::kDepthwise:
      depthwise_dgrad(q, gradient, weights, image.data(), queue);
      break;
    case ConvAlgorithm::kGrouped:
      grouped_dgrad(q, gradient, weights, image.data(), queue);
      break;
    case ConvAlgorithm::kGroupedMma:
      grouped_mma_dgrad(q, gradient, weights, image.data(), queue);
      break;
    case ConvAlgorithm::kMma:
      mma_dgrad(q, gradient, weights, image.data(), queue);
      break;
    case ConvAlgorithm::kCutlass:
      cutlass_dgrad(q, gradient, weights, image.data(), queue);
      break;
  }
  image.finish();
}

void wgrad(const ConvProblem& p, Gradient& dz, const void* x, void* dw, const Queue& queue) {
  const ConvPlan plan = plan_conv(p, Pass::kWgrad, {}, queue);
  const ConvProblem& q = plan.problem;
  const void* gradient = dz.in(q.layout);
  const void* image = in_layout(x, p.dtype, p.layout, q.layout, p.N, p.C, p.H * p.W, queue);
  const int64_t C = p.C / p.groups;
  const bool unpacks = repacks(p, q);
  void* weights = unpacks ? scratch_of(p.dtype, p.K * C * p.R * p.S, queue) : dw;
  switch (plan.algorithm) {
    case ConvAlgorithm::kSimt:
      simt_wgrad(q, gradient, image, weights, queue);
      break;
    case ConvAlgorithm::kDepthwise:
      depthwise_wgrad(q, gradient, image, weights, queue);
      break;
    case ConvAlgorithm::kGrouped:
      grouped_wgrad(q, gradient, image, weights, queue);
      break;
    case ConvAlgorithm::kGroupedMma:
      grouped_mma_wgrad(q, gradient, image, weights, queue);
      break;
    case ConvAlgorithm::kMma:
      mma_wgrad(q, gradient, image, weights, queue);
      break;
    case ConvAlgorithm::kCutlass:
      cutlass_wgrad(q, gradient, image, weights, queue);
      break;
  }
  if (unpacks)
    unpack_weights(p.dtype, weights, dw, p.weight_layout, p.flip, p.K, C, p.R, p.S, queue);
}

}  // namespace

void conv2d_fprop(const ConvProblem& p, const void* x, const void* w, const WeightsOwner&,
                  const void* bias, const void* residual, void* y, void* preactivation,
                  const Queue& queue) {
  if (p.N * p.K * p.P * p.Q == 0) return;
  const ConvPlan plan =
      plan_conv(p, Pass::kFprop, {preactivation != nullptr, residual != nullptr}, queue);
  const ConvProblem& q = plan.problem;
  const void* image = in_layout(x, p.dtype, p.layout, q.layout, p.N, p.C, p.H * p.W, queue);
  const void* weights = weights_for(p, q, w, queue);
  const void* added = residual == nullptr ? nullptr
                                          : in_layout(residual, p.dtype, p.layout, q.layout, p.N,
                                                      p.K, p.P * p.Q, queue);
  const OutputImage out(y, p.dtype, p.layout, q.layout, p.N, p.K, p.P * p.Q, queue);
  const OutputImage z(preactivation, p.dtype, p.layout, q.layout, p.N, p.K, p.P * p.Q, queue);
  switch (plan.algorithm) {
    case ConvAlgorithm::kSimt:
      simt_fprop(q, image, weights, bias, added, out.data(), z.data(), queue);
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
  out.finish();
  z.finish();
}

void conv2d_backward(const ConvProblem& p, const void* dy, const void* saved, const void* x,
                     const void* w, void* dx, void* dw, void* db, const Queue& queue) {
  const void* dz = dy;
  void* own_dz = nullptr;
  if (p.activation != Activation::kNone && (dx != nullptr || dw != nullptr))
    dz = own_dz = scratch_of(p.dtype, p.N * p.K * p.P * p.Q, queue);
  if (own_dz != nullptr || db != nullptr) activation_backward(p, dy, saved, own_dz, db, queue);
  Gradient gradient(p, dz, queue);
  if (dx != nullptr) dgrad(p, gradient, w, dx, queue);
  if (dw != nullptr) wgrad(p, gradient, x, dw, queue);
}

}  // namespace torchconv::cuda
