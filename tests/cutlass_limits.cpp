// csrc/cuda/cutlass_sm90_limits.h for tests/test_cutlass_limits.py: which problems it takes, and
// its gathers and phases computed one element after the other.
#include <limits>
#include <vector>

#include "cuda/cutlass_sm90_limits.h"

namespace {

using namespace torchconv;
using namespace torchconv::cuda;

ConvProblem problem(const int64_t* v) {
  ConvProblem p{};
  p.N = v[0], p.C = v[1], p.H = v[2], p.W = v[3];
  p.K = v[4], p.R = v[5], p.S = v[6];
  p.P = v[7], p.Q = v[8];
  p.stride_h = v[9], p.stride_w = v[10];
  p.pad_top = v[11], p.pad_left = v[12];
  p.dilation_h = v[13], p.dilation_w = v[14];
  p.groups = v[15];
  p.dtype = static_cast<DType>(v[16]);
  p.layout = p.weight_layout = static_cast<Layout>(v[17]);
  p.activation = static_cast<Activation>(v[18]);
  p.flip = v[19] != 0;
  return p;
}

// How many positions TMA visits on an axis, and how many taps CUTLASS derives.
bool box_agrees(const sm90::GatherAxis& a) {
  const int64_t lower = -a.pad, upper = sm90::pad_after(a) - (a.taps - 1) * a.dilation;
  return (a.image + upper - lower - 1) / a.stride + 1 == a.outputs &&
         1 + (sm90::pad_after(a) - upper) / a.dilation == a.taps;
}

bool gather(const sm90::Gather& g, const double* image, const double* filters, double* out) {
  if (!box_agrees(g.h) || !box_agrees(g.w)) return false;
  for (int64_t n = 0; n < g.N; ++n)
    for (int64_t p = 0; p < g.h.outputs; ++p)
      for (int64_t q = 0; q < g.w.outputs; ++q)
        for (int64_t k = 0; k < g.K; ++k) {
          double sum = 0;
          for (int64_t r = 0; r < g.h.taps; ++r)
            for (int64_t s = 0; s < g.w.taps; ++s) {
              const int64_t h = p * g.h.stride - g.h.pad + r * g.h.dilation;
              const int64_t w = q * g.w.stride - g.w.pad + s * g.w.dilation;
              if (h < 0 || w < 0 || h >= g.h.image || w >= g.w.image) continue;
              const double* pixel = image + ((n * g.h.image + h) * g.w.image + w) * g.C;
              const double* tap = filters + ((k * g.h.taps + r) * g.w.taps + s) * g.C;
              for (int64_t c = 0; c < g.C; ++c) sum += pixel[c] * tap[c];
            }
          out[n * g.out_n + p * g.out_p + q * g.out_q + k] = sum;
        }
  return true;
}

}  // namespace

extern "C" {

int takes(const int64_t* v, int pass, int preactivation, int residual, int capability) {
  return sm90::takes(problem(v), static_cast<Pass>(pass), preactivation != 0, residual != 0,
                     capability);
}

// Rows and columns of pixels that the kernel with a halo loads at once; no if it takes another.
int halo(const int64_t* v, int64_t* box) {
  const ConvProblem p = problem(v);
  const sm90::Gather g = sm90::fprop_gather(p);
  if (!sm90::takes_halo(g, sm90::bytes_of(p.dtype))) return 0;
  const sm90::HaloTile tile = sm90::halo_tile(g);
  box[0] = tile.rows + g.h.taps - 1, box[1] = tile.columns;
  return 1;
}

int fprop(const int64_t* v, const double* x, const double* w, double* y) {
  return gather(sm90::fprop_gather(problem(v)), x, w, y);
}

int dgrad(const int64_t* v, const double* dz, const double* w, double* dx) {
  const ConvProblem p = problem(v);
  const sm90::TurnedFilters filters = sm90::turned_filters(p);
  std::vector<double> turned(static_cast<size_t>(p.K * p.R * p.S * p.C),
                             std::numeric_limits<double>::quiet_NaN());
  for (int r = 0; r < p.R; ++r)
    for (int s = 0; s < p.S; ++s) {
      const sm90::TurnedTap t = filters.tap(r, s);
      for (int64_t k = 0; k < p.K; ++k)
        for (int64_t c = 0; c < p.C; ++c)
          turned[static_cast<size_t>((t.before * p.C + c * t.taps + t.tap) * p.K + k)] =
              w[((k * p.R + r) * p.S + s) * p.C + c];
    }
  const bool zeros = sm90::has_zero_phase(p);
  for (int64_t i = 0; i < p.N * p.H * p.W * p.C; ++i)
    dx[i] = zeros ? 0 : std::numeric_limits<double>::quiet_NaN();
  for (int h = 0; h < p.stride_h; ++h)
    for (int s = 0; s < p.stride_w; ++s) {
      const sm90::Phase phase = sm90::dgrad_phase(p, h, s);
      if (phase.empty() || phase.zero()) continue;
      if (!gather(phase.gather, dz, turned.data() + filters.before(h, s) * p.C * p.K,
                  dx + phase.offset))
        return 0;
    }
  return 1;
}

// Positions and filters of each part's tile, its cluster, the part's first position and how many;
// the number of parts.
int parts(const int64_t* v, int64_t multiprocessors, int64_t* out) {
  const ConvProblem p = problem(v);
  const sm90::GatherParts parts =
      sm90::gather_parts(sm90::fprop_gather(p), sm90::bytes_of(p.dtype), multiprocessors);
  for (int i = 0; i < parts.count; ++i) {
    const sm90::GatherPart& part = parts.part[i];
    const sm90::GatherTile& tile = sm90::kGatherTiles[part.tile];
    for (const int64_t each : {tile.positions, tile.filters, tile.cluster_m * tile.cluster_n,
                               part.first * tile.run(), part.runs * tile.run()})
      *out++ = each;
  }
  return parts.count;
}

// tile_k, tile_c, cluster, results, tiles, whole, splits, steps, shares
void shares(const int64_t* v, int64_t* out) {
  const sm90::WgradShares s = sm90::wgrad_shares(problem(v));
  for (const int64_t each :
       {s.tile_k, s.tile_c, s.cluster, s.results, s.tiles, s.whole, s.splits, s.steps, s.shares()})
    *out++ = each;
}

// The part that is a share: result, slot, first, count, and how many parts its result has.
void share(const int64_t* v, int64_t index, int64_t* out) {
  const sm90::WgradShares s = sm90::wgrad_shares(problem(v));
  const sm90::WgradPart part = s.part(index);
  for (const int64_t each : {part.result, part.slot, part.first, part.count, s.parts(part.result)})
    *out++ = each;
}
}
