// csrc/cuda/cutlass_sm90_limits.h and _groups.h for tests/test_cutlass_limits.py: which problems
// they take, and their gathers, phases and units computed one element after the other.
#include <algorithm>
#include <limits>
#include <vector>

#include "cuda/cutlass_sm90_groups.h"
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

// A slab of 64 channels of a unit's pixels, as TMA loads a patch: zeros outside of the residue.
void load(const sm90::GroupPatch& patch, const sm90::Gather& g, int64_t columns,
          const double* image, int64_t n, int64_t row, int64_t slab, double* to) {
  const int64_t stride = g.h.stride;
  const int64_t height = ceil_div(g.h.image - patch.residue_h, stride);
  const int64_t width = ceil_div(g.w.image - patch.residue_w, stride);
  for (int64_t i = 0; i < patch.rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t c = 0; c < sm90::kSlabChannels; ++c) {
        const int64_t h = row + patch.first_h + i, w = patch.first_w + j, channel = slab + c;
        const bool inside = h >= 0 && w >= 0 && h < height && w < width && channel < g.C;
        const int64_t pixel = (n * g.h.image + h * stride + patch.residue_h) * g.w.image +
                              w * stride + patch.residue_w;
        *to++ = inside ? image[pixel * g.C + channel] : 0;
      }
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

int takes_groups(const int64_t* v, int pass, int preactivation, int residual, int capability) {
  return sm90::takes_groups(problem(v), static_cast<Pass>(pass), preactivation != 0, residual != 0,
                            capability);
}

// The pass as the kernel of groups computes it, unit after unit: its rows of shared memory hold NaN
// where nothing was loaded. No where an operand reaches beyond the stage and the room behind it.
int groups(const int64_t* v, int pass_index, const double* x, const double* w, double* y) {
  const Pass pass = static_cast<Pass>(pass_index);
  const ConvProblem p = problem(v);
  const sm90::Gather g = sm90::groups_gather(p, pass);
  const int64_t group = p.C / p.groups, taps = g.h.taps * g.w.taps;
  const sm90::GroupTile tile = sm90::group_tile(g, group);
  const int64_t stage = tile.stage_bytes / sm90::kPixelBytes;
  int64_t loaded = 0;
  for (int i = 0; i < tile.patches; ++i) loaded += tile.patch[i].rows * tile.columns;
  if (loaded * sm90::kPixelBytes != tile.loaded) return 0;
  std::vector<double> pixels(
      static_cast<size_t>((stage + sm90::kUnitOutputs) * sm90::kSlabChannels));
  for (int64_t unit = 0; unit < g.N * tile.units_of_image; ++unit)
    for (int64_t slab = 0; slab < g.C; slab += sm90::kSlabChannels) {
      const int64_t n = unit / tile.units_of_image, row = unit % tile.units_of_image * tile.rows;
      std::fill(pixels.begin(), pixels.end(), std::numeric_limits<double>::quiet_NaN());
      for (int i = 0; i < tile.patches; ++i)
        load(tile.patch[i], g, tile.columns, x, n, row, slab, pixels.data() + tile.patch[i].at / 2);
      for (int64_t at = 0; at < tile.rows * tile.columns; ++at) {
        const int64_t out_p = row + at / tile.columns, out_q = at % tile.columns;
        if (at >= sm90::kUnitOutputs) return 0;
        if (out_p >= g.h.outputs || out_q >= g.w.outputs) continue;
        for (int64_t k = slab; k < std::min(slab + sm90::kSlabChannels, g.K); ++k) {
          double sum = 0;
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t pixel = tile.tap_at[tap] / sm90::kPixelBytes + at;
            if (pixel >= stage + sm90::kUnitOutputs) return 0;
            for (int64_t c = 0; c < group; ++c) {
              const int64_t channel = k / group * group + c;
              const double weight = pass == Pass::kDgrad
                                        ? w[(channel * taps + taps - 1 - tap) * group + k % group]
                                        : w[(k * taps + tap) * group + c];
              sum += pixels[static_cast<size_t>(pixel * sm90::kSlabChannels + channel - slab)] *
                     weight;
            }
          }
          y[((n * g.h.outputs + out_p) * g.w.outputs + out_q) * g.K + k] = sum;
        }
      }
    }
  return tile.stages;
}

int64_t group_parts(int64_t slabs, int64_t units, int64_t multiprocessors) {
  return sm90::group_parts(slabs, units, multiprocessors);
}
}
