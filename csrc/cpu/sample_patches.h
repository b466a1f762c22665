// Convolutions of few outputs for each image, as the fully connected layer of samples that are the
// patches of these outputs: its weights are read, or their gradient is written, as they lie.
#pragma once

#include <algorithm>

#include "core/buffer.h"
#include "core/conv_problem.h"
#include "core/parallel.h"

namespace torchconv::cpu {

// Whether sample_problem has the results of p: one group, and no tap that reads beside the image.
bool sample_patches_apply(const ConvProblem& p);

// The 1x1 problem: a sample of C*R*S channels and one pixel for each output of an image. Its
// weights are those of p, its results [n][p][q][k].
ConvProblem sample_problem(const ConvProblem& p);

// From x the samples, [n][p][q][c][r][s] or in channels_last [n][p][q][r][s][c]. Instantiated for
// float and double.
template <typename T>
void unfold_samples(const ConvProblem& p, const T* x, T* samples, const Parallel& pool);

// Calls f(part, n, samples) for images n and on, as many as have their samples in a second-level
// cache; part is the problem of these.
template <typename T, typename F>
void for_sample_parts(const ConvProblem& p, F&& f) {
  constexpr int64_t kBytes = 1 << 20;
  const int64_t size = p.P * p.Q * p.C * p.R * p.S;
  const int64_t most = kBytes / static_cast<int64_t>(sizeof(T)) / size;
  const int64_t images = std::clamp<int64_t>(most, 1, p.N);
  const Buffer<T> samples(images * size);
  ConvProblem part = p;
  for (int64_t n = 0; n < p.N; n += images) {
    part.N = std::min(images, p.N - n);
    f(part, n, samples.get());
  }
}

}  // namespace torchconv::cpu
