// csrc/cuda/cutlass_sm90_limits.h and _groups.h for tests/test_cutlass_limits.py: which problems
// they take, and their gathers, phases and units computed one element after the other.
#include <algorithm>
#include <limits>
#include <vector>

#include "cuda/cutlass_sm90_groups.h"
#include "cuda/cutlass_sm90_groups_wgrad.h"
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

// A block's producer and its three warpgroups, which wait for each other at the places of two
// rings.
struct Rings {
  const ConvProblem& p;
  const sm90::GroupsWgrad& g;
  std::vector<int64_t> rows;  // of each item
  int64_t x_loaded = 0, dz_loaded = 0;
  int64_t x_left[3] = {}, dz_left[3] = {};

  static int64_t least(const int64_t (&left)[3]) { return *std::min_element(left, left + 3); }
  int64_t lines(int64_t of_rows) const { return (of_rows - 1) * p.stride_h + 3; }

  // The item and line that is the count-th; no after the last.
  bool find(int64_t count, int64_t& item, int64_t& line) const {
    for (item = 0, line = count; item < static_cast<int64_t>(rows.size()); ++item) {
      if (line < lines(rows[item])) return true;
      line -= lines(rows[item]);
    }
    return false;
  }
  bool meets(int64_t ahead, int64_t of_rows) const {
    return ahead >= 0 && ahead % p.stride_h == 0 && ahead / p.stride_h < of_rows;
  }
  // Whether all of them come to the end. dz_done: whether the producer has loaded the line's dz.
  bool end() {
    for (bool dz_done = false, moved = true; moved;) {
      moved = false;
      int64_t item, line;
      if (find(x_loaded, item, line)) {
        if (meets(line, rows[item]) && !dz_done) {
          if (dz_loaded - least(dz_left) < g.dz_slots) ++dz_loaded, dz_done = moved = true;
        } else if (x_loaded - least(x_left) < g.x_slots) {
          ++x_loaded, dz_done = false, moved = true;
        }
      }
      for (int i = 0; i < 3; ++i) {
        if (!find(x_left[i], item, line) || x_left[i] >= x_loaded) continue;
        const bool uses = meets(line - i, rows[item]);
        if (uses && dz_left[i] >= dz_loaded) continue;
        ++x_left[i], dz_left[i] += uses, moved = true;
      }
    }
    int64_t item, line;
    for (const int64_t left : x_left)
      if (find(left, item, line)) return false;
    return true;
  }
};

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
  const int64_t group = p.C / p.groups;
  const sm90::GroupTile tile = sm90::group_tile(p, pass);
  const sm90::GroupWalk walk = sm90::group_walk(p, pass);
  const int64_t stage = tile.stage_bytes / sm90::kPixelBytes;
  const int64_t height = pass == Pass::kDgrad ? p.H : p.P, width = pass == Pass::kDgrad ? p.W : p.Q;
  const int64_t apart = walk == sm90::GroupWalk::kDoubled ? 2 : 1;
  int64_t loaded = 0;
  for (int i = 0; i < tile.patches; ++i) loaded += tile.patch[i].rows * tile.columns;
  if (loaded * sm90::kPixelBytes != tile.loaded) return 0;
  if (tile.rows * tile.columns > sm90::kUnitOutputs) return 0;
  std::vector<double> pixels(
      static_cast<size_t>((stage + sm90::kUnitOutputs) * sm90::kSlabChannels));
  for (int64_t unit = 0; unit < g.N * tile.units_of_image; ++unit)
    for (int64_t slab = 0; slab < g.C; slab += sm90::kSlabChannels) {
      const int64_t n = unit / tile.units_of_image, row = unit % tile.units_of_image * tile.rows;
      std::fill(pixels.begin(), pixels.end(), std::numeric_limits<double>::quiet_NaN());
      for (int i = 0; i < tile.patches; ++i)
        load(tile.patch[i], g, tile.columns, x, n, row, slab, pixels.data() + tile.patch[i].at / 2);
      for (int phase = 0; phase < sm90::phases_of(walk); ++phase)
        for (int64_t at = 0; at < tile.rows * tile.columns; ++at) {
          // The row and column that are stored, of those of the phase.
          const int64_t out_h = (row + at / tile.columns) * apart + phase / apart;
          const int64_t out_w = at % tile.columns * apart + phase % apart;
          if (out_h >= height || out_w >= width) continue;
          for (int64_t k = slab; k < std::min(slab + sm90::kSlabChannels, g.K); ++k) {
            double sum = 0;
            for (int i = sm90::products_before(walk, phase);
                 i < sm90::products_before(walk, phase + 1); ++i) {
              const int64_t pixel = tile.product_at[i] / sm90::kPixelBytes + at;
              const int64_t tap = sm90::tap_of_product(walk, i);
              if (pixel >= stage + sm90::kUnitOutputs) return 0;
              for (int64_t c = 0; c < group; ++c) {
                const int64_t channel = k / group * group + c;
                const double weight = pass == Pass::kDgrad
                                          ? w[(channel * 9 + tap) * group + k % group]
                                          : w[(k * 9 + tap) * group + c];
                sum += pixels[static_cast<size_t>(pixel * sm90::kSlabChannels + channel - slab)] *
                       weight;
              }
            }
            y[((n * height + out_h) * width + out_w) * g.K + k] = sum;
          }
        }
    }
  return tile.stages;
}

