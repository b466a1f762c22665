// Passes by way of patches, copied from the image or folded into it (patches.h, col2im.h).
#pragma once

#include <algorithm>

#include "core/buffer.h"
#include "cpu/conv_gather.h"
#include "cpu/patches.h"

namespace torchconv::cpu {

// For a problem that goes_by_patches or dgrad_by_columns, whose patches `view` reads or writes:
// calls f(part, n, patches, gather) for samples n and on, as many as have their patches in a
// last-level cache: of smaller parts the threads would wait for each other too often. part is the
// problem of these samples, and gather(src, epilogue) their matrix product.
template <typename T, typename F>
void for_patches(const ConvProblem& p, ConvView view, const T* w, const T* bias,
                 const WeightsOwner& owner, const Parallel& pool, F&& f) {
  constexpr int64_t kPatchBytes = 8 << 20;
  const ConvProblem q = patch_problem(p);
  const ConvAlgorithm algorithm = gather_algorithm(view, kDType<T>, winograd_allowed());
  const PackedForm form = packed_form<T>(q, view, algorithm);
  const PackedBuffer kept = kept_weights(q, view, form, w, owner, pool);
  const int64_t packs = kept != nullptr ? 0 : form.bytes / static_cast<int64_t>(sizeof(Wide<T>));
  const Buffer<Wide<T>> own(packs);
  if (packs > 0) pack_weights(q, view, form, w, own.get(), pool);
  const void* const packed = packs > 0 ? own.get() : kept.get();
  const int64_t size = q.C * q.H * q.W;
  const int64_t most = kPatchBytes / static_cast<int64_t>(sizeof(T)) / size;
  const int64_t parts = ceil_div(p.N, std::clamp<int64_t>(most, 1, p.N));
  const Buffer<T> patches(ceil_div(p.N, parts) * size);
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t n = i * p.N / parts;
    ConvProblem part = p;
    part.N = view.N = (i + 1) * p.N / parts - n;
    f(part, n, patches.get(), [&](const T* src, const Epilogue<T>& epilogue) {
      conv_gather(view, algorithm, src, w, packed, bias, epilogue, pool);
    });
  }
}

}  // namespace torchconv::cpu
