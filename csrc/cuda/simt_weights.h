// The weights as the gather kernels read them: for each group and phase the terms in their order, a
// row of the group's target channels each, widened, and filled with zeros to whole panels of a
// tile.
//
// A block copies 32 terms by 32 channels through shared memory: its reads run along whichever of
// the two is closer together in w, its writes along channels. Bound by memory, of which there is
// little.
#pragma once

#include "core/range.h"
#include "cuda/simt_tile.h"
#include "cuda/simt_view.h"

namespace torchconv::cuda {

template <typename W>
struct SimtPacked {
  // Where a phase's terms begin, in steps of eight; the last is their number.
  uint32_t first[SimtAxis::kPhases * SimtAxis::kPhases + 1];
  int column_phases;
  uint32_t width;       // of a term's row
  uint32_t group_size;  // in elements; all groups have fewer than 2^32
  W* data;

  __device__ __forceinline__ uint32_t terms(int group, int row_phase, int column_phase) const {
    return static_cast<uint32_t>(group) * group_size +
           first[row_phase * column_phases + column_phase] * 8 * width;
  }
};

// Where channels are neighbours in memory, terms take 32 of them a tap, a line of memory. Else they
// take sixteen, a panel of simt_planes.cu, where that may compute the view, and all taps of a
// channel where it may not: any way the next terms find in the cache what the last ones brought.
inline uint32_t channels_together(const SimtView& v) {
  if (v.source.c != 1) return v.C % 16 == 0 && v.rows.phases * v.columns.phases == 1 ? 16 : 1;
  return static_cast<uint32_t>(v.C % 32 == 0 ? 32 : v.C > 0 ? v.C : 1);
}

struct SimtWeights {
  SimtAxis rows, columns;
  int64_t group, m, c, row, column;  // strides of w
  int C, M;
  uint32_t channels;  // of a block of terms
  bool along_m;
  unsigned m_tiles, groups;
};

template <typename T>
__global__ void __launch_bounds__(256)
    simt_pack_weights(const __grid_constant__ SimtWeights p,
                      const __grid_constant__ SimtPacked<Wide<T>> packed, const T* w) {
  __shared__ Wide<T> tile[32][33];
  const int row_phase = blockIdx.y / p.columns.phases, column_phase = blockIdx.y % p.columns.phases;
  const SimtPhase& row = p.rows.phase[row_phase];
  const SimtPhase& column = p.columns.phase[column_phase];
  const unsigned panels = p.m_tiles * p.groups, panel = blockIdx.x % panels;
  const unsigned first_term = blockIdx.x / panels * 32;
  const unsigned terms = static_cast<unsigned>(row.taps * column.taps * p.C);
  const unsigned padded_terms = (terms + 7) / 8 * 8;
  if (first_term >= padded_terms) return;
  const int first_m = static_cast<int>(panel % p.m_tiles) * 32;
  const int group = static_cast<int>(panel / p.m_tiles);
  const TermOrder order{p.channels, static_cast<uint32_t>(row.taps * column.taps),
                        static_cast<uint32_t>(column.taps)};
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < 32; i += 8) {
    const int m = p.along_m ? lane : i, t = p.along_m ? i : lane;
    const unsigned term = first_term + t;
    Wide<T> value{0};
    if (term < terms && first_m + m < p.M) {
      int c, r, s;
      order.split(term, c, r, s);
      value = to_wide(w[group * p.group + (first_m + m) * p.m + c * p.c +
                        (row.weight + r * row.weight_step) * p.row +
                        (column.weight + s * column.weight_step) * p.column]);
    }
    tile[t][m] = value;
  }
  __syncthreads();
  Wide<T>* target = packed.data + packed.terms(group, row_phase, column_phase) + first_m + lane;
  for (int t = threadIdx.x / 32; t < 32; t += 8)
    if (first_term + t < padded_terms)
      target[int64_t{first_term + t} * packed.width] = tile[t][lane];
}

// Rows of whole panels of panel_m channels, in scratch memory.
template <typename T>
SimtPacked<Wide<T>> pack_weights(const SimtView& v, const T* w, int64_t panel_m,
                                 const Queue& queue) {
  SimtPacked<Wide<T>> packed{};
  packed.width = static_cast<uint32_t>(ceil_div(v.M, panel_m) * panel_m);
  packed.column_phases = v.columns.phases;
  uint32_t steps = 0, most_steps = 0;
  for (int a = 0; a < v.rows.phases; ++a) {
    for (int b = 0; b < v.columns.phases; ++b) {
      packed.first[a * v.columns.phases + b] = steps;
      const int64_t taps = int64_t{v.rows.phase[a].taps} * v.columns.phase[b].taps;
      const auto these = static_cast<uint32_t>(ceil_div(taps * v.C, 8));
      steps += these;
      most_steps = std::max(most_steps, these);
    }
  }
  packed.group_size = steps * 8 * packed.width;
  if (steps == 0) return packed;
  packed.data = queue.scratch<Wide<T>>(v.groups * int64_t{packed.group_size});
  SimtWeights from{};
  from.rows = v.rows, from.columns = v.columns;
  from.group = v.weight_group, from.m = v.weight_m, from.c = v.weight_c;
  from.row = v.weight_row, from.column = v.weight_column;
  from.C = static_cast<int>(v.C), from.M = static_cast<int>(v.M);
  from.channels = channels_together(v);
  // In dgrad a target channel is a filter's channel, and nearer to the next one than a filter.
  from.along_m = v.weight_m < v.weight_c;
  from.m_tiles = static_cast<unsigned>(packed.width / 32);
  from.groups = static_cast<unsigned>(v.groups);
  const int64_t panels = int64_t{from.m_tiles} * v.groups;
  launch(simt_pack_weights<T>,
         dim3(static_cast<unsigned>(panels * ceil_div(most_steps, 4)),
              static_cast<unsigned>(v.rows.phases * v.columns.phases)),
         256, 0, queue, from, packed, w);
  return packed;
}

}  // namespace torchconv::cuda