int64_t group_parts(int64_t slabs, int64_t units, int64_t multiprocessors) {
  return sm90::group_parts(slabs, units, multiprocessors);
}

int takes_groups_wgrad(const int64_t* v, int capability) {
  return sm90::takes_groups_wgrad(problem(v), capability);
}

// dw as the kernel computes it, part after part; the number of parts, as of so many slabs. No where
// a part's rings stop, or a chain has more terms than it may.
int groups_wgrad(const int64_t* v, int64_t slabs, const double* dz, const double* x, double* dw) {
  const ConvProblem p = problem(v);
  ConvProblem wide = p;
  wide.C = wide.K = slabs * sm90::kSlabChannels;
  const sm90::GroupsWgrad g = sm90::groups_wgrad(wide);
  const int64_t group = p.C / p.groups;
  if (g.chain > 1 && g.chain * g.rows * p.Q * sm90::kWgradImages > 4096) return 0;
  if (g.x_slots < 3 || g.x_slots * g.x_bytes + g.dz_slots * g.dz_bytes > sm90::kGroupRoom) return 0;
  std::fill(dw, dw + p.K * 9 * group, 0.0);
  for (int64_t part = 0; part < g.parts; ++part) {
    const int64_t end = std::min((part + 1) * g.of_part, g.items);
    if (part * g.of_part >= end) return 0;
    Rings rings{p, g, {}};
    for (int64_t item = part * g.of_part; item < end; ++item) {
      const int64_t image = item / g.segments * sm90::kWgradImages;
      const int64_t row = item % g.segments * g.rows, rows = std::min(g.rows, p.P - row);
      if (rows <= 0) return 0;
      rings.rows.push_back(rows);
      const int64_t first_line = row * p.stride_h - p.pad_top;
      for (int64_t line = 0; line < rings.lines(rows); ++line)
        for (int64_t r = 0; r < 3; ++r) {
          const int64_t h = first_line + line;
          if (!rings.meets(line - r, rows) || h < 0 || h >= p.H) continue;
          const int64_t out = row + (line - r) / p.stride_h;
          for (int64_t s = 0; s < 3; ++s) {
            const Range outputs = sm90::outputs_inside(p, s);
            for (int64_t q = outputs.begin; q < outputs.end; ++q)
              for (int64_t n = image; n < std::min(image + sm90::kWgradImages, p.N); ++n) {
                const int64_t w = q * p.stride_w - p.pad_left + s;
                if (w < 0 || w >= p.W) return 0;
                const double* gradient = dz + ((n * p.P + out) * p.Q + q) * p.K;
                const double* pixel = x + ((n * p.H + h) * p.W + w) * p.C;
                for (int64_t k = 0; k < p.K; ++k)
                  for (int64_t c = 0; c < group; ++c)
                    dw[(k * 9 + r * 3 + s) * group + c] +=
                        gradient[k] * pixel[k / group * group + c];
              }
          }
        }
    }
    if (!rings.end()) return 0;
  }
  return static_cast<int>(g.parts);
}
}
